"""Drawn cases are legal by construction, differ from the planned ones, and shrink to the plainest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from harness import config, plan
from harness.backends import discover
from harness.backends.base import CPU, Device
from harness.case import SKEWS, Case, Limit
from harness.known import KnownIssue, mark, of_any_size
from harness.select import narrowed
from harness.space import SIZES, moved
from harness.strategies import WORK, cases, work
from harness.verdict import Stage, Status, Verdict

BACKENDS = discover()
GROUPED = BACKENDS["torch_grouped_mm"]
PLAINEST = "moe.bf16.t1.h8.i8.e1.k1.renormalize.silu.standard.exact.s0"
SM90 = Device("cuda", "sm90")
STRICT = settings(max_examples=40, database=None, derandomize=True, deadline=None, phases=[Phase.generate])
SEARCH = settings(max_examples=1000, database=None, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def axes(backend: str, platform: str = "cpu") -> dict[str, list[int | str]]:
    return plan.platform_axes(config.platform(platform), config.tier("ci"), backend)


def drawn(backend: str, recipe: str, device: Device = CPU, draws: int = 40) -> list[Case]:
    """So many cases; Hypothesis itself fails where more than a few are rejected, or where drawing is slow."""
    strategy = cases(axes(backend, device.arch), BACKENDS[backend], device, recipe)
    assert strategy is not None
    found: list[Case] = []
    settings(STRICT, max_examples=draws)(
        given(strategy)(lambda case: found.append(case))
    )()  # Hypothesis wants a function of its own
    return found


@pytest.mark.parametrize(
    ("backend", "recipe", "device"),
    [
        ("onnxruntime_moe", "int4_channel-fp32", CPU),
        ("torch_compile", "bf16", CPU),
        ("torch_grouped_mm", "bf16", CPU),
        ("triton_moe", "nvfp4-fp16", CPU),
        ("triton_moe", "mxfp4", SM90),
    ],
)
def test_every_drawn_case_is_legal(backend: str, recipe: str, device: Device) -> None:
    found = drawn(backend, recipe, device)
    for case in found:
        assert case.problem() is None
        assert BACKENDS[backend].supports(case, device).ok
        assert work(case) <= WORK[device.kind]
        assert Case.parse(case.id) == case
    assert len({case.id for case in found}) >= 30


def test_what_no_plan_lists_is_drawn() -> None:
    """A plan's levels are what everybody tries."""
    levels = axes("torch_grouped_mm")
    found = drawn("torch_grouped_mm", "bf16", draws=300)
    for axis in SIZES:
        assert {case.axes[axis] for case in found} - set(levels[axis]), axis
    for axis in ("routing", "fill", "skew"):
        assert {case.axes[axis] for case in found} == set(narrowed(levels, GROUPED)[axis]), axis  # type: ignore[index]
    assert {case.activation for case in found} <= set(GROUPED.activations)


TRIGGERS: list[tuple[Callable[[Case], bool], str]] = [
    (lambda c: c.shape.experts % 32 != 0 and c.shape.tokens >= 17, PLAINEST.replace(".t1.", ".t17.")),
    (lambda c: c.shape.hidden > 100 and c.fill == "real", PLAINEST.replace(".h8.", ".h104.").replace("exact", "real")),
    (lambda c: c.routing == "deepseek_v3", PLAINEST.replace(".e1.", ".e16.").replace("renormalize", "deepseek_v3")),
    (lambda c: c.shape.tokens == 0, PLAINEST.replace(".t1.", ".t0.")),
    (lambda c: c.skew == SKEWS[2], PLAINEST.replace(".e1.", ".e2.").replace("exact", "exact.half")),
]


@pytest.mark.parametrize(("trigger", "wanted"), TRIGGERS)
def test_hypothesis_shrinks_to_the_plainest_case(trigger: Callable[[Case], bool], wanted: str) -> None:
    """To the very threshold: between the levels there are values."""
    strategy = cases(axes("torch_grouped_mm"), GROUPED, CPU, "bf16")
    assert strategy is not None
    assert find(strategy, trigger, settings=SEARCH).id == wanted


def test_a_backend_of_one_case_is_drawn_at_that_case() -> None:
    only = {"tokens": 33, "hidden": 256, "inter": 128, "experts": 5, "top_k": 2, "fill": "real", "skew": "uniform"}
    limits = tuple(Limit((a,), lambda c, a=a: None if c.axes[a] == only[a] else "not this") for a in only)  # type: ignore[misc]
    single = replace(GROUPED, limits=limits, activations=("swiglu",), routings=("renormalize",), biases=("nobias",))
    single = replace(single, weightings=("onoutput",))
    strategy = cases(axes("torch_grouped_mm"), single, CPU, "bf16")
    assert strategy is not None
    found: set[str] = set()
    STRICT(given(strategy)(lambda case: found.add(str(case.vary(seed=0)))))()
    assert found == {"moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"}
    assert cases(axes("torch_grouped_mm"), replace(single, archs=("sm90",)), CPU, "bf16") is None


@given(data=st.data())
@settings(max_examples=20)
def test_moving_an_axis_is_varying_it(data: st.DataObject) -> None:
    case = Case.parse(PLAINEST)
    for axis, value in (("tokens", data.draw(st.integers(0, 99))), ("activation", "swiglu"), ("seed", 3)):
        assert moved(case, axis, value) == case.vary(**{axis: value})


def test_a_known_issue_excuses_the_sizes_between_its_levels_too() -> None:
    """Its entry lists the plan's levels; a drawn case lies beside them."""
    match: dict[str, tuple[int | str, ...]] = {"recipe": ("bf16",), "tokens": (1, 33)}
    issue = KnownIssue("known", "docs/findings.md#known", "torch_grouped_mm", "cpu", match, Status.WRONG, "unexplained: ")
    case = Case.parse(PLAINEST.replace(".t1.", ".t29."))
    verdict = Verdict(case.id, "torch_grouped_mm", Status.WRONG, Stage.DONE, "unexplained: 3 of 8")
    assert not mark(verdict, [issue]).known
    assert mark(verdict, of_any_size([issue], SIZES)).known == "known"
    assert not mark(replace(verdict, reason="zeros"), of_any_size([issue], SIZES)).known
    other = replace(verdict, case_id=case.vary(recipe="fp32").id)
    assert not mark(other, of_any_size([issue], SIZES)).known
