"""Activations between the two GEMMs, on logical (gate, up) in any float dtype, and the physical orders of the halves.

Source of the formulas: FlashInfer ActivationType (csrc/nv_internal) and its SwiGLU, SiTU, SwiGLUStep and ClampedRelu2
configurations, gpt-oss model code for the clamped SwiGLU. Parameters are data: a family below makes the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

OAI_ALPHA, OAI_LIMIT, OAI_BETA = 1.702, 7.0, 1.0  # gpt-oss-20b config.json: swiglu_limit; alpha and beta in its modeling code
STEP_LIMIT = 7.0  # FlashInfer SwiGLUStep.limit
SITU_BETA, SITU_LINEAR_BETA = 4.0, 25.0  # FlashInfer SiTU.gate_scale and .linear_scale; trtllm-gen's own defaults are 1
SATURATED = 32.0  # silu(g) = g in fp32 for g >= 17, gelu(g) = g for g >= 6: 1 + exp(-17) rounds to 1 in 24 bits


@dataclass(frozen=True)
class Activation:
    """`scalar(gate)` is what the gate half goes through; `combine(gate, up)` is the whole, up being None when not gated.

    `exact` says that for gate in {0} and [SATURATED, ..) the result is gate (times up) without rounding. `parameters`
    are the constants it was made with.
    """

    name: str
    gated: bool
    exact: bool
    scalar: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    parameters: dict[str, float] = field(default_factory=dict, hash=False)

    def combine(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """act(gate) [* linear(up)]; shapes [rows, intermediate]."""
        activated = self.scalar(gate)
        return activated if up is None else activated * self.linear(up)

    @property
    def passes_factors(self) -> bool:
        """Is act(c * gate, c * up) = c * act(gate, up) for c > 0?"""
        x = torch.tensor([-3.0, 0.5, 20.0], dtype=torch.float64)
        once, twice = (self.combine(t, t if self.gated else None) for t in (x, 2 * x))
        return torch.equal(twice, 2 * once)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the erf form."""
    return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def relu2(x: Tensor) -> Tensor:
    """relu(x)**2."""
    return torch.relu(x).square()


def _same(x: Tensor) -> Tensor:
    return x


def swiglu_bias(name: str, alpha: float = 1.0, beta: float = 0.0, limit: float = torch.inf) -> Activation:
    """min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + beta): the gate has no lower clamp.
    The defaults are FlashInfer's, and swiglu."""

    def gate(g: Tensor) -> Tensor:
        clamped = g.clamp(max=limit)
        return clamped * torch.sigmoid(alpha * clamped)

    def up(u: Tensor) -> Tensor:
        return u.clamp(-limit, limit) + beta

    plain = beta == 0 and limit == torch.inf and alpha >= 1
    return Activation(name, True, plain, gate, up, {"alpha": alpha, "beta": beta, "limit": limit})


def swiglu_step(name: str, limit: float = STEP_LIMIT) -> Activation:
    """min(silu(g), limit) * clamp(u, -limit, limit): clamped after the sigmoid, where swiglu_bias clamps before it."""

    def gate(g: Tensor) -> Tensor:
        return silu(g).clamp(max=limit)

    def up(u: Tensor) -> Tensor:
        return u.clamp(-limit, limit)

    return Activation(name, True, limit == torch.inf, gate, up, {"limit": limit})


def situ(name: str, beta: float = SITU_BETA, linear_beta: float = SITU_LINEAR_BETA, limit: float = torch.inf) -> Activation:
    """beta * tanh(g / beta) * sigmoid(g) * linear_beta * tanh(u / linear_beta), with g clamped from above and u from both
    sides first. linear_beta inf leaves u alone. trtllm-gen calls the two alpha (gate) and beta (up)."""

    def gate(g: Tensor) -> Tensor:
        clamped = g.clamp(max=limit)
        return beta * torch.tanh(clamped / beta) * torch.sigmoid(clamped)

    def up(u: Tensor) -> Tensor:
        clamped = u.clamp(-limit, limit)
        return clamped if linear_beta == torch.inf else linear_beta * torch.tanh(clamped / linear_beta)

    return Activation(name, True, False, gate, up, {"beta": beta, "linear_beta": linear_beta, "limit": limit})


def clamped_relu2(name: str, limit: float) -> Activation:
    """(limit * tanh(relu(x) / limit))**2; FlashInfer has no default limit."""

    def scalar(x: Tensor) -> Tensor:
        return (limit * torch.tanh(torch.relu(x) / limit)).square()

    return Activation(name, False, False, scalar, _same, {"limit": limit})


_OAI = swiglu_bias("swiglu_oai", OAI_ALPHA, OAI_BETA, OAI_LIMIT)
oai_gate, oai_up = _OAI.scalar, _OAI.linear  # min(g, 7) * sigmoid(1.702 * min(g, 7)) and clamp(u, -7, 7) + 1

ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("swiglu", True, True, silu, _same),
        _OAI,
        swiglu_step("swiglu_step"),
        Activation("geglu", True, True, gelu, _same),
        Activation("geglu_tanh", True, True, gelu_tanh, _same),
        situ("situ"),
        Activation("silu", False, True, silu, _same),
        Activation("relu", False, True, torch.relu, _same),
        Activation("relu2", False, False, relu2, _same),
        clamped_relu2("clamped_relu2", limit=7.0),
        Activation("gelu", False, True, gelu, _same),
        Activation("gelu_tanh", False, True, gelu_tanh, _same),
        Activation("identity", False, True, _same, _same),
    )
}

HALF_ORDERS = ("gate_up", "up_gate", "interleaved")


@dataclass(frozen=True)
class HalfOrder:
    """How a library wants the rows of the first weight: `order` is one of HALF_ORDERS; with `block`, that many rows of the
    first half alternate with as many of the second."""

    order: str
    source: str
    block: int | None = None


LIBRARY_ORDERS = {
    "flashinfer.cutlass": HalfOrder("up_gate", "cutlass_fused_moe: first half linear, second half gate"),
    "flashinfer.trtllm": HalfOrder("up_gate", "trtllm_*_moe before reorder_rows_for_gated_act_gemm"),
    "flashinfer.moe_layer": HalfOrder("up_gate", "MoELayer canonical w1 [E, 2I, H]"),
    "flashinfer.cute_dsl_nvfp4": HalfOrder("up_gate", "cute_dsl_fused_moe: w1 interleaved in 64 rows", block=64),
    "flashinfer.cute_dsl_sm90": HalfOrder("up_gate", "interleave_up_gate_sm90", block=32),
    "flashinfer.silu_and_mul": HalfOrder("gate_up", "flashinfer.activation: silu(x[..., :d]) * x[..., d:]"),
    "flashinfer.mono_moe": HalfOrder("gate_up", "mono_moe: w13 rows before interleave_for_tma_wgmma_up"),
    "flashinfer.alphamoe": HalfOrder("gate_up", "alphamoe_interleave_gated_weights: 8 gate rows, 8 up rows", block=8),
    "vllm": HalfOrder("gate_up", "vLLM silu_and_mul and w13 = [w1, w3]"),
    "vllm.swigluoai": HalfOrder("interleaved", "vLLM MoEActivation.SWIGLUOAI: even rows gate, odd rows up"),
    "vllm.swigluoai_uninterleave": HalfOrder("gate_up", "vLLM MoEActivation.SWIGLUOAI_UNINTERLEAVE"),
    "triton_kernels": HalfOrder("interleaved", "triton_kernels.swiglu: even columns gate, odd columns linear"),
    "transformers": HalfOrder("gate_up", "gate_up_proj(x).chunk(2) of Mixtral, Qwen3-MoE, DeepSeek-V3, Llama4"),
    "transformers.gpt_oss": HalfOrder("interleaved", "GptOssExperts._apply_gate: gate_up[..., ::2], [..., 1::2]"),
    "onnxruntime": HalfOrder("interleaved", "com.microsoft.MoE with swiglu_fusion 1"),
    "onnxruntime.fused_halves": HalfOrder("gate_up", "com.microsoft.MoE with swiglu_fusion 2"),
}


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
