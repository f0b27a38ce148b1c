"""A known issue excuses one failure and nothing else, and says so when that failure is gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import config, plan
from harness.backends import discover
from harness.case import Case
from harness.known import KnownIssue, Outcome, mark, outcome
from harness.verdict import Comparison, Stage, Status, Verdict

AGREES = Comparison("real", 64, 0, 1.0, 5.0, 1.0, 2.0, 0.0, 0, 0, ())
CASE = "moe.bf16.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
ISSUE = KnownIssue(
    "wrong-dot", "https://example.org/1", "ours", "cpu", {"recipe": ("bf16", "nvfp4"), "tokens": (1, 2)}, Status.WRONG, "zeros:"
)
FAILS = Verdict(CASE, "ours", Status.WRONG, Stage.DONE, "zeros: all of them", environment={"arch": "cpu"})
PASSES = Verdict(CASE, "ours", Status.PASSED, Stage.DONE, comparison=AGREES, environment={"arch": "cpu"})
SKIPS = (Status.UNSUPPORTED, Status.UNAVAILABLE)


def judged(verdict: Verdict) -> Outcome:
    return outcome(mark(verdict, [ISSUE]))


def test_the_described_failure_is_known() -> None:
    assert mark(FAILS, [ISSUE]).known == ISSUE.id
    assert judged(FAILS) is Outcome.KNOWN


def test_a_case_that_passes_now_is_gone() -> None:
    """xfail without strict: the entry would stay for ever and excuse the next bug."""
    assert judged(PASSES) is Outcome.GONE


@pytest.mark.parametrize("status", [s for s in Status if s.failed and s is not Status.WRONG])
def test_another_status_is_red(status: Status) -> None:
    assert judged(replace(FAILS, status=status)) is Outcome.RED


def test_another_text_is_red() -> None:
    """An issue that excuses every WRONG of its cases would hide a second bug behind the first."""
    assert judged(replace(FAILS, reason="gate_up_swap: exchanged")) is Outcome.RED


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "theirs"},
        {"environment": {"arch": "sm90"}},
        {"case_id": CASE.replace("bf16", "fp16")},
        {"case_id": CASE.replace(".t2.", ".t3.")},
        {"case_id": CASE.replace(".t2.", ".t12.")},
    ],
)
@pytest.mark.parametrize(("before", "as_before"), [(FAILS, Outcome.RED), (PASSES, Outcome.GREEN)])
def test_what_it_does_not_name_is_untouched(before: Verdict, as_before: Outcome, change: dict[str, str]) -> None:
    """Every axis has to match: any of them would excuse other recipes."""
    assert judged(replace(before, **change)) is as_before


def test_every_listed_value_matches() -> None:
    assert judged(replace(FAILS, case_id=CASE.replace("bf16", "nvfp4").replace(".t2.", ".t1."))) is Outcome.KNOWN


@pytest.mark.parametrize("status", SKIPS)
def test_a_skip_says_nothing(status: Status) -> None:
    """A library that is not here has neither the bug nor the fix."""
    skipped = mark(replace(FAILS, status=status), [ISSUE])
    assert (skipped.known, outcome(skipped)) == ("", Outcome.SKIPPED)


def test_the_issue_that_excuses_is_named_among_several() -> None:
    other = replace(ISSUE, id="other", text="nan:")
    assert mark(FAILS, [other, ISSUE]).known == ISSUE.id


@pytest.mark.parametrize("issue", config.known_issues(), ids=lambda issue: issue.id)
def test_every_entry_speaks_of_a_planned_case(issue: KnownIssue) -> None:
    """A misspelt axis, value, backend or arch excuses nothing and is never gone: nobody would notice the entry."""
    platform = config.platform(issue.arch)
    backends = discover()
    request = plan.Request(platform.name, "smoke", (issue.backend,))
    axes = [Case.parse(item.case_id).axes for item in plan.make(request, backends, plan.device_named(platform)).items]
    for name, values in issue.match.items():
        assert set(values) & {a[name] for a in axes}, f"{issue.id}: no planned case has {name} in {values}"
    assert any(all(a[name] in values for name, values in issue.match.items()) for a in axes)
