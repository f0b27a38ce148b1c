"""Case + Inputs -> Expected: the value, how far a right kernel may be from it, and what wrong kernels would have said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.batched import groups
from harness.case import Case
from harness.inputs import Inputs
from harness.mistakes import guarding
from harness.op_answers import answer
from harness.ratio import Baseline, assumed_rounding
from harness.whatif import Bystander, Layer, Loader, experts_of, spread
from reference.activation import ACTIVATIONS, Activation
from reference.bounds import finalize_variance, independent_errors, middle_error, row_variance
from reference.exactness import ACCUMULATORS, exact_in_any_order
from reference.experts import ExpertPass, ExpertWeights, forward
from reference.grid import FP32
from reference.moe import Experts, finalize
from reference.rounding import Rounding
from reference.routing import Routing

MAX_SAMPLED = 64  # tokens at which an impostor must be caught: one tile of rows
NEARLY = 2.0**-10  # of a spacing of fp32: silu(32) is 1e-7 of one away from 32
AMBIGUOUS_MARGIN = 2.0**-20  # of a selection score near 1 in fp32: closer than this, either expert is a right answer


@dataclass(frozen=True)
class Expected:
    """The judge's side of a case, on the CPU, float64.

    value, sigma [tokens, hidden]; exact: neither a rounding point nor the order of a GEMM's sums changes the value, so bits
    must agree; routing, its weights 1 where they multiplied the input; ambiguous [tokens]: rows where another routing is as
    right; impostors: name -> the output of a wrong kernel at the tokens `sampled` [n], [n, hidden]; contribution(e): what
    expert e adds to the output, computed when asked; independent [tokens]: how many independent errors a right kernel's rows
    hold; layer: the same layer, for what-if questions; read(output): the values that an output holds, where they are not its
    own elements; baseline: an emulation to compare with, where sigma is only that of an assumed recipe; by_row: no scale
    spans the batch, so a token's row is its own.
    """

    value: Tensor
    sigma: Tensor
    independent: Tensor
    exact: bool
    reason: str
    routing: Routing
    ambiguous: Tensor
    sampled: Tensor
    impostors: dict[str, Tensor]
    contribution: Callable[[int], Tensor]
    layer: Layer | None = None
    baseline: Baseline | None = None
    by_row: bool = True
    read: Callable[[Tensor], Tensor] = lambda output: output

    def rows(self, rows: Tensor) -> Expected:
        """What the tokens `rows` (int64) alone should give, where a row is its own. Impostors stay those of the whole."""
        names = ("ids", "weights", "margin")
        routing = dataclasses.replace(self.routing, **{name: getattr(self.routing, name)[rows] for name in names})
        mine = {name: getattr(self, name)[rows] for name in ("value", "sigma", "independent", "ambiguous")}
        if (whole := self.baseline) is not None:
            mine["baseline"] = dataclasses.replace(whole, output=whole.output[rows], freedom=whole.freedom[rows])
        return dataclasses.replace(self, routing=routing, **mine)


@dataclass
class _Accumulated:
    """Rows [tokens * top_k, hidden] gathered over the experts; moments [tokens * top_k, 2] of the middle's variances."""

    row: Tensor
    variance: Tensor
    moments: Tensor
    baseline: Tensor | None
    inexact: list[str] = field(default_factory=list)


def expect(case: Case, inputs: Inputs, declared: Rounding | None, guard: bool = True) -> Expected:
    """Run the reference once over the experts that received tokens. `declared`: the backend's rounding points; None where
    they are unknown: then the real fill is judged by the ratio to an emulation of the case's recipe. It quantises x as
    declared: a no-op, but for a rule other than the format's own. Without `guard` no impostors are computed: a relation's
    inputs are those of a case that has been trusted."""
    if case.op != "moe":
        return _answered(case, inputs, declared or Rounding())
    rounding = handed(assumed_rounding(case.recipe) if declared is None else declared, inputs)
    shape, activation = case.shape, ACTIVATIONS[case.activation]
    slots = shape.tokens * shape.top_k
    zero = torch.zeros(slots, shape.hidden, dtype=torch.float64, device=inputs.device)
    emulated = zero.clone() if declared is None and not case.exact else None
    rows = _Accumulated(zero, zero.clone(), zero.new_zeros(slots, 2), emulated)
    layer, loader, impostors = layer_of(inputs), Loader(inputs), guarding(case) if guard else {}
    bystander = Bystander(layer, loader, _sampled(inputs), list(impostors.values()))
    experts = experts_of(case, loader.weights)
    ideal = dataclasses.replace(layer.rounding, x=rounding.x, x_scale=rounding.x_scale)
    if experts.weight_on_input:  # a rounded weight, and x times it, are as known as a rounded x
        ideal = dataclasses.replace(ideal, routing_weight=rounding.routing_weight, weighted_x=rounding.weighted_x)
    for group in groups(inputs.x, inputs.routing, experts, loader.stacked, (ideal, rounding)):
        mine, done, weights = group.slots, group.done, group.weights
        rows.row[mine] = group.rows(done.row)
        middle = middle_error(done, weights, activation, rounding)
        rows.variance[mine] = group.rows(row_variance(done, weights, middle, rounding))
        rows.moments[mine] = group.rows(middle.moments)
        if rows.baseline is not None:
            inside = dataclasses.replace(rounding, x=None) if experts.weight_on_input else rounding
            rows.baseline[mine] = group.rows(forward(done.x, weights, activation, inside).row)
        bystander.see(group)
        if case.exact:
            rows.inexact += _unsaturated(activation, done.gate)
            rows.inexact += _moved(rounding, {"gate_up": (done.gate, done.up), "middle": (done.middle,), "row": (done.row,)})
            rows.inexact += _overflows(rounding.accumulate, done, weights)
    if case.exact:
        rows.inexact += _moved(rounding, {"x": (inputs.x.double(),)})
    expected = _assemble(case, inputs, rounding, rows)
    if guard:
        value = expected.value.to(inputs.device)
        wrong = _without_experts(case, inputs, rows) | dict(zip(impostors, bystander.outputs(value), strict=True))
        expected.impostors.update({name: output.cpu() for name, output in wrong.items()})
    return expected


def layer_of(inputs: Inputs) -> Layer:
    """The same layer, for what-if questions."""
    return Layer(inputs.case, inputs.device, inputs if inputs.recorded else None)


def _answered(case: Case, inputs: Inputs, rounding: Rounding) -> Expected:
    """Another op's expectation: no row is ambiguous, and every impostor is judged on the whole output."""
    given, routing = answer(case, inputs, rounding), inputs.routing
    value = given.value.cpu()
    return Expected(
        value=value,
        sigma=given.sigma.cpu(),
        independent=torch.full((len(value),), float(value.shape[1]), dtype=torch.float64),
        exact=given.exact,
        reason="" if given.exact else "rounding changes the values",
        routing=dataclasses.replace(routing, ids=routing.ids.cpu(), weights=routing.weights.cpu(), margin=routing.margin.cpu()),
        ambiguous=torch.zeros(len(value), dtype=torch.bool),
        sampled=torch.arange(len(value)),
        impostors={name: wrong.cpu() for name, wrong in given.impostors.items()},
        contribution=lambda expert: torch.zeros_like(value),
        by_row=False,
        read=lambda output: given.read(output).cpu(),
    )


def _sampled(inputs: Inputs) -> Tensor:
    """int64 [n]: the tokens at which impostors are computed, evenly taken among those that are judged."""
    judged = (inputs.routing.margin >= AMBIGUOUS_MARGIN).nonzero().flatten()
    return spread(judged, MAX_SAMPLED)


def handed(rounding: Rounding, inputs: Inputs) -> Rounding:
    """The declared rounding points with the scales that this case hands to static formats."""
    return dataclasses.replace(rounding, x_scale=inputs.x_scale, middle_scale=inputs.middle_scale)


def _assemble(case: Case, inputs: Inputs, rounding: Rounding, rows: _Accumulated) -> Expected:
    shape, routing = case.shape, dataclasses.replace(inputs.routing, weights=_combining(inputs))
    row, variances = (x.view(shape.tokens, shape.top_k, shape.hidden) for x in (rows.row, rows.variance))
    value = finalize(row, routing.weights)
    variance = finalize_variance(row, variances, routing.weights, rounding)
    if case.exact and not torch.equal(finalize(row, routing.weights, rounding), value):
        rows.inexact.append("rounding changes the sum over experts")
    return Expected(
        value=value.cpu(),
        sigma=variance.sqrt().cpu(),
        independent=_independent(inputs, rows),
        exact=case.exact and not rows.inexact,
        reason="; ".join(dict.fromkeys(rows.inexact)),
        routing=dataclasses.replace(routing, ids=routing.ids.cpu(), weights=routing.weights.cpu(), margin=routing.margin.cpu()),
        ambiguous=(routing.margin < AMBIGUOUS_MARGIN).cpu(),
        sampled=_sampled(inputs).cpu(),
        impostors={},
        contribution=lambda expert: _contribution(case, inputs, expert),
        layer=layer_of(inputs),
        baseline=None if rows.baseline is None else _baseline(case, inputs, rounding, rows),
        by_row=not rounding.spans_rows,
    )


def _without_experts(case: Case, inputs: Inputs, rows: _Accumulated) -> dict[str, Tensor]:
    """The impostors [n, hidden] that leave out experts: all, and the least of the routed ones, as a fused shared expert
    counts more."""
    sampled = _sampled(inputs)
    row = rows.row.view(case.shape.tokens, case.shape.top_k, case.shape.hidden)[sampled]
    weights = _combining(inputs)[sampled].clone()
    weights[:, case.routed.top_k - 1] = 0
    return {"zeros": torch.zeros_like(row[:, 0]), "dropped_slot": finalize(row, weights)}


def _independent(inputs: Inputs, rows: _Accumulated) -> Tensor:
    weights = _combining(inputs)
    return independent_errors(rows.moments.view(*weights.shape, 2), weights, inputs.case.shape.hidden).cpu()


def _baseline(case: Case, inputs: Inputs, rounding: Rounding, rows: _Accumulated) -> Baseline:
    shape, weights, carrier = case.shape, _combining(inputs), case.recipe.out
    assert rows.baseline is not None
    emulated, ideal = (r.view(shape.tokens, shape.top_k, shape.hidden) for r in (rows.baseline, rows.row))
    combined = dataclasses.replace(rounding, routing_weight=carrier, weighted=carrier, partial=carrier)
    less, more = (finalize_variance(ideal, torch.zeros_like(ideal), weights, r) for r in (rounding, combined))
    per_token = max(float(_independent(inputs, rows).sum()), 1e-300) / max(1, shape.tokens)
    neurons = 1 / max(1 / per_token - 1 / shape.hidden, 1e-300)
    return Baseline(finalize(emulated, weights, rounding).cpu(), (more - less).clamp(min=0).cpu(), neurons)


def layer_experts(inputs: Inputs) -> Experts:
    """The case's experts as the reference takes them."""
    return experts_of(inputs.case, weight_source(inputs))


def _combining(inputs: Inputs) -> Tensor:
    """[tokens, top_k]: what the experts' rows are multiplied by in the sum."""
    return layer_experts(inputs).combining(inputs.routing.weights)


def weight_source(inputs: Inputs) -> Callable[[int], ExpertWeights]:
    """Decode one expert's weights to float64 when asked."""
    return Loader(inputs).weights


def _moved(rounding: Rounding, points: dict[str, tuple[Tensor | None, ...]]) -> list[str]:
    """The rounding points at which some value is not a fixed point: there two right kernels may differ."""
    return [
        f"rounding changes {point}"
        for point, values in points.items()
        if any(v is not None and not torch.equal(rounding.at(point, v), v) for v in values)
    ]


def _unsaturated(activation: Activation, gate: Tensor) -> list[str]:
    """Where act(gate) is neither 0 nor nearly the gate: kernels that work in fp32, and round nothing else, may differ there."""
    activated = activation.scalar(gate)
    moved = (activated != 0) & ((activated - gate).abs() > FP32.ulp(gate) * NEARLY)
    return ["the activation rounds"] if bool(moved.any()) else []


def _overflows(accumulate: str, done: ExpertPass, weights: ExpertWeights) -> list[str]:
    """The GEMMs whose sums may leave the integers of the accumulator: there two orders of summation may differ."""
    gemms = (("GEMM 1", done.x, weights.gate), ("GEMM 1", done.x, weights.up), ("GEMM 2", done.middle, weights.down))
    return [
        f"{gemm}'s sum exceeds the exact range of {accumulate}"
        for gemm, a, b in gemms
        if b is not None and not exact_in_any_order(a, b, ACCUMULATORS[accumulate])
    ]


def _contribution(case: Case, inputs: Inputs, expert: int) -> Tensor:
    ids, weights = inputs.routing.ids, inputs.routing.weights
    mine = torch.where(ids == expert, weights, 0.0).sum(-1)[:, None]
    x, outside = (inputs.x * mine, (mine != 0).double()) if case.weighting == "oninput" else (inputs.x, mine)
    done = forward(x.double(), weight_source(inputs)(expert), ACTIVATIONS[case.activation])
    return (done.row * outside).cpu()
