"""Plans cover what they promise, and nothing that cannot exist."""

from __future__ import annotations

import pytest

from harness import config, plan
from harness.backends import discover
from harness.backends.base import Device
from harness.case import LIMITS, Case, Limit
from harness.errors import CaseError, SelectionError, UnknownName
from harness.executed import Reach
from harness.paths import plans
from harness.plan import Request, device_named, platform_axes
from harness.plan_cache import cached
from harness.select import TEMPLATE, Grid, cover, plan_backend

KEPT = cached(plans(), print)
AXES: dict[str, list[int | str]] = {
    "tokens": [0, 1, 17],
    "experts": [1, 4, 16],
    "top_k": [1, 2, 3],
    "fill": ["exact", "real"],
    "activation": ["swiglu", "swiglu_oai"],
}


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_allowed_combination_is_covered(strength: int) -> None:
    """allpairspy reaches 98 % of the valid pairs under constraints and 61 % of the triples."""
    axes = {**AXES, "tokens": [1, 17]}
    grid = Grid(axes, LIMITS)
    ways = Reach(grid).ways([TEMPLATE.vary(**row) for row in cover(axes, grid.tables(), strength)], strength)
    assert ways.covered == ways.possible > 0


def test_no_row_breaks_a_limit() -> None:
    assert all(TEMPLATE.vary(**row).problem() is None for row in cover(AXES, Grid(AXES, LIMITS).tables(), 2))


def test_a_limit_that_forbids_nothing_is_no_table() -> None:
    """covertable asks every constraint of every candidate: those that say yes to all cost two thirds of the time."""
    limits = (Limit(("tokens", "experts"), lambda case: None), Limit(("top_k",), lambda case: "no"))
    assert [(t.axes, len(t.allowed)) for t in Grid(AXES, limits).tables()] == [(("top_k",), 0)]
    assert cover(AXES, Grid(AXES, limits).tables(), 2) == []


def test_a_limit_of_a_backend_shapes_its_plan() -> None:
    backend = discover()["torch_grouped_mm"]
    cases = plan_backend(
        {**platform_axes(config.platform("cpu"), config.tier("ci"), ""), "hidden": [64, 100]}, backend, Device("cpu", "cpu"), 2
    )
    assert cases
    assert {case.shape.hidden for case in cases} == {64}


@pytest.mark.parametrize("platform", config.names("platforms"))
def test_every_plan_covers_the_pairs_each_backend_can_do(platform: str) -> None:
    """All of them: what remains impossible is counted as such. The run of any other tier reports its own figure."""
    wanted = plan.Request(platform, "smoke")
    device, tier = device_named(config.platform(platform)), config.tier("smoke")
    for backend in discover().values():
        grid = plan.grid(wanted, backend)
        if grid is None or (backend.archs and device.arch not in backend.archs):
            continue
        cases = plan_backend(platform_axes(config.platform(platform), tier, backend.name), backend, device, 2, KEPT)
        ways = Reach(grid).ways(cases, 2)
        assert ways.covered == ways.possible > 0, f"{backend.name}: {ways}"


def request(**changes: object) -> Request:
    return Request(**{"platform": "cpu", "tier": "smoke", **changes})  # type: ignore[arg-type]


def test_a_plan_is_the_same_every_time() -> None:
    device = Device("cpu", "cpu")
    assert plan.make(request(), discover(), device) == plan.make(request(), discover(), device)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"backends": ("torch_gruped_mm",)}, UnknownName, "torch_grouped_mm"),
        ({"tier": "smok"}, UnknownName, "smoke"),
        ({"cases": ("moe.bf16.t1",)}, CaseError, "does not parse"),
        ({"cases": ("moe.fp5*",)}, SelectionError, "nothing to run"),
        ({"ops": ("gemm",)}, SelectionError, "nothing to run"),
        ({"cases": ("moe.bf16*", "moe.fp5*")}, SelectionError, r"nothing to run.* by --case moe.fp5\*; moecheck list"),
        ({"ops": ("moe", "rotue")}, SelectionError, "nothing to run.* by --op rotue; moecheck list"),
    ],
)
def test_a_wrong_selection_is_refused(changes: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan.make(request(**changes), discover(), Device("cpu", "cpu"))


def test_one_of_all_platforms_may_lack_one_of_several_patterns() -> None:
    asked = request(cases=("moe.bf16*", "moe.fp5*"))
    assert plan.make(asked, discover(), Device("cpu", "cpu"), partly=True).items
    with pytest.raises(SelectionError):
        plan.make(request(cases=("moe.fp5*",)), discover(), Device("cpu", "cpu"), partly=True)


def test_a_named_case_goes_to_the_backends_that_take_it() -> None:
    case = "moe.bf16.t3.h64.i64.e4.k2.renormalize.swiglu.standard.real.s0"
    items = plan.make(request(cases=(case,)), discover(), Device("cpu", "cpu")).items
    assert {Case.parse(item.case_id).id for item in items} == {case}
    assert {"torch_grouped_mm", "torch_compile"} <= {item.subject for item in items}


@pytest.mark.parametrize("platform", config.names("platforms"))
def test_the_edges_of_a_backends_tile_are_always_planned(platform: str) -> None:
    """Bugs live at tile - 1 and tile + 1; a tier that names other tokens must not lose them."""
    loaded = config.platform(platform)
    for backend, alignment in loaded.padding_alignment.items():
        tokens = platform_axes(loaded, config.tier("smoke"), backend)["tokens"]
        assert {alignment.value - 1, alignment.value, alignment.value + 1} <= set(tokens)
        assert backend in discover()
