"""The coverage ledger says what really ran, what was only skipped, what nobody planned, and fails where it was required."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness import config, journal, paths, plan, plan_cache
from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.errors import ConfigError
from harness.history import require, synthetic
from harness.history.ledger import Fact, Promise, State, facts_of, ledger, promises
from harness.history.query import History
from harness.history.rows import Run
from harness.history.synthetic import Night, failed, items, verdicts, write
from harness.matrix import Way
from harness.verdict import Stage, Status, Verdict

NOW = datetime(2026, 2, 1, 3, tzinfo=UTC)
NIGHT = Night(0, {"torch": "2.13.0", "onnxruntime": "1.32.0", "triton": "3.7.1"}, "a" * 40)
RUN = Run("r", "i", NIGHT.started.isoformat(), "run.json", "cpu", "nightly", "p", "", "c")
PLAN = items(14)
KEY = ("b", "bf16", "standard", "cpu")
NEVER_RAN = Fact(*KEY, "", "", "", "", 0, 0, "2026-01-31T03:00:00+00:00", "", "UNAVAILABLE: not here", 3)
RAN = replace(NEVER_RAN, last="2026-01-30T03:00:00+00:00", executed=2, failed=1, reason="", refused=0)
PROMISE = Promise(*KEY, (Way.NATIVE,))


@pytest.mark.parametrize(
    ("facts", "promised", "state", "days"),
    [
        ([RAN], [PROMISE], State.EXECUTED, 2.0),
        ([RAN], [], State.EXECUTED, 2.0),
        ([NEVER_RAN], [PROMISE], State.SKIPPED, None),
        ([], [PROMISE], State.UNPLANNED, None),
        ([], [replace(PROMISE, ways=(Way.CONTRACT,))], State.CONTRACT, None),
    ],
)
def test_a_cell_is_promised_or_seen_or_both(
    facts: list[Fact], promised: list[Promise], state: State, days: float | None
) -> None:
    (cell,) = ledger(facts, promised, NOW)
    assert (cell.state, cell.days, cell.ways) == (state, days, tuple(str(w) for p in promised for w in p.ways))
    assert json.loads(json.dumps(cell.to_json()))["state"] == str(state)


REFUSALS = {
    "another machine": (Status.UNAVAILABLE, Stage.SUPPORT),
    "another case": (Status.UNSUPPORTED, Stage.SUPPORT),
    "a wrong kernel would have passed": (Status.UNTRUSTED, Stage.ORACLE),
    "held back by a contract": (Status.CONTRACT, Stage.LAUNCH),
    "died before the launch": (Status.CRASHED, Stage.PREPARE),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_launched_nothing_is_no_execution(why: str) -> None:
    """Each of them looks like a planned case with a verdict."""
    status, stage = REFUSALS[why]
    found = [replace(failed(v, status, why), stage=stage) for v in verdicts(NIGHT, PLAN)]
    cells = ledger(facts_of(found, RUN), (), NOW)
    assert {cell.state for cell in cells} == {State.SKIPPED}
    assert {cell.reason for cell in cells} == {f"{status}: {why}"}


def test_a_failure_is_an_execution() -> None:
    cells = ledger(facts_of([failed(v) for v in verdicts(NIGHT, PLAN)], RUN), (), NOW)
    assert {(c.state, c.failed == c.executed) for c in cells} == {(State.EXECUTED, True)}


def test_the_commonest_reason_is_named() -> None:
    whys = {0: "rare", 7: "common"}
    found = [failed(v, Status.UNAVAILABLE, whys.get(i, "common")) for i, v in enumerate(verdicts(NIGHT, PLAN * 2))]
    fact = facts_of(found, RUN)[-1]
    assert (fact.reason, fact.executed) == ("UNAVAILABLE: common", 0)
    assert fact.refused in (3, 4)


def test_a_run_and_its_history_say_the_same(tmp_path: Path) -> None:
    """Two ways to the same facts: Python over verdicts, SQL over Parquet."""
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")

    def some(night: Night, right: Verdict) -> Verdict:
        recipe = str(Case.parse(right.case_id).recipe)
        if recipe == "fp16":
            return failed(right, Status.UNAVAILABLE, f"no {right.case_id[9]}")
        return failed(right) if recipe == "bf16" else right

    found = verdicts(NIGHT, PLAN, some)
    write(tmp_path / "r", NIGHT, found)
    with History(str(tmp_path), tmp_path / "cache") as history:
        assert history.facts() == sorted(facts_of(found, RUN), key=lambda fact: fact.key[:4])


def test_every_cell_of_the_matrix_is_promised_once() -> None:
    backends = discover(())
    found = promises([config.platform(name) for name in config.names("platforms")], backends)
    assert {p.arch for p in found} == set(config.names("platforms"))
    assert len({p.key for p in found}) == len(found)
    ops = {backends[p.backend].op for p in found if p.backend in backends}
    assert ops == {backend.op for backend in backends.values()}  # quantisers have recipes of their own under ops:


# ---- what is required

YAML = """days: 7
require:
  - platform: cpu
    backends: [onnxruntime_moe, torch_grouped_mm]
    recipe: [fp32, bf16]
    why: "somebody serves it"
  - platform: cpu
    backends: ["onnx*"]
    days: 40
    why: "somebody may serve it"
"""


def required(tmp_path: Path, text: str = YAML) -> list[require.Missing]:
    (tmp_path / "coverage.yaml").write_text(text)
    backends = discover(())
    promised = promises([config.platform("cpu"), config.platform("sm90")], backends)
    found = [v for v in verdicts(NIGHT, PLAN) if "int4" not in v.case_id]
    wanted = require.load(tmp_path / "coverage.yaml", backends, promised)
    return require.missing(wanted, ledger(facts_of(found, RUN), promised, NOW), promised)


def test_a_required_cell_must_have_run_in_time(tmp_path: Path) -> None:
    """It ran 31 days ago: within 40, not within 7. One never did."""
    found = {(m.cell.backend, m.cell.recipe): m for m in required(tmp_path)}
    assert set(found) == {
        ("onnxruntime_moe", "fp32"),
        ("torch_grouped_mm", "bf16"),
        ("onnxruntime_moe", "int4_channel-fp32"),
    }
    assert "really ran 31.0 days ago, 7 are allowed" in str(found["onnxruntime_moe", "fp32"])
    assert "never planned" in str(found["onnxruntime_moe", "int4_channel-fp32"])
    assert [found[key].entry for key in sorted(found)] == [1, 2, 1]


@pytest.mark.parametrize(
    ("old", "new", "line", "wanted"),
    [
        ("platform: cpu", "platform: cup", 3, "cpu"),
        ("[onnxruntime_moe,", "[onnxruntime_mo,", 4, "onnxruntime_moe"),
        ("[fp32, bf16]", "[fp23]", 5, "fp32"),
        ("[fp32, bf16]", "[fp32, bf16, nvfp4]", 3, "nvfp4 takes none"),
        ('"onnx*"', '"vllm_triton"', 7, "vllm_triton takes none"),  # no platform file promises it on a CPU
        ("days: 40", "days: 0", 9, "greater than 0"),
        ("days: 40", "dais: 40", 9, "days"),
        ("days: 7", "days: .nan", 1, "days = nan"),
        ('    why: "somebody serves it"\n', "", 3, "required"),
    ],
)
def test_a_mistake_in_the_file_is_located(tmp_path: Path, old: str, new: str, line: int, wanted: str) -> None:
    """A misspelt requirement that requires nothing would be green for ever."""
    assert old in YAML
    with pytest.raises(ConfigError, match=rf"coverage.yaml:{line}: .*{wanted}"):
        required(tmp_path, YAML.replace(old, new, 1))


def test_the_example_is_true_of_the_cpu_platform(tmp_path: Path) -> None:
    """All that a run of every promised cell of `cpu` satisfies, and nothing else does."""
    backends = discover(())
    promised = promises([config.platform("cpu")], backends)
    wanted = require.load(config.ROOT / "coverage.yaml", backends, promised)
    facts = [replace(RAN, backend=p.backend, recipe=p.recipe, activation_format=p.activation_format) for p in promised]
    assert not require.missing(wanted, ledger(facts, promised, NOW), promised)
    late = require.missing(wanted, ledger((), promised, NOW), promised)
    assert {(m.cell.backend, m.cell.recipe) for m in late} == {(p.backend, p.recipe) for p in promised}


def test_the_tier_smoke_asks_for_every_cell_of_the_example() -> None:
    """As the example's reasons say: a CPU runner that runs it is green."""
    backends = discover(())
    rows = plan_cache.cached(paths.plans(), print)
    request = plan.Request("cpu", "smoke")
    cases = [(i.subject, Case.parse(i.case_id)) for i in plan.make(request, backends, CPU, rows=rows).items]
    planned = {(subject, str(case.recipe), case.activation_format, "cpu") for subject, case in cases}
    assert {p.key for p in promises([config.platform("cpu")], backends) if p.ways != (Way.CONTRACT,)} <= planned


# ---- the command


def test_the_command_shows_cells_and_fails_for_one_that_is_required(tmp_path: Path, moecheck: Callable[..., Any]) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    write(tmp_path / "runs" / "r", NIGHT, verdicts(NIGHT, PLAN))
    (tmp_path / "coverage.yaml").write_text(YAML)
    wanted = ("coverage", str(tmp_path / "runs"), "--require", str(tmp_path / "coverage.yaml"), "--now")
    soon, late = moecheck(*wanted, "2026-01-02"), moecheck(*wanted, "2026-02-01")
    assert (soon.code, late.code) == (0, 1)
    assert "all required cells ran in time" in soon.out
    assert "REQUIRED onnxruntime_moe fp32 standard on cpu: really ran 30.9 days ago, 7 are allowed" in late.out
    assert "onnxruntime_moe   2-way " in soon.out
    assert "onnxruntime_moe   2-way " not in late.out  # outside the window
    assert "sm120: " in soon.out
    data = json.loads(moecheck(*wanted, "2026-02-01", "--platform", "cpu", "--json").out)
    assert {cell["arch"] for cell in data["cells"]} == {"cpu"}
    assert len(data["missing"]) == 2


def test_history_tells_adds_and_sets_its_exit_code(tmp_path: Path, moecheck: Callable[..., Any]) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    for number in range(2):
        night = replace(NIGHT, number=number, versions={**NIGHT.versions, "torch": f"2.{number}"})
        found = verdicts(night, PLAN, lambda n, v: failed(v) if n.number and v.subject == "torch_grouped_mm" else v)
        write(tmp_path / str(number), night, found)
        answer = moecheck("history", "add", str(tmp_path / str(number)), "--to", str(tmp_path / "all"))
        assert (answer.code, "14 verdicts" in answer.out) == (0, True)
        assert moecheck("history", str(tmp_path / "all")).code == number
    assert "was there already" in moecheck("history", "add", str(tmp_path / "1"), "--to", str(tmp_path / "all")).out
    told = moecheck("history", str(tmp_path / "all"))
    assert "Regressions since the last good run: 2" in told.out
    assert "changed: torch 2.0 -> 2.1" in told.out
    data = json.loads(moecheck("history", str(tmp_path / "all"), "--json").out)
    assert [r["subject"] for r in data["regressions"]] == ["torch_grouped_mm"] * 2
    assert moecheck("history", str(tmp_path / "all"), "--days", "1", "--now", "2026-01-02T12:00").code == 0  # one run only


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("history", "add", "x"), "--to"),
        (("history", "a", "b"), "one DIR or URL"),
        (("history", "NOWHERE"), "no run in it"),
        (("history", "EMPTY"), "no run in it"),
        (("history", "add", "EMPTY", "--to", "EMPTY/all"), "give a folder made by moecheck run"),
        (("coverage", "EMPTY", "--now", "yesterday"), "ISO 8601"),
        (("coverage", "EMPTY", "--platform", "sm09"), "did you mean sm90"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    tmp_path: Path, moecheck: Callable[..., Any], arguments: tuple[str, ...], text: str
) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    answer = moecheck(*(a.replace("EMPTY", str(tmp_path)) for a in arguments))
    assert answer.code == 3
    assert text in answer.err
    assert "Traceback" not in answer.err


def test_without_the_extra_a_sentence_says_what_to_install(
    tmp_path: Path, moecheck: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    answer = moecheck("history", str(tmp_path))
    assert (answer.code, "pip install 'moecheck[history]'" in answer.err) == (3, True)


def test_a_run_that_cannot_be_read_spoils_a_clean_answer(tmp_path: Path, moecheck: Callable[..., Any]) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    write(tmp_path / "runs" / "r", NIGHT, verdicts(NIGHT, PLAN))
    shutil.copytree(tmp_path / "runs" / "r", tmp_path / "runs" / "s")
    (tmp_path / "runs" / "s" / journal.NAME).write_text("nothing\n")
    answer = moecheck("history", str(tmp_path / "runs"))
    assert answer.code == 3
    assert "s/journal.jsonl:1" in answer.err
    assert "1 runs" in answer.out


def test_items_are_different_and_parse() -> None:
    found = items(500)
    assert len(set(found)) == 500
    assert all(Case.parse(item.case_id).id == item.case_id for item in found)
    assert {item.subject for item in found} == set(synthetic.RECIPES)
