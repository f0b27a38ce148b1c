"""The planted bugs and their score: well formed, killed, counted right, and named honestly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness import config, plan
from harness.backends.base import CPU
from harness.case import Case
from harness.checks import STATUS
from harness.diagnose import KINDS
from harness.faults.campaign import Campaign, CleanRun
from harness.faults.catalogue import FAULTS
from harness.faults.fault import Fault
from harness.faults.matrix import as_json, called_as, markdown, summary
from harness.faults.score import LONGER, Score, Until, lanes, said, score
from harness.pipeline import Options, OracleCache, run
from harness.select import Item
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict

SEEN = (
    *KINDS,
    *STATUS,
    "exception",
    "death",
    "prepare",
    "output_type",
    "output_shape",
    "output_dtype",
    "output_device",
    "crashed",
    "hung",
)
ON_CPU = [f for f in FAULTS if "cpu" in f.backend.archs]
DEADLY = {"death", "hung"}  # they take their process with them: `moecheck faults` judges them in workers
SAMPLE = [f for f in ON_CPU if not DEADLY & set(f.expect)][::9]
CASES = (
    "moe.bf16.t9.h64.i32.e5.k2.renormalize.swiglu.standard.real.s0",
    "moe.bf16.t9.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0",
)


def test_at_least_ninety_real_bugs_are_planted() -> None:
    assert len({f.bug for f in FAULTS}) >= 90
    assert len(ON_CPU) >= 90
    assert len([f for f in FAULTS if "sm90" in f.backend.archs]) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_says_what_it_is(fault: Fault) -> None:
    assert re.fullmatch(r"B\d{3}_\w+", fault.name)
    assert fault.name.startswith(fault.bug)
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(pull|issues)/\d+", fault.thread)
    assert 20 < len(fault.text) <= 130
    assert fault.expect
    assert set(fault.expect) <= set(SEEN)
    assert fault.clean.recipes == fault.backend.recipes  # it is judged on the clean subject's plan


def test_every_patch_fits_the_kernels_and_compiles() -> None:
    import importlib
    import pkgutil

    from harness.faults import bugs
    from harness.faults.patched import SOURCE

    count = 0
    for info in pkgutil.iter_modules(bugs.__path__):
        for patch in getattr(importlib.import_module(f"{bugs.__name__}.{info.name}"), "PATCHES", ()):
            source = patch.source()
            compile(source, patch.name, "exec")
            assert source != SOURCE.read_text()
            count += 1
    assert count >= 25


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda f: f.name)
def test_a_sample_is_killed_by_the_ci_plan(fault: Fault) -> None:
    """All of them: `moecheck faults`; the page in docs is its output."""
    survivors = re.findall(r"survived: (\w+):", (Path(__file__).parents[2] / "docs" / "faults.md").read_text())
    if fault.name in survivors:
        pytest.skip("a survivor of tier ci, explained in docs/faults.md")
    options = Options(config.tier("ci").checks)
    for item in Campaign("cpu", CPU, "ci").items(fault.clean):
        verdict = run(Case.parse(item.case_id), fault.backend, CPU, options=options)
        if verdict.status.failed and verdict.status is not Status.UNTRUSTED:
            return
    pytest.fail(f"{fault.name} survives tier ci")


def comparison(lane: str, beyond: int = 1) -> Comparison:
    return Comparison(lane, 10, beyond, 9.0, 5.0, 2.0, 1.1, 0.1, 0, 1, ())


def verdict(status: Status, **given: object) -> Verdict:
    return Verdict(CASES[0], "sut", status, Stage.DONE, "because", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "lane", "name"),
    [
        (verdict(Status.WRONG, comparison=comparison("real"), diagnosis=Diagnosis("zeros", "")), {"real"}, "zeros"),
        (verdict(Status.WRONG, comparison=comparison("real", 0)), {"mean z2"}, "wrong"),
        (verdict(Status.CRASHED, findings=(Finding("death", ""),)), {"isolation"}, "death"),
        (verdict(Status.MALFORMED, findings=(Finding("output_type", ""),)), {"contract"}, "output_type"),
        (verdict(Status.UNSTABLE, findings=(Finding("poison", ""),)), {"memory"}, "poison"),
        (verdict(Status.UNSTABLE, findings=(Finding("graph", ""),)), {"state"}, "graph"),
        (verdict(Status.WRONG, findings=(Finding("zero_rows", ""),)), {"relation"}, "zero_rows"),
        (verdict(Status.UNAVAILABLE), set(), "unavailable"),
    ],
)
def test_lanes_and_names_of_a_verdict(given: Verdict, lane: set[str], name: str) -> None:
    assert lanes(given) == lane
    assert said(given) == name


def scored(*kinds: str) -> Score:
    result = Score(replace(FAULTS[0], expect=("zeros", "stale")))
    for kind in kinds:
        result.add(verdict(Status.WRONG, comparison=comparison("real"), diagnosis=Diagnosis(kind, "")))
    return result


def test_a_name_counts_only_if_it_is_true_of_the_fault() -> None:
    assert scored("zeros", "stale", "unexplained").named
    assert not scored("zeros", "unexplained", "unexplained").named
    assert not scored("unexplained").named
    lying = scored("zeros", "zeros", "gate_up_swap")
    assert not lying.named
    assert lying.lies == {"gate_up_swap": CASES[0]}
    assert called_as(scored("gate_up_swap")) == "gate_up_swap (wrong)"
    assert scored("non_finite").lies == {}  # read off the output: true whatever the bug


def test_untrusted_and_skipped_verdicts_kill_nothing() -> None:
    result = Score(FAULTS[0])
    result.add(verdict(Status.UNTRUSTED))
    result.add(verdict(Status.UNSUPPORTED))
    assert (result.verdicts, result.kills) == (0, 0)


@pytest.mark.parametrize(("expect", "deaths", "kills", "strays"), [("zeros", 1, 0, 1), ("zeros", 9, 1, 0), ("death", 1, 1, 0)])
def test_a_death_that_the_fault_does_not_explain_must_come_twice(expect: str, deaths: int, kills: int, strays: int) -> None:
    """A full machine killed workers now and then, and each counted as a kill."""
    died = verdict(Status.CRASHED, findings=(Finding("death", ""),))
    passed = verdict(Status.PASSED, comparison=replace(comparison("real", beyond=0), mean_z2=1.0))
    answers = iter([died] * deaths + [passed] * 9)
    result = score(replace(FAULTS[0], expect=(expect,)), [Item(CASES[0], "sut")], lambda *_: next(answers))
    assert (result.kills, len(result.strays)) == (kills, strays)


def test_a_score_stops_when_both_fills_have_spoken() -> None:
    asked: list[str] = []

    def judge(case_id: str, subject: str) -> Verdict:
        asked.append(case_id)
        return replace(verdict(Status.WRONG, comparison=comparison("real")), case_id=case_id)

    items = [Item(case, "sut") for _ in range(9) for case in CASES]
    assert score(FAULTS[0], items, judge).kills == 6
    assert score(FAULTS[0], items, judge, Until.END).kills == 18
    assert score(FAULTS[0], items, judge, Until.FIRST).kills == 1


def test_a_score_stops_long_after_a_fault_that_one_relation_shows() -> None:
    """It would otherwise be judged to the end of every plan, and say nothing new."""
    agreeing = replace(comparison("real", beyond=0), mean_z2=1.0)
    verdicts = [verdict(Status.PASSED, comparison=agreeing) for _ in range(3)]
    verdicts += [verdict(Status.WRONG, comparison=comparison("real"))]
    verdicts += [verdicts[0] for _ in range(2 * LONGER)]
    given = iter(verdicts)
    items = [Item(CASES[0], "sut") for _ in verdicts]
    assert score(FAULTS[0], items, lambda case_id, subject: next(given)).verdicts == 4 + LONGER


def test_clean_twins_pass_where_faults_die() -> None:
    """The same cases, the same checks: an alarm here would make every kill worthless."""
    cache: dict[str, OracleCache] = {}
    for clean in {f.clean.name: f.clean for f in ON_CPU}.values():
        request = plan.Request("cpu", "smoke")
        for item in plan.make(request, {clean.name: clean}, CPU).items[::12]:
            case = Case.parse(item.case_id)
            found = run(case, clean, CPU, cache=cache.setdefault(case.id, OracleCache()), options=Options(2))
            assert found.status is Status.PASSED, found.reason


def test_the_report_adds_up() -> None:
    scores = [scored("zeros"), Score(FAULTS[1])]
    runs = [CleanRun("twin", (verdict(Status.UNTRUSTED),))]
    data = as_json(scores, runs)
    assert (data["planted"], data["killed"], data["clean_alarms"], data["clean_verdicts"]) == (2, 1, 1, 1)
    text = "\n".join(summary(scores, runs))
    assert "1 of 2 planted faults killed (50.0%)" in text
    assert f"survived: {FAULTS[1].name}" in text
    assert "1 verdicts, 1 alarms" in text
    assert FAULTS[0].thread in markdown(scores, runs, "moecheck faults")
    json.dumps(data)
