"""Activations between the two GEMMs, on logical (gate, up) in any float dtype, and the physical orders of the halves.

Source of the formulas: FlashInfer ActivationType (csrc/nv_internal), gpt-oss model code for the clamped SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OAI_ALPHA, OAI_LIMIT, OAI_BETA = 1.702, 7.0, 1.0  # gpt-oss-20b config.json: swiglu_limit; alpha and beta in its modeling code
SATURATED = 32.0  # silu(g) = g in fp32 for g >= 17, gelu(g) = g for g >= 6: 1 + exp(-17) rounds to 1 in 24 bits


@dataclass(frozen=True)
class Activation:
    """`scalar(gate)` is what the gate half goes through; `combine(gate, up)` is the whole, up being None when not gated.

    `exact` says that for gate in {0} and [SATURATED, ..) the result is gate (times up) without rounding.
    """

    name: str
    gated: bool
    exact: bool
    scalar: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]

    def combine(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """act(gate) [* linear(up)]; shapes [rows, intermediate]."""
        activated = self.scalar(gate)
        return activated if up is None else activated * self.linear(up)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the erf form."""
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def oai_gate(g: Tensor) -> Tensor:
    """min(g, 7) * sigmoid(1.702 * min(g, 7)): no lower clamp."""
    clamped = g.clamp(max=OAI_LIMIT)
    return clamped * torch.sigmoid(OAI_ALPHA * clamped)


def oai_up(u: Tensor) -> Tensor:
    """clamp(u, -7, 7) + 1."""
    return u.clamp(-OAI_LIMIT, OAI_LIMIT) + OAI_BETA


def _same(x: Tensor) -> Tensor:
    return x


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("swiglu", True, True, silu, _same),
        Activation("swiglu_oai", True, False, oai_gate, oai_up),
        Activation("geglu", True, True, gelu, _same),
        Activation("silu", False, True, silu, _same),
        Activation("relu", False, True, torch.relu, _same),
        Activation("gelu", False, True, gelu, _same),
        Activation("gelu_tanh", False, True, gelu_tanh, _same),
        Activation("identity", False, True, _same, _same),
    )
}

HALF_ORDERS = ("gate_up", "up_gate", "interleaved")


def join_halves(gate: Tensor, up: Tensor, order: str, dim: int = 0) -> Tensor:
    """Lay gate and up out along `dim` in one of HALF_ORDERS; interleaved is g0, u0, g1, u1, ... (gpt-oss)."""
    if order == "interleaved":
        return torch.stack((gate, up), dim=dim + 1).flatten(dim, dim + 1)
    if order not in HALF_ORDERS:
        raise ValueError(f"half order {order!r} unknown; known: {', '.join(HALF_ORDERS)}")
    return torch.cat((gate, up) if order == "gate_up" else (up, gate), dim=dim)


def split_halves(both: Tensor, order: str, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Inverse of `join_halves`: (gate, up) views."""
    if order == "interleaved":
        gate, up = both.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
        return gate, up
    first, second = both.chunk(2, dim=dim)
    return (first, second) if order == "gate_up" else (second, first)
