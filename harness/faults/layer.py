"""A layer with everything that can be got wrong in it, and the emulated kernel that gets it right."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Shape
from harness.faults.rules import verdicts
from harness.inputs import Inputs, make_inputs
from harness.oracle import handed, layer_experts
from harness.ratio import assumed_rounding
from harness.subject import Subject
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.formats import get
from reference.grid import FLOATS, TORCH_DTYPES
from reference.moe import Experts, moe
from reference.rounding import Rounding
from reference.routing import RULES, Routing

Matrices = tuple[Quantized, Quantized | None, Quantized]
KEPT_BYTES = 2**31  # decoded weights up to this size are kept: some twenty layers are computed from the same ones
MANY_WEIGHTS = 1 << 25  # of one projection: a second on one core
POINTS = ("routing_weight", "gate_up", "activated", "middle", "row", "weighted", "partial", "out")


@dataclass(frozen=True)
class Layer:
    """One call of a MoE layer. x, previous [tokens, hidden]: the input and that of the call before; rounding: where the
    kernel rounds; out: its output dtype; unnormalised [tokens, top_k] float64: the routing weights before they are made to
    sum to 1, None where they never are; quantised(e) -> (gate, up or None, down), None where weights are plain."""

    x: Tensor
    routing: Routing
    experts: Experts
    rounding: Rounding
    out: torch.dtype
    previous: Tensor
    unnormalised: Tensor | None = None
    quantised: Callable[[int], Matrices] | None = field(default=None, compare=False)
    draw: int = 0

    @cached_property
    def right(self) -> Tensor:
        """[tokens, hidden] in `out`: what a right kernel with exactly these rounding points writes."""
        return self.run()

    @cached_property
    def eager(self) -> Tensor:
        """What a plain implementation writes, every operation of which rounds to `out` (as vLLM's Triton path does)."""
        name = next(name for name, dtype in TORCH_DTYPES.items() if dtype == self.out)
        plain: dict[str, Any] = {
            point: name for point in POINTS[1:] if all(step in FLOATS for step in self.rounding.steps(point))
        }
        return replace(self, rounding=replace(self.rounding, **plain)).run()

    @cached_property
    def active(self) -> list[int]:
        """The experts that received a token."""
        return [int(e) for e in self.routing.ids.unique()]

    @property
    def chosen(self) -> int:
        """The active expert that a fault of one expert befalls."""
        return self.active[self.draw % len(self.active)]

    def run(self, x: Tensor | None = None, routing_weights: Tensor | None = None, experts: Experts | None = None) -> Tensor:
        """The emulated kernel with some of its inputs replaced."""
        routing = self.routing if routing_weights is None else replace(self.routing, weights=routing_weights)
        return moe(self.x if x is None else x, routing, experts or self.experts, self.rounding).to(self.out)

    def with_weights(self, weights: Callable[[int], ExpertWeights]) -> Experts:
        """The experts with other weights."""
        return replace(self.experts, weights=weights)


def layer_of(case: Case, rounding: Rounding, inputs: Inputs | None = None) -> Layer:
    """The layer of a case (tokens > 0), on the CPU, as a kernel with these rounding points computes it."""
    inputs = inputs or make_inputs(case)
    experts = layer_experts(inputs)
    plain = get(case.recipe.weights).scaling is None
    return Layer(
        x=inputs.x,
        routing=inputs.routing,
        experts=replace(experts, weights=kept(experts.weights, case.shape)),
        rounding=in_fp32(handed(rounding, inputs)),
        out=get(case.recipe.out).torch_dtype or torch.bfloat16,
        previous=make_inputs(case, inputs.device, variant="/previous").x,
        unnormalised=_unnormalised(case, inputs),
        quantised=None if plain else lambda e: (*inputs.gate_up(e), inputs.down(e)),
        draw=zlib.crc32(case.id.encode()),
    )


def in_fp32(rounding: Rounding) -> Rounding:
    """`rounding` with fp32 wherever it names nothing: a kernel's registers, where the reference has float64."""
    named: dict[str, Any] = {point: getattr(rounding, point) or "fp32" for point in POINTS}
    return replace(rounding, **named)


def kept(weights: Callable[[int], ExpertWeights], shape: Shape) -> Callable[[int], ExpertWeights]:
    """`weights`, each expert decoded once if all of them are small enough to keep."""
    if 24 * min(shape.experts, shape.tokens * shape.top_k) * shape.inter * shape.hidden > KEPT_BYTES:
        return weights
    store: dict[int, ExpertWeights] = {}

    def source(expert: int) -> ExpertWeights:
        if expert not in store:
            store[expert] = weights(expert)
        return store[expert]

    return source


def _unnormalised(case: Case, inputs: Inputs) -> Tensor | None:
    """Scores of the selected experts where the rule divides them by their sum: softmax over all where it looks at logits."""
    rule, routing = RULES[case.routing], inputs.routing
    if not torch.allclose(routing.weights.sum(-1), torch.tensor(rule.scale, dtype=torch.float64)):
        return None
    logits = inputs.logits.double()
    scores = rule.score(logits)
    return (logits.softmax(-1) if scores is logits else scores).gather(-1, routing.ids) * rule.scale


def rules_in_use(subject: Subject) -> dict[str, bool]:
    """What every rule in use says of the subject's output; a plain eager implementation is the baseline. Nothing for a layer
    whose weights are too many to compute a second time on the CPU."""
    shape = subject.case.shape
    if shape.experts * shape.inter * shape.hidden > MANY_WEIGHTS:
        return {}
    inputs = make_inputs(subject.case)
    rounding = subject.backend.rounding(subject.case) or assumed_rounding(subject.case.recipe)
    eager = layer_of(subject.case, rounding, inputs).eager
    return verdicts(subject.result, subject.expected.value, eager)
