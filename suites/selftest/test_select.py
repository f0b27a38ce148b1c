"""Plans cover what they promise, and nothing that cannot exist."""

from __future__ import annotations

import pytest

from harness import config, plan
from harness.backends import discover
from harness.backends.base import Device
from harness.case import LIMITS, Case, Limit
from harness.errors import CaseError, SelectionError, UnknownName
from harness.plan import Request, device_named, platform_axes
from harness.select import TEMPLATE, cover, coverage, narrowed, plan_backend

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
    rows = [TEMPLATE.vary(**row) for row in cover(AXES, LIMITS, strength)]
    covered, possible = coverage(rows, AXES, LIMITS, strength)
    assert covered == possible > 0


def test_no_row_breaks_a_limit() -> None:
    assert all(TEMPLATE.vary(**row).problem() is None for row in cover(AXES, LIMITS, 2))


def test_a_missing_row_lowers_the_coverage() -> None:
    rows = [TEMPLATE.vary(**row) for row in cover(AXES, LIMITS, 2)]
    covered, possible = coverage([r for r in rows if r.shape.tokens != 17], AXES, LIMITS, 2)
    assert covered < possible


def test_a_limit_of_a_backend_shapes_its_plan() -> None:
    backend = discover()["torch_grouped_mm"]
    cases = plan_backend(
        {**platform_axes(config.platform("cpu"), config.tier("ci"), ""), "hidden": [64, 100]}, backend, Device("cpu", "cpu"), 2
    )
    assert cases
    assert {case.shape.hidden for case in cases} == {64}


@pytest.mark.parametrize("platform", config.names("platforms"))
@pytest.mark.parametrize("tier", config.names("tiers"))
def test_every_plan_covers_the_pairs_each_backend_can_do(platform: str, tier: str) -> None:
    loaded = config.platform(platform)
    device = device_named(loaded)
    for backend in discover().values():
        axes = narrowed(platform_axes(loaded, config.tier(tier), backend.name), backend)
        if axes is None or (backend.archs and device.arch not in backend.archs):
            continue
        cases = plan_backend(axes, backend, device, 2)
        allowed = {n: [v for v in vs if any(c.axes[n] == v for c in cases)] for n, vs in axes.items()}
        limits: tuple[Limit, ...] = (*LIMITS, *backend.limits)
        covered, possible = coverage(cases, allowed, limits, 2)
        assert covered >= 0.97 * possible, f"{backend.name}: {covered} of {possible}"


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
    ],
)
def test_a_wrong_selection_is_refused(changes: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan.make(request(**changes), discover(), Device("cpu", "cpu"))


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
