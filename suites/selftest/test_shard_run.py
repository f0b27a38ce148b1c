"""moecheck run --plan, --shard and --fail-fast: whose folder it is, what is refused, what an interrupted one leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree as xml

import pytest

from harness import journal, plan, run_info
from harness.verdict import Status

CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0"
SELECT = ("--platform", "cpu", "-b", "torch_grouped_mm", *(x for t in (1, 2) for x in ("-c", CASE.format(t))))
DOUBLED = """
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as B
def doubled(case, inputs):
    launch = B[0].prepare(case, inputs)
    return replace(launch, call=lambda: 2 * launch.call(), out=None, capture=None, tactics={})
BACKENDS = (replace(B[0], name="doubled", prepare=doubled),)
"""


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def planned(moecheck: Call, tmp_path: Path) -> Path:
    """A plan of two cases."""
    file = tmp_path / "plan.json"
    assert moecheck("plan", *SELECT, "-o", str(file)).code == 0
    return file


def test_an_empty_shard_is_clean_and_says_so(moecheck: Call, planned: Path, tmp_path: Path) -> None:
    """More jobs than cases is no fault of anybody's; a red job would be looked at every night."""
    out = tmp_path / "out"
    answer = moecheck("run", "--plan", str(planned), "--shard", "3/3", "--out", str(out))
    assert answer.code == 0, answer.err
    assert "shard 3/3 is empty: the plan has 2 items" in answer.out
    info = run_info.read(out)
    assert info is not None
    assert (info.shard, bool(info.finished)) == ((3, 3), True)
    rest = moecheck("merge", str(out), "--out", str(tmp_path / "all"))
    assert (rest.code, "of shard 1/3" in rest.err, "of shard 3/3" in rest.err) == (2, True, False)


def test_a_folder_belongs_to_one_shard_of_one_plan(moecheck: Call, planned: Path, tmp_path: Path) -> None:
    """A job that is started twice would mix two shards, or call half a shard a whole one."""
    out = str(tmp_path / "out")
    shard = ("run", "--plan", str(planned), "--shard")
    assert moecheck(*shard, "3/3", "--out", out).code == 0
    for arguments, hint in (
        ((*shard, "3/3", "--out", out), f"continue it with --resume {out}"),
        ((*shard, "2/3", "--resume", out), "it holds shard 3/3, not shard 2/3"),
        (("run", "--plan", str(planned), "--resume", out), "it holds shard 3/3, not the whole plan"),
        ((*shard, "3/3", "--resume", out, "--out", out), "one folder is wanted"),
    ):
        answer = moecheck(*arguments)
        assert (answer.code, hint in answer.err) == (3, True), answer.err
    other = tmp_path / "other.json"
    moecheck("plan", *SELECT[:-2], "-o", str(other))
    stranger = moecheck("run", "--plan", str(other), "--shard", "3/3", "--resume", out)
    assert (stranger.code, f"not {plan.load(other).digest}" in stranger.err) == (3, True), stranger.err
    assert moecheck(*shard, "3/3", "--resume", out).code == 0


def test_a_run_that_was_killed_before_its_plan_was_written_begins_again(moecheck: Call, planned: Path, tmp_path: Path) -> None:
    """run.json comes first: with the plan alone, what resumes it would take the shard for the whole."""
    (tmp_path / "out").mkdir()
    run_info.write(tmp_path / "out", run_info.RunInfo(run_info.now(), "cpu", "smoke", "x", shard=(1, 9)))
    answer = moecheck("run", "--plan", str(planned), "--shard", "3/3", "--resume", str(tmp_path / "out"))
    assert answer.code == 0, answer.err
    assert run_info.read(tmp_path / "out").shard == (3, 3)  # type: ignore[union-attr]


def test_a_shard_that_cannot_be_names_the_file_that_says_it(moecheck: Call, planned: Path, tmp_path: Path) -> None:
    assert moecheck("run", "--plan", str(planned), "--shard", "3/3", "--out", str(tmp_path / "out")).code == 0
    file = tmp_path / "out" / run_info.NAME
    file.write_text(file.read_text().replace("3,\n  3", "5,\n  2"))
    answer = moecheck("run", "--resume", str(tmp_path / "out"))
    assert (answer.code, f"{file}: shard 5/2: wanted I/N" in answer.err) == (3, True), answer.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--plan", "PLAN", "--tier", "ci"), "--plan is a selection already"),
        (("--plan", "PLAN", "--shard", "4/3"), "wanted I/N"),
        (("--plan", "PLAN", "--shard", "half"), "does not parse"),
        (("--plan", "nowhere.json"), "not a moecheck plan"),
        (("--resume", "nowhere", "--shard", "1/2"), "it takes no other selection"),
        (("--platform", "cpu", "--tier", "nightly", "-c", CASE.format(1), "--fail-fast"), "tier nightly is there to judge all"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_folder_is_made(
    moecheck: Call, planned: Path, tmp_path: Path, arguments: tuple[str, ...], hint: str
) -> None:
    out = () if "--resume" in arguments else ("--out", str(tmp_path / "out"))
    answer = moecheck("run", *(str(planned) if x == "PLAN" else x for x in arguments), *out)
    assert (answer.code, hint in answer.err) == (3, True), answer.err
    assert not (tmp_path / "out").exists()


def test_fail_fast_stops_at_the_first_failure_and_leaves_the_rest_missing(moecheck: Call, tmp_path: Path) -> None:
    """Exit code 1, not 2: what is missing was left out on purpose, and the kernel failed."""
    (tmp_path / "doubled.py").write_text(DOUBLED)
    cases = [x for tokens in (1, 2, 3, 4) for x in ("-c", CASE.format(tokens))]
    select = ("--platform", "cpu", "--plugin", str(tmp_path / "doubled.py"), "-b", "doubled", *cases)
    out = str(tmp_path / "out")
    answer = moecheck("run", *select, "--fail-fast", "--out", out)
    assert answer.code == 1, answer.err
    assert "stopped at the first failure (--fail-fast): 3 of 4 cases have no verdict" in answer.out
    assert [v.status for v in journal.read(Path(out))] == [Status.WRONG]
    tags = [child.tag for case in xml.parse(Path(out) / "junit.xml").getroot().iter("testcase") for child in case]
    assert sorted(tags) == ["error", "error", "error", "failure"]
    assert moecheck("run", "--resume", out, "--fail-fast").code == 1
    assert len(journal.read(Path(out))) == 1, "it has failed already"
    assert moecheck("run", "--resume", out).code == 1
    assert len(journal.read(Path(out))) == 4
