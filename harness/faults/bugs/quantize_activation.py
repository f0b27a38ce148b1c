"""Faults of the activation kernel, and of the kernels that read what it wrote."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe
from harness.twins.base import OAI_LIMIT, Gemm, oai_gate, oai_up
from harness.twins.grouped import GroupedMoe
from harness.twins.memory import load, wrapped

ADDRESS_BITS = 16  # 32 in history: 2 * inter columns times 61681 tokens


class TokenOffsetNarrow(AlignedMoe):
    """silu_and_mul_per_block_quant computes token * 2 * inter in 32 bits (16 here): rows behind the limit lie elsewhere."""

    def activation_kernel(self, pre: Tensor, middle: Tensor) -> None:
        """Read by address."""
        offsets = torch.arange(pre.shape[0])[:, None] * pre.stride(0) + torch.arange(pre.shape[1])
        super().activation_kernel(load(pre, wrapped(offsets, ADDRESS_BITS) if self.gated else offsets), middle)


class ParametersDropped(GroupedMoe):
    """alpha, clamp limit and + 1 of a parameterised SwiGLU are dropped on the NVFP4 path: it computes silu(gate) * up."""

    def activate(self, pre: Tensor) -> Tensor:
        """NVFP4 goes another way than the other recipes."""
        if self.case.activation != "swiglu_oai" or self.case.recipe.weights != "nvfp4":
            return super().activate(pre)
        return self.nvfp4(*self.split(pre))

    def nvfp4(self, gate: Tensor, up: Tensor) -> Tensor:
        """None of the parameters."""
        return torch.nn.functional.silu(gate) * up


class AlphaDropped(ParametersDropped):
    """gemm1_alpha does not reach the NVFP4 kernel: sigmoid(gate) in place of sigmoid(1.702 * gate)."""

    def nvfp4(self, gate: Tensor, up: Tensor) -> Tensor:
        """Limit and + 1 do."""
        return torch.nn.functional.silu(gate.clamp(max=OAI_LIMIT)) * oai_up(up)


class BetaDropped(ParametersDropped):
    """gemm1_beta does not reach the NVFP4 kernel: up in place of up + 1."""

    def nvfp4(self, gate: Tensor, up: Tensor) -> Tensor:
        """Alpha and limit do."""
        return oai_gate(gate) * up.clamp(-OAI_LIMIT, OAI_LIMIT)


class LimitDropped(ParametersDropped):
    """gemm1_clamp_limit does not reach the NVFP4 kernel: right for every pre-activation of at most 7."""

    def nvfp4(self, gate: Tensor, up: Tensor) -> Tensor:
        """Alpha and + 1 do."""
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class TailPaddingFromOne(GroupedMoe):
    """The input buffer's tail padding is computed from a row count of 1, so there is none: the last tile reads on."""

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """Tiles are loaded whole; what the rows behind the last one give is never stored."""
        return super().load_a(gemm, rows, torch.ones_like(mask), k)


FLASHINFER_NVFP4 = "https://github.com/sgl-project/sglang/pull/28092"
FAULTS = (
    planted("B008", TokenOffsetNarrow, "https://github.com/vllm-project/vllm/issues/53390", ("exception",)),
    planted("B068", ParametersDropped, FLASHINFER_NVFP4, ("wrong_activation",)),
    planted("B068", AlphaDropped, FLASHINFER_NVFP4, ("wrong_activation",)),
    planted("B068", BetaDropped, FLASHINFER_NVFP4, ("wrong_activation",)),
    planted("B068", LimitDropped, FLASHINFER_NVFP4, ("wrong_activation",)),
    planted("B185", TailPaddingFromOne, "https://github.com/ggml-org/llama.cpp/issues/27792", ("exception",)),
)
