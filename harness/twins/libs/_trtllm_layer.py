"""The fused layer of trtllm-gen: rows permuted expert by expert, GEMM 1 with the activation in its epilogue, GEMM 2, finalize.

Source: FlashInfer 0.7.2.post1 data/csrc/trtllm_fused_moe_{runner,kernel_launcher}.cu, fused_moe/trtllm_backend/
trtllm_fused_moe_dev_kernel.cu and include/flashinfer/trtllm/batched_gemm/KernelRunner.h (the formulas of the epilogues).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from harness.twins.libs._trtllm_routing import shared
from harness.twins.libs._trtllm_weights import Matrix, Weights
from harness.twins.libs.flashinfer_enums import ActivationType
from reference.formats import get

TILE_TOKENS = 8  # the smallest tile of every launcher: mSupportedTileNums
LEAST_BYTES = 128 * 1024  # of GEMM 2's output: maybeGetMinTokenCount
STEP_LIMIT = 7.0  # SwigluStep's without a limit
NOWHERE = -1  # the permuted index of another rank's slot


def as_bf16(x: Tensor) -> Tensor:
    """float32 rounded to bf16."""
    return x.bfloat16().float()


def through(name: str, scale: float | None = None) -> Callable[[Tensor], Tensor]:
    """float32 [rows, columns] quantised to a format and read back; `scale`: its global scale."""
    fmt = get(name)

    def requantise(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        given = None if scale is None else torch.tensor(scale)
        return fmt.decode(fmt.encode(x, given), torch.float32)

    return requantise


def e4m3(x: Tensor) -> Tensor:
    """float32 rounded to E4M3, saturating: a per-tensor scale has been multiplied in already."""
    element = get("fp8_tensor").element
    return element.decode(element.encode(x), torch.float32)


@dataclass(frozen=True)
class Epilogue:
    """What happens to GEMM 1's accumulators, and to GEMM 2's.

    scale, gate, second: float32 [local experts] or None for ones: what the linear half (the activated value where nothing is
    gated), the gate half and GEMM 2's accumulator are multiplied by. alpha, beta, limit: per expert, or None. narrow: how
    GEMM 1's output is kept before an activation of its own kernel; middle: how GEMM 2 reads its input.
    """

    activation: ActivationType
    middle: Callable[[Tensor], Tensor]
    scale: Tensor | None = None
    gate: Tensor | None = None
    second: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    limit: Tensor | None = None
    narrow: Callable[[Tensor], Tensor] | None = None

    def activate(self, total: Tensor, e: int) -> Tensor:
        """float32 [rows, inter] of accumulators [rows, 2 * inter], linear half first, or [rows, inter]."""
        scale, gate_scale = _of(self.scale, e, 1.0), _of(self.gate, e, 1.0)
        if not self.activation.is_gated:
            x = total * gate_scale
            return scale * (torch.relu(x).square() if self.activation is ActivationType.Relu2 else x)
        linear, gate = total.chunk(2, dim=-1)
        if self.narrow is not None:
            linear, gate = self.narrow(linear), self.narrow(gate)
        gate = gate * gate_scale
        if self.activation is ActivationType.Situ:
            return scale * self._situ(linear * gate_scale, gate, e)
        return self._glu(linear, gate, e, gate_scale) * scale

    def _glu(self, linear: Tensor, gate: Tensor, e: int, gate_scale: float) -> Tensor:
        if self.activation is ActivationType.Geglu:
            return linear * gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5))
        if self.activation is ActivationType.SwigluStep:  # its limit is in units of the accumulator
            raw = _of(self.limit, e, STEP_LIMIT / gate_scale)
            return linear.clamp(-raw, raw) * (gate * torch.sigmoid(gate)).clamp(max=raw * gate_scale)
        alpha, beta, limit = _of(self.alpha, e, 1.0), _of(self.beta, e, 0.0), _of(self.limit, e, torch.inf)
        gate = gate.clamp(max=limit)
        return (linear.clamp(-limit, limit) + beta) * (gate * torch.sigmoid(alpha * gate))

    def _situ(self, linear: Tensor, gate: Tensor, e: int) -> Tensor:
        alpha, beta, limit = _of(self.alpha, e, 1.0), _of(self.beta, e, 1.0), _of(self.limit, e, torch.inf)
        linear, gate = linear.clamp(-limit, limit), gate.clamp(max=limit)
        return beta * torch.tanh(linear / beta) * (alpha * torch.tanh(gate / alpha)) * torch.sigmoid(gate)


def _of(values: Tensor | None, e: int, default: float) -> float:
    return default if values is None else float(values[e])


def padded_rows(tokens: int, top_k: int, experts: int) -> int:
    """getMaxPermutedPaddedCount: rows for every way in which slots can fall on experts."""
    slots = tokens * top_k
    filled = min(experts, slots)
    return (filled + (slots - filled) // TILE_TOKENS) * TILE_TOKENS


def run(a: SimpleNamespace, x: Tensor, routing: tuple[Tensor, Tensor], weights: Weights, epilogue: Epilogue) -> list[Tensor]:
    """[output], or without finalize [GEMM 2's rows, expert weights, expanded index -> permuted index or -1].

    x: float32 [tokens, hidden] as GEMM 1 reads it. Rows of GEMM 2's output that no slot maps to stay as they were.
    """
    ids, expert_weights = routing
    tokens, hidden = x.shape
    top_k = a.top_k + shared(a)
    index = torch.full((tokens * top_k,), NOWHERE, dtype=torch.int32)
    least = -(-LEAST_BYTES // (2 * hidden))
    rows = torch.empty(max(padded_rows(tokens, top_k, a.num_experts + shared(a)), least), hidden, dtype=torch.bfloat16)
    local = (ids - a.local_expert_offset).flatten()
    first, on_input = 0, getattr(a, "use_routing_scales_on_input", False)
    for e in range(a.local_num_experts + shared(a)):
        slots = (local == e).nonzero().flatten()
        if not len(slots):
            continue
        mine = torch.arange(first, first + len(slots))
        index[slots] = mine.int()
        total = _plus(x[slots // top_k] @ weights.first(e).T, weights.biases[0], e)
        if on_input:
            total = total * expert_weights.flatten()[slots, None].float()
        middle = epilogue.middle(epilogue.activate(total, e))
        done = _plus(middle @ weights.second(e).T, weights.biases[1], e)
        rows[mine] = (done * _of(epilogue.second, e, 1.0)).bfloat16()
        first += -(-len(slots) // TILE_TOKENS) * TILE_TOKENS
    if not a.do_finalize:
        return [rows, expert_weights, index]
    return [finalize(rows, torch.ones_like(expert_weights) if on_input else expert_weights, index, given=a.output)]


def _plus(total: Tensor, bias: Matrix | None, e: int) -> Tensor:
    """Sums with a rank's expert's bias, in the accumulator."""
    return total if bias is None else total + bias(e)


def finalize(rows: Tensor, expert_weights: Tensor, index: Tensor, given: Tensor | None) -> Tensor:
    """bf16 [tokens, hidden]: the slots' rows times their weights, summed in fp32; `given` is written one row after another,
    whatever its strides."""
    tokens, top_k = expert_weights.shape
    output = torch.empty(tokens, rows.shape[1], dtype=torch.bfloat16) if given is None else given
    total = torch.zeros(tokens, rows.shape[1])
    for k in range(top_k):
        at = index.view(tokens, top_k)[:, k].long()
        picked = rows[at.clamp(min=0)].float() * expert_weights[:, k, None].float()
        total = torch.where((at >= 0)[:, None], total + picked, total)
    torch.as_strided(output, total.shape, (rows.shape[1], 1)).copy_(total)
    return output
