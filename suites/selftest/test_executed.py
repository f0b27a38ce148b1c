"""The share of a plan that really ran: what is possible is counted exactly, and a hole in the journal lowers the figure."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from harness import config, plan, run
from harness.backends import discover
from harness.case import LIMITS, Case, Limit
from harness.executed import Joined, Reach, Ways, ran
from harness.report import coverage, markdown
from harness.select import TEMPLATE, Grid, cover
from harness.verdict import Comparison, Stage, Status, Verdict

AXES: dict[str, list[int | str]] = {
    "tokens": [0, 1, 17],
    "experts": [1, 4, 16],
    "top_k": [1, 2, 3],
    "fill": ["exact", "real"],
    "activation": ["swiglu", "swiglu_oai"],
}
GRID = Grid(AXES, LIMITS)
GOOD = Comparison("exact", 64, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, ())


def verdict(case: Case, status: Status = Status.PASSED, stage: Stage = Stage.DONE, subject: str = "b") -> Verdict:
    return Verdict(case.id, subject, status, stage, "" if status is Status.PASSED else "why", comparison=GOOD)


def every_case(grid: Grid) -> list[Case]:
    rows = [dict(zip(grid.axes, values, strict=True)) for values in itertools.product(*grid.axes.values())]
    return [TEMPLATE.vary(**row) for row in rows if grid.allows(row, grid.limits)]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_possible_is_what_some_whole_case_has(strength: int) -> None:
    """Limits within a combination's own axes allow more: 3 experts of 16 leave no exact case, whatever else is chosen."""
    groups = list(itertools.combinations(sorted(AXES), strength))
    wanted = {(g, tuple(case.axes[n] for n in g)) for case in every_case(GRID) for g in groups}
    ways = Reach(GRID).ways(every_case(GRID), strength)
    assert ways.possible == ways.covered == len(wanted)


def test_a_chain_of_limits_is_followed() -> None:
    """tokens 17 wants 16 experts, 16 experts want top_k 3: tokens 17 with top_k 1 is impossible, and no one limit says so."""
    first = Limit(("tokens", "experts"), lambda c: "no" if c.shape.tokens == 17 and c.shape.experts != 16 else None)
    second = Limit(("experts", "top_k"), lambda c: "no" if c.shape.experts == 16 and c.shape.top_k != 3 else None)
    grid = Grid({name: AXES[name] for name in ("tokens", "experts", "top_k")}, (first, second))
    assert Reach(grid).allowed(("tokens", "top_k")).shape == (3, 3)
    assert Reach(grid).ways((), 2).possible == len(
        {(a, b, c.axes[a], c.axes[b]) for c in every_case(grid) for a, b in itertools.combinations(sorted(grid.axes), 2)}
    )
    assert not Reach(grid).allowed(("tokens", "top_k"))[2, 0]


@pytest.mark.parametrize("strength", [2, 3])
def test_a_hole_in_the_journal_lowers_the_figure(strength: int) -> None:
    axes = {**AXES, "tokens": [1, 17]}
    grid = Grid(axes, LIMITS)
    cases = [TEMPLATE.vary(**row) for row in cover(axes, grid.tables(), strength)]
    whole = Reach(grid).ways(cases, strength)
    assert whole.covered == whole.possible
    assert str(whole).endswith("(100 %)")
    hole = [c for c in cases if not (c.shape.tokens == 17 and c.shape.experts == 4)]
    less = Reach(grid).ways(hole, strength)
    assert less.possible == whole.possible
    assert less.covered <= whole.covered - (1 if strength == 2 else 2)
    assert not str(less).endswith("(100 %)")


def test_an_empty_batch_tests_only_what_names_the_tokens() -> None:
    cases = [case for case in every_case(GRID) if case.shape.tokens == 0]
    one = Reach(GRID).ways(cases, 1)
    assert one.covered == 1  # tokens 0, and no value of another axis
    assert one.possible == sum(map(len, AXES.values()))


def test_values_between_the_levels_count_for_nothing() -> None:
    cases = [case.vary(tokens=5) for case in every_case(GRID) if case.shape.tokens]
    assert Reach(GRID).ways(cases, 1).covered == Reach(GRID).ways(every_case(GRID), 1).possible - 3


@pytest.mark.parametrize(
    ("status", "stage", "counts"),
    [
        (Status.PASSED, Stage.DONE, True),
        (Status.WRONG, Stage.COMPARE, True),
        (Status.CRASHED, Stage.LAUNCH, True),
        (Status.HUNG, Stage.LAUNCH, True),
        (Status.CRASHED, Stage.PREPARE, False),
        (Status.CONTRACT, Stage.LAUNCH, False),
        (Status.UNSUPPORTED, Stage.SUPPORT, False),
        (Status.UNAVAILABLE, Stage.SUPPORT, False),
        (Status.UNTRUSTED, Stage.DONE, False),
    ],
)
def test_only_a_kernel_that_ran_counts(status: Status, stage: Stage, counts: bool) -> None:
    assert ran(verdict(TEMPLATE, status, stage)) is counts


def test_a_grid_without_a_choice_is_one_case() -> None:
    reach = Reach(Grid({"tokens": [3], "experts": [4]}, LIMITS))
    assert (reach.ways((), 2), reach.ways((TEMPLATE,), 2)) == (Ways(0, 0, 1), Ways(0, 1, 1))


def test_too_large_a_grid_is_said_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.executed.MAX_CELLS", 10)
    assert str(Reach(GRID).ways(every_case(GRID), 2)) == "2-way not counted"


def test_nearly_all_is_not_written_as_all() -> None:
    assert str(Ways(3, 99999, 100000)) == "3-way 99999 of 100000 (99.9 %)"


def test_a_backend_of_every_axis_is_counted_in_a_second() -> None:
    request = plan.Request("sm100", "nightly")
    grid = plan.grid(request, discover()["triton_moe"])
    assert grid is not None
    began = time.process_time()
    pairs, triples = (Reach(grid).ways((TEMPLATE,), strength) for strength in (2, 3))
    assert time.process_time() - began < 2  # 0.4 s, twice, on a machine that is shared
    assert triples.possible > 10 * pairs.possible > 0


def test_projections_share_their_work() -> None:
    joined = Joined(AXES, sorted(AXES), GRID.tables())
    part = frozenset({"experts", "top_k"})
    assert joined.onto(part) is joined.onto(part)


def test_the_report_of_a_run_tells_executed_not_planned() -> None:
    """The plan holds every pair; a run whose cases of 33 tokens were all refused does not."""
    request = plan.Request("cpu", "smoke", ("torch_grouped_mm",))
    made = plan.make(request, discover(), plan.device_named(config.platform("cpu")))
    cases = [Case.parse(item.case_id) for item in made.items]
    verdicts = [verdict(case, subject="torch_grouped_mm") for case in cases]
    pairs, triples = run._reached(made, verdicts)["torch_grouped_mm"]
    assert pairs.covered == pairs.possible
    assert 0 < triples.covered < triples.possible
    refused = [replace(v, status=Status.UNSUPPORTED, reason="no") if ".t33." in v.case_id else v for v in verdicts]
    fewer, _ = run._reached(made, refused)["torch_grouped_mm"]
    assert fewer.possible == pairs.possible
    assert fewer.covered < pairs.covered


def test_it_reaches_the_summary_and_the_files(tmp_path: object) -> None:
    ways = {"kernel": [Ways(2, 3, 4), Ways(3, 0, 0)]}
    assert "kernel  2-way 3 of 4 (75 %), 3-way not counted" in coverage.text(ways)
    red = replace(verdict(TEMPLATE, Status.WRONG, Stage.COMPARE, "kernel"), reason="a | b <img>\nc")
    path = tmp_path / "summary.md"  # type: ignore[operator]
    markdown.write(path, [red], ways)
    text = path.read_text()
    assert "| kernel | 0 | 1 | 0 | 0 | 2-way 3 of 4 (75 %), 3-way not counted |" in text
    assert red.rerun in text
    assert "<img>" not in text
    coverage.write(tmp_path / "coverage.json", ways)  # type: ignore[operator]
    assert '"covered": 3' in (tmp_path / "coverage.json").read_text()  # type: ignore[operator]
