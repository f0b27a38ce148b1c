"""One expert in float64, keeping what happens on the way: the oracle, the bounds and the impostors all read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

from reference.activation import Activation
from reference.rounding import IDEAL, Rounding


@dataclass(frozen=True)
class ExpertWeights:
    """Decoded weights of one expert, float64: gate and up [intermediate, hidden] (up None when not gated),
    down [hidden, intermediate]; biases [intermediate] and [hidden], added to what GEMMs sum up, or None. Of several experts
    at once: a leading axis, biases [experts, 1, ...]."""

    gate: Tensor
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertPass:
    """x [rows, hidden] through one expert: gate, up, middle [rows, intermediate] and row [rows, hidden], float64. Of several
    experts at once: a leading axis."""

    x: Tensor
    gate: Tensor
    up: Tensor | None
    middle: Tensor
    row: Tensor


Parts = TypeVar("Parts", ExpertWeights, ExpertPass)


def mapped(change: Callable[[list[Tensor]], Tensor], parts: Sequence[Parts]) -> Parts:
    """change([gate of each, ...]), change([up of each, ...]), ...: what the parts have not, the result has not."""
    columns = ([getattr(part, f.name) for part in parts] for f in fields(parts[0]))
    return type(parts[0])(*(None if column[0] is None else change(column) for column in columns))  # type: ignore[arg-type]


def forward(x: Tensor, weights: ExpertWeights, activation: Activation, rounding: Rounding = IDEAL) -> ExpertPass:
    """row = down @ act(gate @ x, up @ x), each intermediate passing through its rounding point."""
    x = rounding.at("x", x)
    gate = rounding.at("gate_up", linear(x, weights.gate, weights.gate_bias, rounding))
    up = None if weights.up is None else rounding.at("gate_up", linear(x, weights.up, weights.up_bias, rounding))
    middle = combined(gate, up, activation, rounding)
    return ExpertPass(x, gate, up, middle, rounding.at("row", linear(middle, weights.down, weights.down_bias, rounding)))


def combined(gate: Tensor, up: Tensor | None, activation: Activation, rounding: Rounding) -> Tensor:
    """The input of GEMM 2 [rows, intermediate] from what GEMM 1 wrote, float64."""
    middle = rounding.at("activated", activation.scalar(gate))
    if up is not None:
        middle = middle * activation.linear(up)
    return rounding.at("middle", middle)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding = IDEAL) -> Tensor:
    """x [rows, in] @ weight [out, in].T, through the point "product", plus bias [out]."""
    product = rounding.at("product", x @ weight.mT)
    return product if bias is None else product + bias


def product_of(total: Tensor, bias: Tensor | None) -> Tensor:
    """What was summed up before the bias was added."""
    return total if bias is None else total - bias
