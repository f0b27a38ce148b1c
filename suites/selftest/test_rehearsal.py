"""A night in CI, rehearsed: plan, four shards in four processes, one killed and resumed, merge; and the same plan in one run.

What comes after the merge in a real night (a report, a history, the coverage ledger) is asked of `night.merged` and compared
with `night.single`, at the end of this file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import pytest

from harness import cli, journal, plan, run_info
from harness.plan import Plan
from harness.select import Item
from harness.shard import Shard
from harness.verdict import Status

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 4
LIMIT_S = 180.0
CASES = ("moe.bf16.t1[67]*", "moe.bf16.t1.*")
PLUGIN = """
import os, time
from dataclasses import replace
from pathlib import Path
from harness.backends.torch_grouped_mm import BACKENDS as B
HOLD = Path(__file__).with_name("hold")
def held(case, inputs):
    while HOLD.exists() and HOLD.read_text() == case.id:
        time.sleep(0.02)
    return B[0].prepare(case, inputs)
def doubled(case, inputs):
    launch = B[0].prepare(case, inputs)
    return replace(launch, call=lambda: 2 * launch.call(), out=None, capture=None, tactics={})
BACKENDS = (replace(B[0], name="held", prepare=held), replace(B[0], name="doubled", prepare=doubled))
"""


@dataclass(frozen=True)
class Night:
    """What is left of it. codes: exit codes of the shards, by index, the killed one's of its resumption; killed: how many
    verdicts the killed one had; merge_code, single_code: of the merge and of the run in one process."""

    plan: Plan
    shards: list[Path]
    codes: list[int]
    killed: int
    merged: Path
    merge_code: int
    single: Path
    single_code: int


def call(*arguments: object) -> int:
    """Exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moecheck", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0)


def start(log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """A command in its own process group."""
    command = [sys.executable, "-c", "from harness.cli import main; main()", *map(str, arguments)]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def lines(folder: Path) -> int:
    path = folder / journal.NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_within(process: subprocess.Popen[bytes], folder: Path, verdicts: int) -> int:
    """kill -9 of a run and all that it started, once it waits in the case after so many verdicts; how many it had."""
    end = time.monotonic() + LIMIT_S
    while lines(folder) < verdicts and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return lines(folder)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    """One shard is held in its last case of the subject `held` until it is killed."""
    base = tmp_path_factory.mktemp("night")
    (base / "plugin.py").write_text(PLUGIN)
    file = base / "plan.json"
    select = [*("--backend", "torch_grouped_mm", "--backend", "held", "--backend", "doubled"), "--plugin", base / "plugin.py"]
    assert call("plan", "--platform", "cpu", *select, *(x for case in CASES for x in ("--case", case)), "-o", file) == 0
    the_plan = plan.load(file)
    parts = [the_plan.share(Shard(index, SHARDS)).items for index in range(1, SHARDS + 1)]
    victim, position = next(
        (s, i) for s, part in enumerate(parts) for i, item in enumerate(part) if i and item.subject == "held"
    )
    (base / "hold").write_text(parts[victim][position].case_id)
    shards = [base / f"shard-{index}" for index in range(1, SHARDS + 1)]
    runs = [("run", "--plan", file, "--shard", f"{i}/{SHARDS}", "--resume", folder) for i, folder in enumerate(shards, start=1)]
    processes = [start(folder.with_suffix(".txt"), *run) for folder, run in zip(shards, runs, strict=True)]
    killed = killed_within(processes[victim], shards[victim], position)
    (base / "hold").unlink()
    codes = [process.wait(LIMIT_S) for process in processes]
    codes[victim] = start(base / "resumed.txt", *runs[victim]).wait(LIMIT_S)
    merge_code = call("merge", *shards, "--out", base / "merged")
    single_code = call("run", "--plan", file, "--out", base / "single")
    return Night(the_plan, shards, codes, killed, base / "merged", merge_code, base / "single", single_code)


def plain(folder: Path) -> dict[Item, dict[str, Any]]:
    """Every verdict without the time it took."""
    return {Item(v.case_id, v.subject): v.to_json() | {"seconds": 0} for v in journal.read(folder)}


def test_every_item_is_judged_in_exactly_one_shard(night: Night) -> None:
    judged = Counter(Item(v.case_id, v.subject) for folder in night.shards for v in journal.read(folder))
    assert judged == Counter(night.plan.items)
    assert all(lines(folder) for folder in night.shards)


def test_the_killed_shard_was_resumed_and_repeated_nothing(night: Night) -> None:
    total = sum(map(lines, night.shards))
    assert 0 < night.killed < total
    assert total == len(night.plan.items)
    infos = [run_info.read(folder) for folder in night.shards]
    assert [info and info.shard for info in infos] == [(index, SHARDS) for index in range(1, SHARDS + 1)]
    assert all(info is not None and info.finished and info.plan == night.plan.digest for info in infos)


def test_exit_codes_say_what_was_found(night: Night) -> None:
    """`doubled` is wrong wherever there is a token; a shard without one of its cases is clean."""
    red = [any(v.status.failed for v in journal.read(folder)) for folder in night.shards]
    assert night.codes == [int(found) for found in red]
    assert (night.merge_code, night.single_code) == (1, 1)


def test_the_merge_equals_a_run_in_one_process_verdict_by_verdict(night: Night) -> None:
    """Everything but the time: reasons, findings, statistics, diagnoses, environments, pictures, rerun lines."""
    assert plain(night.merged) == plain(night.single)
    assert list(plain(night.merged)) == list(night.plan.items)
    assert {v.status for v in journal.read(night.merged)} == {Status.PASSED, Status.WRONG}


def test_what_people_read_of_it_is_the_same(night: Night) -> None:
    for name in ("summary.md", "coverage.json"):
        assert (night.merged / name).read_text() == (night.single / name).read_text()
    suites = [
        xml.parse(folder / "junit.xml").getroot().findall("testsuite/testcase") for folder in (night.merged, night.single)
    ]
    tags = [[(case.get("classname"), case.get("name"), [child.tag for child in case]) for case in suite] for suite in suites]
    assert tags[0] == tags[1]
    pictures = [sorted(path.name for path in (folder / "pictures").iterdir()) for folder in (night.merged, night.single)]
    assert pictures[0] == pictures[1] != []


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """(exit code, JSON) of a command."""
    capsys.readouterr()
    code = call(*arguments, "--json")
    return code, json.loads(capsys.readouterr().out)


def cells(told: dict[str, Any]) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """The executed cells of `moecheck coverage --json`, without when and in which run."""
    names = ("backend", "recipe", "activation_format", "arch")
    return {
        tuple(c[n] for n in names): (c["state"], c["executed"], c["failed"]) for c in told["cells"] if c["state"] == "executed"
    }


def test_report_history_and_coverage_agree_with_one_run(
    night: Night, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, pages = [], []
    for name, folder in (("merged", night.merged), ("single", night.single)):
        assert call("history", "add", folder, "--to", tmp_path / name) == 0
        code, history = asked(capsys, "history", tmp_path / name)
        assert (code, len(history["runs"]), history["regressions"]) == (0, 1, [])
        assert (history["runs"][0]["verdicts"], history["runs"][0]["failed"]) == (len(night.plan.items), red(folder))
        told.append(cells(asked(capsys, "coverage", tmp_path / name, "--platform", "cpu")[1]))
        assert call("report", folder, "-o", tmp_path / f"{name}.html") == 0
        pages.append((tmp_path / f"{name}.html").read_text())
    assert told[0] == told[1] != {}
    assert sum(executed for _, executed, _ in told[0].values()) == len(night.plan.items)
    assert all(item.case_id in page for page in pages for item in night.plan.items)
    assert call("diff", night.single, night.merged) == 0


def red(folder: Path) -> int:
    """How many verdicts failed."""
    return sum(v.status.failed for v in journal.read(folder))
