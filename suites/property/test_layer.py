"""Drawn cases: the sizes, seeds and combinations between the planned ones. A failure arrives shrunk, a crash too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import Phase, assume, given, settings, target
from hypothesis import strategies as st

from harness import config, plan
from harness.backends import discover
from harness.case import Case
from harness.isolated import Isolated
from harness.known import Outcome, mark, of_any_size, outcome
from harness.plugin import planned, session_of
from harness.report.text import explain
from harness.space import SIZES
from harness.steady import Steady
from harness.strategies import cases
from harness.verdict import Status, Verdict

DERANDOMIZED = 2  # cases of a subject where they are always the same ones: the plainest and another; 20 s for 15 subjects
EXAMPLES = DERANDOMIZED if settings.default.derandomize else settings.default.max_examples
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)  # it repeats the failure for each part of the case
RERUNS = 2  # a defect that shows once in three runs shows three times in a row once in 27


class Subject:
    """What is drawn of a backend's recipe, and its judge. No dataclass: Hypothesis prints all there is in one."""

    def __init__(self, drawn: st.SearchStrategy[Case], steady: Steady) -> None:
        self.cases, self.steady = drawn, steady

    def flaky(self, verdict: Verdict) -> bool:
        """Did this case fail once and then not, or not so?"""
        return any(verdict.case_id == other.case_id for other in self.steady.flaky)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per backend and recipe."""
    if "subject" in metafunc.fixturenames:
        items = [(item.subject, Case.parse(item.case_id)) for item in planned(metafunc.config)]
        pairs = sorted({(subject, str(case.recipe)) for subject, case in items if case.op == "moe"})
        metafunc.parametrize("subject", pairs, ids=[f"{name}:{recipe}" for name, recipe in pairs], indirect=True)


@pytest.fixture(scope="session")
def worker(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    """One child after another, for all subjects: the kernel libraries take seconds to import."""
    session = session_of(pytestconfig)
    plugins, limit_s = session.plan.request.plugins, session.plan.limit_s
    with Isolated(session.device, plugins, tmp_path_factory.mktemp("log"), limit_s) as isolated:
        isolated.checks = session.plan.checks
        yield isolated


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, worker: Isolated) -> Iterator[Subject]:
    """Skips what cannot run here. Hypothesis shrinks only what fails every time; the rest fails the test in the end."""
    name, recipe = request.param
    session = session_of(request.config)
    if not (support := session.probe(name)).ok:
        pytest.skip(support.reason)
    asked = session.plan.request
    axes = plan.platform_axes(config.platform(asked.platform), config.tier(asked.tier), name)
    drawn = cases(axes, discover(asked.plugins)[name], session.device, recipe)
    if drawn is None:
        pytest.skip("nothing to draw: the plan has no case of these levels")
    issues = of_any_size(config.known_issues(), SIZES)  # an entry lists the plan's sizes, which these are not

    def warm(case: Case) -> Verdict:
        return mark(worker.warm(case, name), issues)

    steady = Steady(warm, partial(worker.fresh, subject=name), RERUNS)
    yield Subject(drawn, steady)
    assert not steady.flaky, "\n".join(f"{v.case_id} {v.reason}; {v.rerun}" for v in steady.flaky)


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(data=st.data())
def test_layer_agrees_with_the_reference_on_drawn_cases(subject: Subject, data: st.DataObject) -> None:
    """A plan of levels never asks for 17 of 23 experts; a kernel that is wrong from a size on is right at every level."""
    verdict = subject.steady(data.draw(subject.cases))
    assume(verdict.status is not Status.UNTRUSTED)  # the harness's own limit; a kernel was not even called
    comparison = verdict.comparison
    if verdict.status is Status.PASSED and comparison is not None and comparison.limit:
        target(comparison.worst / comparison.limit)
    assert subject.flaky(verdict) or outcome(verdict) is not Outcome.RED, explain(verdict)
