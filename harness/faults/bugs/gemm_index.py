"""Grouped GEMMs: offsets computed in too narrow an integer: 32 bits in history, 16 here, where tensors are small."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.grouped import GroupedMoe
from harness.twins.memory import load, store, wrapped
from harness.twins.weights import Stack

BITS = 16


class StoreOffsetWraps(AlignedMoe):
    """token_index * size_n + offset_n is unsigned and too narrow: late rows are stored over early ones."""

    def write(self, gemm: Gemm, total: Tensor, rows: Tensor, mask: Tensor, tile: int) -> None:
        """Historically modulo 2**32; here half of the signed range, so that both overflows start at the same element."""
        columns = tile * self.BLOCK_N + torch.arange(self.BLOCK_N)
        inside = mask[:, None] & (columns < gemm.weights.rows)
        offsets = (rows[:, None] * gemm.out.stride(0) + columns) % (1 << (BITS - 1))
        store(gemm.out, offsets, total, inside)


class RowOffsetOverflows(AlignedMoe):
    """row_offs * stride is a signed product in too narrow an integer: rows behind the limit have negative addresses."""

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """The product wraps, the column is added to a pointer."""
        inside = mask[:, None] & (k < gemm.weights.columns)
        return load(gemm.a, wrapped(rows[:, None] * gemm.a.stride(0), BITS) + k, inside).float()

    def write(self, gemm: Gemm, total: Tensor, rows: Tensor, mask: Tensor, tile: int) -> None:
        """As in load_a."""
        columns = tile * self.BLOCK_N + torch.arange(self.BLOCK_N)
        inside = mask[:, None] & (columns < gemm.weights.rows)
        store(gemm.out, wrapped(rows[:, None] * gemm.out.stride(0), BITS) + columns, total, inside)


class NarrowExpertOffset(Stack):
    """Weights addressed by an expert offset that wraps."""

    def code_offsets(self, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """The offset within an expert's matrix is wide enough."""
        base = wrapped(torch.tensor(expert * self.rows * self.columns), BITS)
        return base + (n * self.columns)[:, None] + k


class ExpertOffsetOverflows(GroupedMoe):
    """expert_idx * stride_w_E overflows: the weights of high experts are read from before the tensor, at any batch size."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Both projections."""
        w13, w2 = super().pack(inputs)
        return NarrowExpertOffset(**vars(w13)), NarrowExpertOffset(**vars(w2))


FAULTS = (
    planted(
        "B009",
        StoreOffsetWraps,
        "https://github.com/vllm-project/vllm/issues/45884",
        ("non_finite", "nan_from_padding", "never_written", "poison", "row_permutation", "wrong_expert"),
    ),
    planted("B192", RowOffsetOverflows, "https://github.com/linkedin/Liger-Kernel/pull/1248", ("exception", "red_zone")),
    planted(
        "B193",
        ExpertOffsetOverflows,
        "https://github.com/linkedin/Liger-Kernel/issues/1296",
        ("exception", "wrong_expert", "non_finite", "poison"),
    ),
)
