"""Wrong layers: what kernels with one defect would write, rounded where a right kernel rounds and to the output dtype.

Each is a defect of a real report: a layout read in the wrong order, a tail not multiplied, a scale of the neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.faults.layer import Layer
from reference.activation import Activation
from reference.dispatch import dispatch
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.moe import finalize

TILE = 64  # rows and columns of one output tile of a small GEMM kernel
K_TAIL = 16  # the K of one tensor core instruction on 16-bit operands: what a loop over K // 16 leaves out
GARBAGE = 8  # columns: one 16-byte store of bf16
STEPWISE_TERMS = 2**28  # multiply-adds beyond which a sum taken term by term is not emulated (about ten seconds)


@dataclass(frozen=True)
class WrongLayer:
    """`make(layer)` -> [tokens, hidden] in the layer's output dtype; None where the defect cannot occur in this layer."""

    name: str
    text: str
    make: Callable[[Layer], Tensor | None]


def zeros(layer: Layer) -> Tensor:
    """Nothing was computed."""
    return torch.zeros_like(layer.right)


def stale(layer: Layer) -> Tensor:
    """The answer to the previous call's tokens."""
    return layer.run(x=layer.previous)


def gate_up_swap(layer: Layer) -> Tensor | None:
    """The halves of w13 in the other order."""

    def swapped(expert: int) -> ExpertWeights:
        weights = layer.experts.weights(expert)
        assert weights.up is not None
        return replace(weights, gate=weights.up, up=weights.gate)

    return layer.run(experts=layer.with_weights(swapped)) if layer.experts.activation.gated else None


def dropped_slot(layer: Layer) -> Tensor:
    """The last of the top-k experts of every token is left out."""
    weights = layer.routing.weights.clone()
    weights[:, -1] = 0
    return layer.run(routing_weights=weights)


def dropped_expert(layer: Layer) -> Tensor:
    """One expert contributes nothing."""
    return layer.run(routing_weights=torch.where(layer.routing.ids == layer.chosen, 0.0, layer.routing.weights))


def scaled_expert(factor: float) -> Callable[[Layer], Tensor]:
    """One expert's down projection is read with a scale `factor` times too large."""

    def make(layer: Layer) -> Tensor:
        def scaled(expert: int) -> ExpertWeights:
            weights = layer.experts.weights(expert)
            return replace(weights, down=weights.down * factor) if expert == layer.chosen else weights

        return layer.run(experts=layer.with_weights(scaled))

    return make


def expert_permutation(layer: Layer) -> Tensor | None:
    """Every expert is computed with the weights of the next one."""
    count = layer.experts.count
    return layer.run(experts=layer.with_weights(lambda e: layer.experts.weights((e + 1) % count))) if count > 1 else None


def scale_roll(layer: Layer) -> Tensor | None:
    """Scales one block off along K, or along the rows where a row has one scale; the next expert's where a matrix has one."""
    quantised = layer.quantised
    if quantised is None:
        return None

    def rolled(expert: int) -> ExpertWeights:
        neighbours = quantised((expert + 1) % layer.experts.count)
        pairs = zip(quantised(expert), neighbours, strict=True)
        gate, up, down = (None if q is None else _decode_rolled(q, other) for q, other in pairs)
        assert gate is not None
        assert down is not None
        return replace(layer.experts.weights(expert), gate=gate, up=up, down=down)

    return layer.run(experts=layer.with_weights(rolled))


def _decode_rolled(q: Quantized, other: Quantized | None) -> Tensor:
    assert q.scales is not None
    assert other is not None
    rows, columns = q.scales.shape
    scales = other.scales if rows * columns == 1 else q.scales.roll(1, dims=1 if columns > 1 else 0)
    return q.format.decode(replace(q, scales=scales))


def dropped_k_tail(layer: Layer) -> Tensor:
    """GEMM 1 leaves out the last columns of hidden."""
    x = layer.x.clone()
    x[:, -K_TAIL:] = 0
    return layer.run(x=x)


def dropped_middle_tail(layer: Layer) -> Tensor:
    """GEMM 2 leaves out the last neurons."""

    def cut(expert: int) -> ExpertWeights:
        weights = layer.experts.weights(expert)
        down = weights.down.clone()
        down[:, -K_TAIL:] = 0
        return replace(weights, down=down)

    return layer.run(experts=layer.with_weights(cut))


def wrong_tile(layer: Layer) -> Tensor:
    """The last tile of the output is its left neighbour's; zeros where it has none."""
    wrong = layer.right.clone()
    rows, columns = ((size - 1) // TILE * TILE for size in wrong.shape)
    width = wrong.shape[1] - columns
    wrong[rows:, columns:] = wrong[rows:, columns - TILE : columns - TILE + width] if columns else 0
    return wrong


def wrong_row(layer: Layer) -> Tensor:
    """One token has the answer of the next; zeros where it is the only one."""
    wrong = layer.right.clone()
    token = layer.draw % len(wrong)
    wrong[token] = wrong[(token + 1) % len(wrong)] if len(wrong) > 1 else 0
    return wrong


def tail_garbage(layer: Layer) -> Tensor:
    """The last columns hold what other columns should."""
    wrong = layer.right.clone()
    wrong[:, -GARBAGE:] = layer.right[:, :GARBAGE].flip(1)
    return wrong


def relu_for_activation(layer: Layer) -> Tensor:
    """The gate goes through relu."""
    return layer.run(experts=replace(layer.experts, activation=_relu(layer.experts.activation)))


def _relu(activation: Activation) -> Activation:
    return replace(activation, scalar=torch.relu)


def not_renormalised(layer: Layer) -> Tensor | None:
    """The routing weights are not divided by their sum."""
    return None if layer.unnormalised is None else layer.run(routing_weights=layer.unnormalised)


def bf16_accumulation(layer: Layer) -> Tensor | None:
    """Both GEMMs keep their running sums in bf16, rounded after every term."""
    tokens, top_k = layer.routing.ids.shape
    first = layer.experts.weights(layer.active[0])
    if 3 * tokens * top_k * first.down.numel() > STEPWISE_TERMS:
        return None
    rounding, activation = layer.rounding, layer.experts.activation
    rows = torch.zeros(tokens * top_k, layer.x.shape[1], dtype=torch.float64)
    groups = dispatch(layer.routing.ids, layer.experts.count)
    for expert in layer.active:
        slots, weights = groups.slots(expert), layer.experts.weights(expert)
        x = rounding.at("x", layer.x[slots // top_k].double())
        gate = rounding.at("gate_up", _stepwise(x, weights.gate))
        middle = rounding.at("activated", activation.scalar(gate))
        if weights.up is not None:
            middle = middle * activation.linear(rounding.at("gate_up", _stepwise(x, weights.up)))
        rows[slots] = rounding.at("row", _stepwise(rounding.at("middle", middle), weights.down))
    return finalize(rows.view(tokens, top_k, -1), layer.routing.weights, rounding).to(layer.out)


def _stepwise(a: Tensor, b: Tensor) -> Tensor:
    """a [rows, K] @ b [columns, K].T, float64, the running sum rounded to bf16 after each of the K terms."""
    left, right = a.float(), b.float()
    total = torch.zeros(len(a), len(b))
    for k in range(a.shape[1]):
        total = torch.addr(total, left[:, k], right[:, k]).bfloat16().float()
    return total.double()


WRONG_LAYERS = (
    WrongLayer("zeros", "all zeros", zeros),
    WrongLayer("stale", "the previous call's output", stale),
    WrongLayer("gate_up_swap", "gate and up swapped", gate_up_swap),
    WrongLayer("dropped_slot", "one top-k slot dropped", dropped_slot),
    WrongLayer("dropped_expert", "one expert dropped", dropped_expert),
    WrongLayer("expert_x1.03", "one expert's scale x 1.03", scaled_expert(1.03)),
    WrongLayer("expert_x1.5", "one expert's scale x 1.5", scaled_expert(1.5)),
    WrongLayer("expert_x2", "one expert's scale x 2", scaled_expert(2.0)),
    WrongLayer("expert_permutation", "next expert's weights", expert_permutation),
    WrongLayer("scale_roll", "block scales one block off", scale_roll),
    WrongLayer("dropped_k_tail", "last 16 of hidden not summed", dropped_k_tail),
    WrongLayer("dropped_middle_tail", "last 16 neurons not summed", dropped_middle_tail),
    WrongLayer("wrong_tile", "one 64 x 64 tile wrong", wrong_tile),
    WrongLayer("wrong_row", "one row wrong", wrong_row),
    WrongLayer("tail_garbage", "last 8 columns wrong", tail_garbage),
    WrongLayer("bf16_accumulation", "sums kept in bf16", bf16_accumulation),
    WrongLayer("relu_for_activation", "relu for the activation", relu_for_activation),
    WrongLayer("not_renormalised", "routing weights not renormalised", not_renormalised),
)


def wrong_outputs(layer: Layer, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Name -> output of every wrong layer (or the named ones) that can occur here and differs, in some bit, from the right
    output. One that writes what a right kernel writes is not wrong in this case: no test could see it."""
    made = {wrong.name: wrong.make(layer) for wrong in WRONG_LAYERS if not names or wrong.name in names}
    return {name: output for name, output in made.items() if output is not None and not torch.equal(output, layer.right)}
