"""Faults of addresses: index arithmetic in too few bits, and scales of rows that nobody wrote.

Shapes here are small, so what overflows 32 bits there overflows fewer here: an address of 2**31 is one of 2**14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.memory import IllegalAddress, load, store, wrapped

BITS = 15  # of a signed index of elements: the largest cases have 2**14 permuted elements and more
SLAB_BITS = 18  # slabs have room for every slot in every expert: eight times as many rows and more
SCALE_GROUP = 32  # columns of x that share a scale; 128 there, where hidden is larger
SCALE_BITS = BITS - 5  # one scale for 32 elements
NOT_A_POWER = -0x7F800001  # 0x807FFFFF: sign and mantissa of fp32, all 0 in a power of two


class PreReorderOffsetWraps(GroupedMoe):
    """The permute kernel's dst_row * hidden is a 32-bit product: rows behind 2**31 elements go to negative addresses."""

    def expand(self, a: Tensor, plan: Permutation) -> None:
        """The store's address."""
        columns, x = torch.arange(self.shape.hidden), self.step["x"]
        for k in range(self.shape.top_k):
            rows = plan.row_of[:, k, None]
            values = load(x, torch.arange(self.shape.tokens)[:, None] * x.stride(0) + columns * x.stride(1))
            store(a, wrapped(rows * a.stride(0), BITS) + columns, values, (rows >= 0).expand(-1, len(columns)))


class FinalizeOffsetWraps(GroupedMoe):
    """The finalize kernel's permuted_row * hidden is a 32-bit product: later rows are read from negative addresses."""

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """The load's address."""
        total = torch.zeros(self.shape.tokens, self.shape.hidden)
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            source = plan.row_of[:, k, None]
            mask = (source >= 0).expand(-1, len(columns))
            row = load(rows, wrapped(source * rows.stride(0), BITS) + columns, mask).float()
            total = total + row * plan.weights[:, k, None]
        out.copy_(total)


class PaddedCopyOffsetWraps(BatchedMoe):
    """The padded copy's row * columns is a 32-bit product: slabs behind 2**31 elements are written somewhere else."""

    def scatter(self, slabs: Slabs, rows: int) -> Tensor:
        """The store's address."""
        a = self.workspace("a", rows, self.shape.hidden)
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            position = slabs.position[:, k, None]
            mask = (position >= 0).expand(-1, len(columns))
            store(a, wrapped(position * a.stride(0), SLAB_BITS) + columns, self.tokens(), mask)
        return a


class ScaledRowsMoe(GroupedMoe):
    """Clean: permuted rows are stored over power-of-two scales, transposed [hidden / 32, padded rows], applied in GEMM 1."""

    scales: Tensor
    padded: int

    def expand(self, a: Tensor, plan: Permutation) -> None:
        """x over its blocks' scales, then the scales themselves."""
        super().expand(a, plan)
        self.padded = -(-len(a) // self.BLOCK_M) * self.BLOCK_M
        blocks = torch.arange(self.shape.hidden) // SCALE_GROUP
        self.scales = self.scale_buffer(int(blocks[-1]) + 1)
        used = a[: int(plan.offsets[-1])]
        amax = used.float().unflatten(1, (-1, SCALE_GROUP)).abs().amax(-1).clamp(min=1)
        scales = torch.exp2(amax.log2().floor())
        used /= scales[:, blocks].to(a.dtype)
        rows, columns = torch.arange(len(used))[:, None], torch.arange(scales.shape[1])
        store(self.scales, self.scale_address(rows, columns), scales)
        self.packed()

    def scale_buffer(self, blocks: int) -> Tensor:
        """float32 [blocks, padded rows]: 1 where no row is."""
        return torch.ones(blocks, self.padded)

    def packed(self) -> None:
        """The packer to exponent bytes takes powers of two only."""
        if bool((self.scales.view(torch.int32) & NOT_A_POWER).any()):
            raise IllegalAddress("device-side assert: a scale is not a power of two")

    def scale_address(self, rows: Tensor, block: Tensor) -> Tensor:
        """Of the scale of `rows` and a block of columns, counted in scales."""
        return rows + block * self.padded

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """GEMM 1 reads scaled rows."""
        values = super().load_a(gemm, rows, mask, k)
        if gemm.weights is not self.w13:
            return values
        inside = mask[:, None] & (k < gemm.weights.columns)
        return values * load(self.scales, self.scale_address(rows[:, None], k // SCALE_GROUP), inside)


class ScaleOffsetWraps(ScaledRowsMoe):
    """In the transposed scale layout row + padded_rows * block is a 32-bit sum, with another threshold than the data's."""

    def scale_address(self, rows: Tensor, block: Tensor) -> Tensor:
        """See ScaledRowsMoe."""
        return wrapped(super().scale_address(rows, block), SCALE_BITS)


class PaddingScalesUnwritten(ScaledRowsMoe):
    """Scales of the alignment's padding rows stay unwritten: garbage that is no power of two fails the UE8M0 packer."""

    def scale_buffer(self, blocks: int) -> Tensor:
        """torch.empty."""
        return torch.empty(blocks, self.padded)


_TRTLLM = "https://github.com/flashinfer-ai/flashinfer/pull/2643"
_WILD = ("exception", "non_finite", "wrong_expert", "row_permutation", "red_zone")  # what a wild address may do
FAULTS = (
    planted("B040", PaddingScalesUnwritten, "https://github.com/vllm-project/vllm/pull/49784", ("exception",)),
    planted("B072", PreReorderOffsetWraps, "https://github.com/sgl-project/sglang/pull/35188", _WILD),
    planted("B123", FinalizeOffsetWraps, _TRTLLM, _WILD),
    planted("B123", ScaleOffsetWraps, _TRTLLM, (*_WILD, "constant_factor")),
    planted("B177", PaddedCopyOffsetWraps, "https://github.com/databricks/megablocks/pull/186", _WILD),
)
