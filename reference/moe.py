"""The whole Mixture-of-Experts layer in float64, one expert after another, every rounding point named.

y[t] = sum over k of weight[t, k] * down_e @ act(gate_e @ x[t], up_e @ x[t]),   e = ids[t, k]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reference.activation import Activation
from reference.dispatch import dispatch
from reference.experts import ExpertPass, ExpertWeights, forward
from reference.rounding import IDEAL, Rounding
from reference.routing import Routing

WeightSource = Callable[[int], ExpertWeights]  # decodes one expert's weights when asked, so memory stays linear in one


def passes(
    x: Tensor, routing: Routing, weights: WeightSource, experts: int, activation: Activation, rounding: Rounding = IDEAL
) -> Iterator[tuple[int, Tensor, ExpertPass, ExpertWeights]]:
    """(expert, slots, pass, weights) of every expert that received a token; slot = token * top_k + k."""
    groups = dispatch(routing.ids, experts)
    top_k = routing.ids.shape[1]
    for expert in groups.offsets.diff().nonzero().flatten().tolist():
        slots = groups.slots(expert)
        decoded = weights(expert)
        yield expert, slots, forward(x[slots // top_k].double(), decoded, activation, rounding), decoded


def finalize(rows: Tensor, weights: Tensor, rounding: Rounding = IDEAL) -> Tensor:
    """Sum rows [tokens, top_k, hidden] with weights [tokens, top_k] in slot order; [tokens, hidden] float64."""
    weights = rounding.at("routing_weight", weights)
    total = rows.new_zeros(rows.shape[0], rows.shape[2])
    for k in range(rows.shape[1]):
        weighted = rounding.at("weighted", rows[:, k] * weights[:, k, None])
        total = rounding.at("partial", total + weighted)
    return rounding.at("out", total)


def moe(
    x: Tensor, routing: Routing, weights: WeightSource, experts: int, activation: Activation, rounding: Rounding = IDEAL
) -> Tensor:
    """The layer: x [tokens, hidden] in any float dtype -> [tokens, hidden] float64, as `rounding` says it is computed."""
    tokens, top_k = routing.ids.shape
    rows = torch.zeros(tokens * top_k, x.shape[1], dtype=torch.float64, device=x.device)
    for _, slots, result, _ in passes(x, routing, weights, experts, activation, rounding):
        rows[slots] = result.row
    return finalize(rows.view(tokens, top_k, x.shape[1]), routing.weights, rounding)
