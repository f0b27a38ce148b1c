"""Other inputs made from a case's inputs, of which the reference knows the answer as well: the operands of the relations."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.inputs import Inputs, make_inputs
from reference.format import Quantized
from reference.routing import RULES, Routing

# Multiply-adds of a GEMM. Verdicts/s on an H200: 4.6 with 1 << 19, 4.5 with 0, 4.0 with 1 << 22, 3.4 with 1 << 25.
LAUNCH_BOUND = 1 << 19


def copied(inputs: Inputs) -> Inputs:
    """The same values in tensors of their own: what a subject is handed, so that it cannot write to the judge's."""
    tensors = {"x": inputs.x.clone(), "logits": inputs.logits.clone()}
    if inputs.bias is not None:
        tensors["bias"] = inputs.bias.clone()
    routing = replace(inputs.routing, ids=inputs.routing.ids.clone(), weights=inputs.routing.weights.clone())
    if isinstance(inputs, Handed):
        return replace(inputs, **tensors, handed=routing)  # type: ignore[arg-type]
    fresh = replace(inputs, **tensors)  # type: ignore[arg-type]
    fresh.__dict__["routing"] = routing  # fills the cached property
    return fresh


def judged_on(inputs: Inputs) -> Inputs:
    """The same inputs where the oracle is fastest: on the CPU for a small layer, whose time on a GPU is all launches. Inputs
    have equal bytes on every device."""
    shape = inputs.case.shape
    slots = min(shape.experts, shape.tokens * shape.top_k)
    if inputs.device == "cpu" or shape.hidden * shape.inter * (slots + shape.tokens * shape.top_k) > LAUNCH_BOUND:
        return inputs
    tensors: dict[str, Any] = {"device": "cpu", "x": inputs.x.cpu(), "logits": inputs.logits.cpu()}
    if inputs.bias is not None:
        tensors["bias"] = inputs.bias.cpu()
    routing = replace(
        inputs.routing,
        ids=inputs.routing.ids.cpu(),
        weights=inputs.routing.weights.cpu(),
        margin=inputs.routing.margin.cpu(),
    )
    if isinstance(inputs, Handed):
        given = None if inputs.given_weights is None else inputs.given_weights.cpu()
        return replace(inputs, **tensors, handed=routing, given_weights=given)
    near = replace(inputs, **tensors)
    near.__dict__["routing"] = routing
    return near


def another_order(tokens: int) -> Tensor:
    """int64 [tokens]: reversed and rotated by a third; the one that would keep its place changes it with the next."""
    here = torch.arange(tokens)
    order = here.flip(0).roll(tokens // 3)
    for kept in (order == here).nonzero().flatten().tolist():
        pair = torch.tensor([kept, (kept + 1) % tokens])
        order[pair] = order[pair.flip(0)]
    return order


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """The tokens `rows` (int64), in that order, of the same layer."""
    case = inputs.case.vary(tokens=len(rows))
    return replace(inputs, case=case, x=inputs.x[rows].contiguous(), logits=inputs.logits[rows].contiguous())


def replaced(inputs: Inputs, **tensors: Tensor) -> Inputs:
    """The same inputs with some tensors in another place."""
    return replace(inputs, **tensors)  # type: ignore[arg-type]


def garbage_rows(inputs: Inputs) -> Inputs:
    """Every second token is padding of a batch: its activations and logits are NaN. What its own row becomes is nobody's
    promise; the other rows must not notice."""
    x, logits = inputs.x.clone(), inputs.logits.clone()
    x[1::2], logits[1::2] = torch.nan, torch.nan
    garbage = replace(inputs, x=x, logits=logits)
    garbage.__dict__["routing"] = inputs.routing  # what a kernel is handed stays valid
    return garbage


def other_tokens(inputs: Inputs) -> Inputs:
    """Other activations and other logits for the same layer."""
    return make_inputs(inputs.case, inputs.device, variant="/other")


def other_weights(inputs: Inputs) -> Inputs:
    """The same case with the next seed: other weights, activations and logits of the same shapes."""
    return make_inputs(inputs.case.vary(seed=inputs.case.seed + 1), inputs.device)


@dataclass(frozen=True)
class Relabelled(Inputs):
    """The experts under other numbers: expert e here is expert order[e] of the case."""

    own_experts: ClassVar[bool] = False
    order: tuple[int, ...] = ()

    def read(self, name: str, expert: int) -> tuple[Quantized | None, ...]:
        """See Inputs."""
        return super().read(name, self.order[expert])

    def gate_up_bias(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """See Inputs."""
        return super().gate_up_bias(self.order[expert])

    def down_bias(self, expert: int) -> Tensor | None:
        """See Inputs."""
        return super().down_bias(self.order[expert])


def relabelled(inputs: Inputs) -> Inputs:
    """Experts in reverse order within their group, logits and bias with them; a fused shared one stays the last."""
    routed, groups = inputs.case.routed.experts, RULES[inputs.case.routing].groups[0]
    order = torch.arange(routed).view(groups, -1).flip(1).flatten()
    bias = None if inputs.bias is None else inputs.bias[order.to(inputs.bias.device)]
    given = {f.name: getattr(inputs, f.name) for f in fields(Inputs)}
    given |= {"logits": inputs.logits[:, order.to(inputs.logits.device)].contiguous(), "bias": bias}
    return Relabelled(**given, order=(*order.tolist(), *range(routed, inputs.case.shape.experts)))


@dataclass(frozen=True)
class Handed(Inputs):
    """Inputs whose routing was decided elsewhere. handed: as the judge counts it; given_weights float32 [tokens, top_k]: as
    the kernel gets them, where that differs; local: the experts this rank holds."""

    handed: Routing | None = None
    given_weights: Tensor | None = None
    local: range = range(0)

    @property
    def routing(self) -> Routing:
        """The routing that was handed over."""
        assert self.handed is not None
        return self.handed

    @property
    def topk_weights(self) -> Tensor:
        """float32 [tokens, top_k]."""
        return self.routing.weights.float() if self.given_weights is None else self.given_weights


def _handed(inputs: Inputs, routing: Routing, given_weights: Tensor | None = None, local: range | None = None) -> Inputs:
    given = {f.name: getattr(inputs, f.name) for f in fields(Inputs)}
    return Handed(**given, handed=routing, given_weights=given_weights, local=inputs.local if local is None else local)


def zero_weight(inputs: Inputs) -> Inputs:
    """Every second token's first expert has routing weight 0."""
    weights = inputs.routing.weights.clone()
    weights[::2, 0] = 0
    return _handed(inputs, replace(inputs.routing, weights=weights))


def duplicate_expert(inputs: Inputs) -> Inputs:
    """Every second token names its first expert twice. The judge counts it once with both weights: two equal rows carry equal
    errors, which do not average out."""
    ids, weights = inputs.routing.ids.clone(), inputs.routing.weights.clone()
    ids[::2, -1] = ids[::2, 0]
    weights[::2, 0] += weights[::2, -1]
    weights[::2, -1] = 0
    return _handed(inputs, replace(inputs.routing, ids=ids, weights=weights), inputs.topk_weights)


def halved_weights(inputs: Inputs) -> Inputs:
    """Every second token's routing weights are half of what they were."""
    weights = inputs.routing.weights.clone()
    weights[::2] /= 2
    return _handed(inputs, replace(inputs.routing, weights=weights))


def scaled_rows(inputs: Inputs, factor: float) -> Inputs:
    """Every second token times `factor`, 0 or a power of two."""
    x = inputs.x.clone()
    x[::2] *= factor
    scaled = replace(inputs, x=x)
    scaled.__dict__["routing"] = inputs.routing
    return scaled


def shards(inputs: Inputs) -> tuple[Inputs, ...]:
    """Very uneven ranks: one expert, the rest, and an expert that received nothing, if there is one. A rank sees every id and
    weight; the judge counts another rank's experts with weight 0."""
    experts = inputs.case.shape.experts
    idle = sorted(set(range(experts)) - set(inputs.routing.ids.flatten().tolist()))
    found = []
    for local in (range(1), range(1, experts), *(range(e, e + 1) for e in idle[-1:])):
        mine = (inputs.routing.ids >= local.start) & (inputs.routing.ids < local.stop)
        routing = replace(inputs.routing, weights=torch.where(mine, inputs.routing.weights, 0.0))
        found.append(_handed(inputs, routing, inputs.topk_weights, local))
    return tuple(found)
