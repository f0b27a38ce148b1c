"""The whole Mixture-of-Experts layer in float64, one expert after another, every rounding point named.

y[t] = sum over k of weight[t, k] * down_e @ act(gate_e @ x[t], up_e @ x[t]),   e = ids[t, k]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference.activation import Activation
from reference.dispatch import dispatch
from reference.experts import ExpertPass, ExpertWeights, forward
from reference.rounding import IDEAL, Rounding
from reference.routing import Routing


@dataclass(frozen=True)
class Experts:
    """The experts of a layer. `weights(e)` decodes one expert when asked, so memory stays linear in one.

    shared: an expert every token passes with weight 1 (DeepSeek-V3, Llama-4); weight_on_input: the routing weight multiplies
    what GEMM 1 reads, or its sums, instead of the expert's output (Llama-4, apply_router_weight_on_input in vLLM).
    """

    count: int
    weights: Callable[[int], ExpertWeights]
    activation: Activation
    shared: ExpertWeights | None = None
    weight_on_input: bool = False

    def combining(self, weights: Tensor) -> Tensor:
        """[tokens, top_k]: what the experts' outputs are multiplied by, 1 where x was multiplied already."""
        return torch.ones_like(weights) if self.weight_on_input else weights


def passes(
    x: Tensor, routing: Routing, experts: Experts, rounding: Rounding = IDEAL
) -> Iterator[tuple[int, Tensor, ExpertPass, ExpertWeights]]:
    """(expert, slots, pass, weights) of every expert that received a token; slot = token * top_k + k."""
    groups = dispatch(routing.ids, experts.count)
    for expert in groups.offsets.diff().nonzero().flatten().tolist():
        slots = groups.slots(expert)
        rows, inside = entering(x, slots, routing, experts, rounding)
        decoded = experts.weights(expert)
        yield expert, slots, forward(rows, decoded, experts.activation, inside), decoded


def entering(x: Tensor, slots: Tensor, routing: Routing, experts: Experts, rounding: Rounding) -> tuple[Tensor, Rounding]:
    """What experts read for `slots` [...]: rows [..., hidden] float64, and the roundings that remain for them."""
    rows = x[slots // routing.ids.shape[1]].double()
    if not experts.weight_on_input:
        return rows, rounding
    # after x is quantised: kernels that read a grid multiply the sums
    rows = rounding.at("x", rows) * rounding.at("routing_weight", routing.weights.flatten()[slots].unsqueeze(-1))
    return rounding.at("weighted_x", rows), replace(rounding, x=None)


def finalize(rows: Tensor, weights: Tensor, rounding: Rounding = IDEAL, shared: Tensor | None = None) -> Tensor:
    """Sum rows [tokens, top_k, hidden] with weights [tokens, top_k] in slot order, then add `shared` [tokens, hidden]."""
    weights = rounding.at("routing_weight", weights)
    total = rows.new_zeros(rows.shape[0], rows.shape[2])
    for k in range(rows.shape[1]):
        weighted = rounding.at("weighted", rows[:, k] * weights[:, k, None])
        total = rounding.at("partial", total + weighted)
    return rounding.at("out", total if shared is None else total + shared)


def moe(x: Tensor, routing: Routing, experts: Experts, rounding: Rounding = IDEAL) -> Tensor:
    """The layer: x [tokens, hidden] in any float dtype -> [tokens, hidden] float64, as `rounding` says it is computed."""
    tokens, top_k = routing.ids.shape
    rows = torch.zeros(tokens * top_k, x.shape[1], dtype=torch.float64, device=x.device)
    for _, slots, result, _ in passes(x, routing, experts, rounding):
        rows[slots] = result.row
    weights = experts.combining(routing.weights)
    shared = None if experts.shared is None else forward(x.double(), experts.shared, experts.activation, rounding).row
    return finalize(rows.view(tokens, top_k, x.shape[1]), weights, rounding, shared)
