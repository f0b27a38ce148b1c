"""A failing case becomes a small one that fails in the same way: by our search, and by Hypothesis; through deaths too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import find, settings

from harness import cli, config, plan
from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.isolated import Isolated
from harness.shrink import Search
from harness.space import below
from harness.steady import FAILURES, PASSES, Steady, confirm, signature
from harness.strategies import cases
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict

GROUPED = discover()["torch_grouped_mm"]
BIG = Case.parse("moe.bf16.t33.h256.i128.e48.k8.deepseek_v3.swiglu.standard.real.hot.s7")
MEDIUM = Case.parse("moe.bf16.t18.h16.i16.e5.k2.default.swiglu.standard.real.s3")
SMALL = Case.parse("moe.bf16.t19.h16.i8.e2.k1.renormalize.silu.standard.exact.s0")
CRASH = Finding("death", "killed by SIGSEGV during launch", {"exit_code": -11})


def told(case: Case, status: Status, *findings: Finding, kind: str = "", stage: Stage = Stage.LAUNCH) -> Verdict:
    """A verdict, made up."""
    diagnosis = Diagnosis(kind, "") if kind else None
    reason = findings[0].text if findings else "made up"
    agreed = Comparison("exact", 1, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, ()) if status is Status.PASSED else None
    return Verdict(case.id, "made_up", status, stage, reason, findings, agreed, diagnosis)


def dying(trigger: Callable[[Case], bool]) -> Callable[[Case], Verdict]:
    return lambda case: told(case, Status.CRASHED, CRASH) if trigger(case) else told(case, Status.PASSED)


def planted(case: Case) -> bool:
    return case.shape.experts % 32 != 0 and case.shape.tokens >= 17


def shrunk(trigger: Callable[[Case], bool], case: Case = BIG) -> tuple[Case, Search]:
    judge = dying(trigger)
    search = Search(judge, below(case, GROUPED), signature(judge(case)))
    return search.shrink(case), search


@pytest.mark.parametrize(
    ("trigger", "wanted"),
    [
        (planted, "moe.bf16.t17.h8.i8.e1.k1.renormalize.silu.standard.exact.s0"),
        (lambda c: c.shape.hidden > 100, "moe.bf16.t1.h104.i8.e1.k1.renormalize.silu.standard.exact.s0"),
        (lambda c: c.shape.experts % 8 == 0, "moe.bf16.t1.h8.i8.e8.k1.renormalize.silu.standard.exact.s0"),
        (lambda c: c.shape.tokens * c.shape.top_k >= 33, "moe.bf16.t5.h8.i8.e7.k7.renormalize.silu.standard.real.s0"),
        (lambda c: c.activation == "swiglu", "moe.bf16.t1.h8.i8.e1.k1.renormalize.swiglu.standard.exact.s0"),
        (lambda c: c.routing == "deepseek_v3", "moe.bf16.t1.h8.i8.e16.k1.deepseek_v3.silu.standard.exact.s0"),
        (lambda c: c.fill == "real", "moe.bf16.t1.h8.i8.e1.k1.renormalize.silu.standard.real.s0"),
        (lambda c: c.seed == 7, "moe.bf16.t1.h8.i8.e1.k1.renormalize.silu.standard.exact.s7"),
        (lambda c: c == BIG, BIG.id),
    ],
)
def test_a_failing_case_shrinks_to_the_smallest(trigger: Callable[[Case], bool], wanted: str) -> None:
    smallest, search = shrunk(trigger)
    assert smallest.id == wanted
    assert trigger(smallest)
    assert search.runs <= 100


def test_sizes_that_must_be_equal_shrink_together() -> None:
    """One axis at a time is stuck at once."""
    case = BIG.vary(hidden=128, inter=128, experts=8, top_k=8, routing="renormalize")
    smallest, _ = shrunk(lambda c: c.shape.hidden == c.shape.inter and c.shape.experts == c.shape.top_k, case)
    assert smallest.id == "moe.bf16.t1.h8.i8.e1.k1.renormalize.silu.standard.exact.s0"


@pytest.mark.parametrize("axis", ["tokens", "hidden", "inter", "experts", "top_k"])
def test_no_axis_of_the_answer_can_be_one_step_lower(axis: str) -> None:
    def trigger(case: Case) -> bool:
        shape = case.shape
        return shape.tokens > 5 and shape.hidden > 30 and shape.inter > 11 and shape.experts > 9 and shape.top_k > 2

    smallest, search = shrunk(trigger)
    lower = search.space.choices(smallest, axis)
    assert not any(trigger(smallest.vary(**{axis: v})) for v in lower[: lower.index(smallest.axes[axis])])


def test_a_large_production_case_takes_few_runs() -> None:
    """Halving from above would judge the largest cases first; the doubling looks at the small ones."""
    case = Case.parse("moe.bf16.t1024.h2048.i1024.e256.k8.deepseek_v3.swiglu.standard.real.s0")
    seen: list[Case] = []

    def trigger(case: Case) -> bool:
        seen.append(case)
        return case.shape.tokens >= 17 and case.shape.hidden >= 1000

    smallest, search = shrunk(trigger, case)
    assert (smallest.shape.tokens, smallest.shape.hidden) == (17, 1000)
    assert search.runs <= 80
    assert (seen[1].shape.hidden, seen[1].shape.inter) == (8, 8)


def test_another_failure_is_not_followed() -> None:
    """Smaller cases die of an exception: whoever only asks for a failure ends there."""

    def judge(case: Case) -> Verdict:
        if case.shape.tokens >= 17:
            return told(case, Status.CRASHED, CRASH)
        return told(case, Status.CRASHED, Finding("exception", "RuntimeError: too few", {"type": "RuntimeError"}))

    search = Search(judge, below(BIG, GROUPED), signature(judge(BIG)))
    assert search.shrink(BIG).shape.tokens == 17


def test_a_search_that_is_cut_short_keeps_what_it_has() -> None:
    found: list[Case] = []
    search = Search(dying(planted), below(BIG, GROUPED), "CRASHED SIGSEGV", lambda: search.runs < 9, found.append)
    smallest = search.shrink(BIG)
    assert search.spent
    assert search.runs == 9
    assert planted(smallest)
    assert smallest == found[-1] != BIG
    assert not shrunk(planted)[1].spent


@pytest.mark.parametrize(
    ("made_up", "wanted"),
    [
        (told(BIG, Status.CRASHED, CRASH), "CRASHED SIGSEGV"),
        (told(BIG, Status.CRASHED, Finding("death", "", {"exit_code": 7})), "CRASHED exit code 7"),
        (told(BIG, Status.CRASHED, Finding("exception", "ValueError: 33 at 0xfe1", {})), "CRASHED ValueError: # at #"),
        (told(BIG, Status.HUNG, Finding("death", "", {"exit_code": None})), "HUNG during launch"),
        (told(BIG, Status.WRONG, kind="zeros"), "WRONG zeros"),
        (told(BIG, Status.WRONG, Finding("permuted", ""), kind="zeros"), "WRONG permuted"),
        (told(BIG, Status.UNTRUSTED), "UNTRUSTED"),
    ],
)
def test_a_signature_names_the_defect_not_the_case(made_up: Verdict, wanted: str) -> None:
    assert signature(made_up) == wanted
    assert signature(replace(made_up, case_id=SMALL.id)) == wanted


def turns(*statuses: Status) -> Callable[[Case], Verdict]:
    """A judge that says these in turn, the last one for ever."""
    left = list(statuses)
    return lambda case: told(case, left.pop(0) if len(left) > 1 else left[0])


@pytest.mark.parametrize(
    ("statuses", "runs", "steady"),
    [
        ((Status.WRONG,), FAILURES, True),
        ((Status.WRONG, Status.WRONG, Status.HUNG), PASSES, False),
        ((Status.WRONG, Status.WRONG, Status.WRONG, Status.CRASHED), PASSES, False),
        ((Status.PASSED,), PASSES, True),
        ((Status.PASSED, Status.PASSED, Status.WRONG), PASSES, False),
        ((Status.UNSUPPORTED,), 1, True),
    ],
)
def test_a_failure_is_confirmed_before_it_is_believed(statuses: tuple[Status, ...], runs: int, steady: bool) -> None:
    answers = confirm(BIG, turns(*statuses))
    assert len(answers.verdicts) == runs
    assert answers.steady is steady


def test_the_share_of_a_flaky_failure_is_told() -> None:
    answers = confirm(BIG, turns(Status.HUNG, Status.HUNG, Status.WRONG))
    assert answers.text == "HUNG during launch in 2 of 12 fresh runs, WRONG in 10 of 12"
    assert len(confirm(BIG, turns(Status.HUNG), lambda: False).verdicts) == 1


def test_a_verdict_never_changes_its_mind() -> None:
    """Hypothesis calls a test that fails and then passes flaky, and shrinks nothing."""
    steady = Steady(turns(Status.WRONG, Status.PASSED), turns(Status.PASSED), 2)
    first = steady(BIG)
    assert first.status is Status.UNSTABLE
    assert first.reason == "failed as WRONG, then PASSED in 2 of 2 fresh runs"
    assert steady(BIG) is first
    assert steady.flaky == [first]


def test_a_failure_that_comes_again_stays_what_it_is() -> None:
    steady = Steady(turns(Status.WRONG), turns(Status.WRONG), 2)
    assert steady(BIG).status is Status.WRONG
    assert not steady.flaky


PLUGIN = """
import ctypes, time
from dataclasses import replace
from pathlib import Path
from harness.backends.torch_grouped_mm import BACKENDS as ORIGINAL
RUNS = Path({folder!r}) / "runs"
COUNTED = []
def crash(): ctypes.string_at(0)
def hang(): time.sleep(600)
def every_third():
    if not COUNTED:
        RUNS.write_text(RUNS.read_text() + "x" if RUNS.exists() else "x")
        COUNTED.append(len(RUNS.read_text()))
    if COUNTED[0] % 3 == 0: crash()
def planted(name, die):
    def prepare(case, inputs):
        if case.shape.experts % 32 != 0 and case.shape.tokens >= 17: die()
        return ORIGINAL[0].prepare(case, inputs)
    return replace(ORIGINAL[0], name=name, prepare=prepare)
BACKENDS = (planted("crashing", crash), planted("hanging", hang), planted("flaky", every_third))
"""
PLAINEST = "moe.bf16.t17.h8.i8.e1.k1.renormalize.silu.standard.exact.s0"


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    file = tmp_path / "planted.py"
    file.write_text(PLUGIN.format(folder=str(tmp_path)))
    return str(file)


@pytest.fixture
def moecheck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """`moecheck shrink` in this process: its exit code and what it printed."""

    def call(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["moecheck", "shrink", *arguments, "--platform", "cpu"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, "".join(capsys.readouterr())

    return call


def test_a_crash_is_shrunk_through_crashes(moecheck: Callable[..., tuple[object, str]], plugin: str) -> None:
    code, text = moecheck(MEDIUM.id, "-b", "crashing", "--plugin", plugin)
    assert code == 1
    assert "CRASHED SIGSEGV in 4 of 4 fresh runs; shrinking" in text
    assert f"the smallest found: {PLAINEST}" in text
    assert f"rerun: moecheck repro {PLAINEST} --backend crashing --plugin {plugin} --platform cpu" in text
    steps = [line.split()[-1] for line in text.splitlines() if line.endswith((".s3", ".s0")) and "smallest" not in line]
    assert len(steps) >= 5
    assert all(planted(Case.parse(step)) for step in steps)


def test_a_budget_that_is_spent_is_told(moecheck: Callable[..., tuple[object, str]], plugin: str) -> None:
    code, text = moecheck(MEDIUM.id, "-b", "crashing", "--plugin", plugin, "--runs", "6")
    assert code == 1
    assert "the smallest found before time or runs were spent: " in text


def test_a_hang_is_shrunk_through_hangs(plugin: str, tmp_path: Path) -> None:
    with Isolated(CPU, (plugin,), tmp_path, limit_s=60) as workers:
        assert workers.judge(SMALL.vary(tokens=1), "hanging").status is Status.PASSED  # starts the fork server unhurried
    case = Case.parse(PLAINEST.replace(".t17.", ".t18."))
    with Isolated(CPU, (plugin,), tmp_path, limit_s=1) as workers:
        search = Search(partial(workers.judge, subject="hanging"), below(case, GROUPED), "HUNG during prepare")
        assert search.shrink(case).id == PLAINEST


def test_a_flaky_crash_is_called_flaky(moecheck: Callable[..., tuple[object, str]], plugin: str) -> None:
    """Shrinking on chance would end at some case that mostly passes."""
    code, text = moecheck(SMALL.id, "-b", "flaky", "--plugin", plugin)
    assert code == 1
    assert "FLAKY: the case does not fail every time: CRASHED SIGSEGV in 4 of 12 fresh runs, PASSED in 8 of 12" in text
    assert "smallest" not in text


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((SMALL.id, "-b", "torch_grouped_mm"), "passes here; nothing to shrink (PASSED in 12 of 12 fresh runs)"),
        ((SMALL.vary(hidden=9).id, "-b", "torch_grouped_mm"), "does not take"),
        ((SMALL.id, "-b", "torch_groupd_mm"), "did you mean torch_grouped_mm"),
        (("moe.bf16", "-b", "torch_grouped_mm"), "does not parse"),
    ],
)
def test_what_cannot_be_shrunk_is_said(
    moecheck: Callable[..., tuple[object, str]], arguments: tuple[str, ...], hint: str
) -> None:
    code, text = moecheck(*arguments)
    assert code == 3
    assert hint in text


def test_hypothesis_shrinks_through_crashes(plugin: str, tmp_path: Path) -> None:
    """The property suite's own means: drawn cases, one verdict each, failures judged again in fresh children."""
    levels = plan.platform_axes(config.platform("cpu"), config.tier("smoke"), "torch_grouped_mm")
    small = {**levels, "hidden": [16], "inter": [16], "experts": [1, 33], "routing": ["renormalize"], "skew": ["uniform"]}
    strategy = cases(small, GROUPED, CPU, "bf16")
    assert strategy is not None
    quiet = settings(max_examples=200, database=None, derandomize=True, deadline=None)
    with Isolated(CPU, (plugin,), tmp_path, limit_s=60) as workers:
        workers.checks = 0
        steady = Steady(partial(workers.warm, subject="crashing"), partial(workers.fresh, subject="crashing"), 1)
        smallest = find(strategy, lambda case: steady(case).status is Status.CRASHED, settings=quiet)
    assert smallest.id == PLAINEST
    assert not steady.flaky
