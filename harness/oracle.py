"""Case + Inputs -> Expected: the value, how far a right kernel may be from it, and what wrong kernels would have said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.case import Case
from harness.inputs import Inputs
from harness.mistakes import guarding
from harness.whatif import Bystander, Layer, Loader, spread
from reference.activation import ACTIVATIONS
from reference.bounds import finalize_variance, independent_errors, middle_variance, row_variance
from reference.experts import ExpertWeights, forward
from reference.moe import Experts, finalize, passes
from reference.rounding import Rounding
from reference.routing import Routing

MAX_SAMPLED = 64  # tokens at which an impostor must be caught: one tile of rows
AMBIGUOUS_MARGIN = 2.0**-20  # of a selection score near 1 in fp32: closer than this, either expert is a right answer


@dataclass(frozen=True)
class Expected:
    """The judge's side of a case, on the CPU, float64.

    value, sigma [tokens, hidden]; exact: every rounding point leaves the value unchanged, so bits must agree; routing;
    ambiguous [tokens]: rows where another routing is as right; impostors: name -> the output of a wrong kernel at the tokens
    `sampled` [n], [n, hidden];
    contribution(e): what expert e adds to the output, computed when asked; independent: how many independent errors a
    right kernel's output holds; layer: the same layer, for what-if questions.
    """

    value: Tensor
    sigma: Tensor
    independent: float
    exact: bool
    reason: str
    routing: Routing
    ambiguous: Tensor
    sampled: Tensor
    impostors: dict[str, Tensor]
    contribution: Callable[[int], Tensor]
    layer: Layer | None = None


@dataclass
class _Accumulated:
    """Rows [tokens * top_k, hidden] gathered over the experts."""

    row: Tensor
    variance: Tensor
    independent: float = 0.0
    inexact: list[str] = field(default_factory=list)


def expect(case: Case, inputs: Inputs, rounding: Rounding, guard: bool = True) -> Expected:
    """Run the reference once over the experts that received tokens. `rounding`: the backend's declared rounding points. It
    quantises x as declared: a no-op, but for a rule other than the format's own. Without `guard` no impostors are computed:
    a relation's inputs are those of a case that has been trusted."""
    shape, activation, rounding = case.shape, ACTIVATIONS[case.activation], handed(rounding, inputs)
    slots = shape.tokens * shape.top_k
    zero = torch.zeros(slots, shape.hidden, dtype=torch.float64, device=inputs.device)
    rows = _Accumulated(zero, zero.clone())
    layer, loader, impostors = Layer(case, inputs.device), Loader(inputs), guarding(case) if guard else {}
    bystander = Bystander(layer, loader, _sampled(inputs), list(impostors.values()))
    experts = Experts(shape.experts, loader.weights, activation)
    ideal = dataclasses.replace(layer.rounding, x=rounding.x, x_scale=rounding.x_scale)
    for expert, mine, done, weights in passes(inputs.x, inputs.routing, experts, ideal):
        rows.row[mine] = done.row
        middle = middle_variance(done, weights, activation, rounding)
        rows.variance[mine] = row_variance(done, weights, middle, rounding)
        rows.independent += independent_errors(middle, shape.hidden)
        if impostors:
            bystander.see(expert, mine, done)
        if case.fill == "exact":
            rows.inexact += _moved(rounding, {"gate_up": (done.gate, done.up), "middle": (done.middle,), "row": (done.row,)})
    if case.fill == "exact":
        rows.inexact += _moved(rounding, {"x": (inputs.x.double(),)})
    expected = _assemble(case, inputs, rounding, rows)
    wrong = dict(zip(impostors, bystander.outputs(expected.value.to(inputs.device)), strict=True))
    expected.impostors.update({name: output.cpu() for name, output in wrong.items()})
    return expected


def _sampled(inputs: Inputs) -> Tensor:
    """int64 [n]: the tokens at which impostors are computed, evenly taken among those that are judged."""
    judged = (inputs.routing.margin >= AMBIGUOUS_MARGIN).nonzero().flatten()
    return spread(judged, MAX_SAMPLED)


def handed(rounding: Rounding, inputs: Inputs) -> Rounding:
    """The declared rounding points with the scales that this case hands to static formats."""
    return dataclasses.replace(rounding, x_scale=inputs.x_scale, middle_scale=inputs.middle_scale)


def _assemble(case: Case, inputs: Inputs, rounding: Rounding, rows: _Accumulated) -> Expected:
    shape, routing = case.shape, inputs.routing

    def per_token(x: Tensor) -> Tensor:
        return x.view(shape.tokens, shape.top_k, shape.hidden)

    value = finalize(per_token(rows.row), routing.weights)
    variance = finalize_variance(per_token(rows.row), per_token(rows.variance), routing.weights, rounding)
    rounded = finalize(per_token(rows.row), routing.weights, rounding)
    if case.fill == "exact" and not torch.equal(rounded, value):
        rows.inexact.append("the sum over experts")
    one_less = routing.weights.clone()
    one_less[:, -1] = 0
    sampled = _sampled(inputs)
    impostors = {"zeros": torch.zeros_like(value), "dropped_slot": finalize(per_token(rows.row), one_less)}
    return Expected(
        value=value.cpu(),
        sigma=variance.sqrt().cpu(),
        independent=rows.independent,
        exact=case.fill == "exact" and not rows.inexact,
        reason=f"rounding changes {', '.join(dict.fromkeys(rows.inexact))}" if rows.inexact else "",
        routing=dataclasses.replace(routing, ids=routing.ids.cpu(), weights=routing.weights.cpu(), margin=routing.margin.cpu()),
        ambiguous=(routing.margin < AMBIGUOUS_MARGIN).cpu(),
        sampled=sampled.cpu(),
        impostors={name: wrong[sampled].cpu() for name, wrong in impostors.items()},
        contribution=lambda expert: _contribution(case, inputs, expert),
        layer=Layer(case, inputs.device),
    )


def layer_experts(inputs: Inputs) -> Experts:
    """The case's experts as the reference takes them."""
    return Experts(inputs.case.shape.experts, weight_source(inputs), ACTIVATIONS[inputs.case.activation])


def weight_source(inputs: Inputs) -> Callable[[int], ExpertWeights]:
    """Decode one expert's weights to float64 when asked."""
    return Loader(inputs).weights


def _moved(rounding: Rounding, points: dict[str, tuple[Tensor | None, ...]]) -> list[str]:
    """The rounding points at which some value is not a fixed point: there two right kernels may differ."""
    return [
        point
        for point, values in points.items()
        if any(v is not None and not torch.equal(rounding.at(point, v), v) for v in values)
    ]


def _contribution(case: Case, inputs: Inputs, expert: int) -> Tensor:
    ids, weights = inputs.routing.ids, inputs.routing.weights
    mine = torch.where(ids == expert, weights, 0.0).sum(-1)
    done = forward(inputs.x.double(), weight_source(inputs)(expert), ACTIVATIONS[case.activation])
    return (done.row * mine[:, None]).cpu()
