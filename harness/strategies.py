"""Hypothesis strategies of cases: legal by construction, none rejected, and shrinking towards the plainest. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from harness.backends.base import Backend, Device
from harness.case import Case, Limit
from harness.select import plan_backend
from harness.space import ORDER, Space, Value, within

# What a drawn case may cost, in multiply-adds of one GEMM: a tenth of harness/calibrate.py's, because all subjects together
# have 20 s on a CPU; ten times as much on a GPU, where launches count, not sums.
WORK = {"cpu": 1.5e5, "cuda": 1.5e6}
EXPERT, DECODED = 1e4, 4  # what an expert in use, and one of its weights, cost besides, in multiply-adds


def cases(axes: Mapping[str, Sequence[Value]], backend: Backend, device: Device, recipe: str) -> st.SearchStrategy[Case] | None:
    """Cases of one recipe that `backend` takes on `device`, of sizes on and between the levels of the plan's `axes`; None
    where the plan has no such case."""
    planned = plan_backend({**axes, "recipe": [recipe]}, backend, device, strength=1)
    if not planned:
        return None
    seen = {axis: {case.axes[axis] for case in planned} for axis in axes}
    mine = {axis: [v for v in values if v in seen[axis]] for axis, values in axes.items()}
    limits = (*backend.limits, affordable(device))
    whole = within(mine, limits)
    rules = {rule: next(case for case in planned if case.routing == rule) for rule in whole.values["routing"]}
    spaces = [(within({**mine, "routing": [rule]}, limits), case) for rule, case in rules.items()]
    return _walk([(space, space.plainest(case)) for space, case in spaces])


def _walk(starts: Sequence[tuple[Space, Case]]) -> st.SearchStrategy[Case]:
    """From the plainest case of a routing rule, axis by axis, through legal cases only. The rule comes first: most numbers
    of experts are no number of groups. Every axis draws from all its values, whatever the axes before it allow, because
    Hypothesis gets stuck where a smaller value changes how much is drawn after it."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        space, drawn = starts[draw(st.integers(0, len(starts) - 1))]
        for axis in ORDER:
            drawn = space.nearest(drawn, axis, draw(st.integers(0, len(space.values[axis]) - 1)))
        return drawn

    return case()  # without arguments: Hypothesis prints them, and a space is long


def affordable(device: Device) -> Limit:
    """Hundreds of cases must fit into minutes: big ones are the plan's."""
    most = WORK[device.kind]

    def refuses(case: Case) -> str | None:
        cost = work(case)
        return None if cost <= most else f"costs {cost:.3g} multiply-adds, more than {most:.3g}"

    return Limit(("tokens", "hidden", "inter", "experts", "top_k"), refuses)


def work(case: Case) -> float:
    """Multiply-adds of one GEMM, and what unpacking the experts in use costs in them."""
    shape = case.shape
    active = min(shape.experts, shape.tokens * shape.top_k)
    return shape.hidden * shape.inter * (shape.tokens * shape.top_k + active * DECODED) + active * EXPERT
