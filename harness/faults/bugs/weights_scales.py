"""Faults of weight preparation: block scales, their layout and padding, and the global scale above them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.bugs.weights_order import reread
from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.memory import load
from harness.twins.weights import Stack
from reference.layouts.swizzle_128x4 import COLUMNS, padded_shape, swizzle

E4M3_MAX, E2M1_MAX = 448.0, 6.0  # OCP 8-bit floating point v1.0, OCP MX v1.0
E4M3_OVERFLOW = 464.0  # halfway from 448 to 480, which would be the code of NaN
RANKS = 2  # tensor-parallel shards of the intermediate size

VLLM, SGLANG = (f"https://github.com/{repository}" for repository in ("vllm-project/vllm", "sgl-project/sglang"))


class ScaleOfRow(Stack):
    """The global scales of all experts, read as if they were one per row."""

    def factor(self, expert: int, n: Tensor) -> Tensor:
        """Entry n of a tensor of `experts` entries."""
        return load(self.factors, n % self.experts * self.rows, n < self.rows)


class ScaleOfFirst(Stack):
    """The global scales of all experts, of which entry 0 is taken."""

    def factor(self, expert: int, n: Tensor) -> Tensor:
        """As a scale of shape [1]."""
        return super().factor(0, n)


class GlobalScalesByRow(GroupedMoe):
    """A global scale of shape [experts] goes where [1] or [rows] is due: row n is decoded with the scale of expert n."""

    READ: ClassVar[type[Stack]] = ScaleOfRow

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """NVFP4 alone has a global scale."""
        stacks = super().pack(inputs)
        if stacks[0].fmt.name != "nvfp4":
            return stacks
        return reread(stacks[0], self.READ), reread(stacks[1], self.READ)


class GlobalScaleOfFirstExpert(GlobalScalesByRow):
    """A global scale of shape [experts] is taken for one of shape [1]: every expert is decoded with that of expert 0."""

    READ = ScaleOfFirst


class SwizzleUnpadded(BatchedMoe):
    """swizzle_blockscale views its padded buffer as the unpadded [rows, columns]: an error as soon as there is padding."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Rows not a multiple of 128, or scale columns not one of 4."""
        stacks = super().pack(inputs)
        for stack in stacks:
            if stack.scales is not None and stack.fmt.name == "nvfp4":
                stack.scales = stack.scales.view(stack.experts, stack.rows, stack.blocks).flatten()
        return stacks


class SwizzledAtLoadOnly(GroupedMoe):
    """MXFP4 scales are swizzled at load, but the call says swizzle_mx_scale=None: the kernel reads them row-major."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """The flag of the call, not of the layout."""
        w13, w2 = super().pack(inputs)
        linear = self.case.recipe.weights == "mxfp4"
        return replace(w13, swizzled=not linear), replace(w2, swizzled=not linear)


class CutAtShards(Stack):
    """Columns in RANKS shards, each of which counts its scale blocks from the block that its first column lies in."""

    def scale(self, expert: int, n: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Right where the first column of a shard is the first of a block."""
        first = k // (self.columns // RANKS) * (self.columns // RANKS)
        block = first // self.group + (k - first) // self.group
        return super().scale(expert, n, block * self.group, mask)


class ShardCutsScaleBlock(AlignedMoe):
    """Inter is sharded without padding to MXFP4's block of 32: a shard that starts inside a block counts blocks wrongly."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """The reduction axis of w2 is the sharded one."""
        w13, w2 = super().pack(inputs)
        return w13, reread(w2, CutAtShards) if w2.fmt.name == "mxfp4" else w2


class WholeScaleTiles(Stack):
    """128x4 tiles of scales are loaded whole: behind the last column, the padding."""

    def scale(self, expert: int, n: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Codes are masked to zero there, scales are not masked."""
        loaded = (n < self.rows)[:, None] & (k // self.group < padded_shape(self.rows, self.blocks)[1])
        return super().scale(expert, n, k, loaded)


class SwizzledPerCall(GroupedMoe):
    """Clean: scales are swizzled at every call into scratch memory whose padding is written as zero, as FlashInfer does."""

    SWIZZLED = False

    def gemm(self, gemm: Gemm, plan: Permutation) -> None:
        """Swizzle, then multiply."""
        super().gemm(replace(gemm, weights=self.swizzled(gemm.weights)), plan)

    def swizzled(self, stack: Stack) -> Stack:
        """The stack with its scales in tiles."""
        if stack.scales is None:
            return stack
        tiles = torch.cat([self.swizzle(scales) for scales in stack.scales])
        return WholeScaleTiles(**{**vars(stack), "scales": tiles, "swizzled": True})

    def swizzle(self, scales: Tensor) -> Tensor:
        """[rows, columns] -> flat, padding zero."""
        return swizzle(scales)


class ScalePaddingUnwritten(SwizzledPerCall):
    """The padding of a swizzled scale buffer is never written, and the last K tile multiplies codes of zero by it: NaN."""

    def swizzle(self, scales: Tensor) -> Tensor:
        """Only what is logical is written."""
        flat = self.empty(*padded_shape(*scales.shape), dtype=scales.dtype)
        flat[: scales.shape[0], : scales.shape[1]] = scales
        return swizzle(flat)


class ScaleColumnsAssert(BatchedMoe):
    """get_shuffle_matrix_sf_a_row_indices asserts scale columns % 4 == 0, and the MXFP4 caller does not pad to it."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Hidden 2880 has 90 columns; here 64, 96 and 160 have 2, 3 and 5."""
        stacks = super().pack(inputs)
        for stack in stacks:
            assert stack.fmt.name != "mxfp4" or stack.blocks % COLUMNS == 0, f"K % 4 == 0, got {stack.blocks}"
        return stacks


class SaturatedExport(AlignedMoe):
    """Clean: NVFP4 weights from an exporter that takes 1 for the largest magnitude of an all-zero block."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Both projections, each expert with its own global amax."""
        stacks = super().pack(inputs)
        for stack in stacks:
            if stack.fmt.name == "nvfp4":
                self.export(stack)
        return stacks

    def export(self, stack: Stack) -> None:
        """The scale of an all-zero block is the cast of 1 * 448 / (global amax / 6)."""
        assert stack.scales is not None
        n, k = torch.arange(stack.rows), torch.arange(stack.columns)
        for expert in range(stack.experts):
            values = stack.tile(expert, n, k, torch.ones(stack.rows, stack.columns, dtype=torch.bool))
            empty = ~values.unflatten(1, (-1, stack.group)).any(-1)
            scale = self.cast(E4M3_MAX / (values.abs().amax() / E2M1_MAX))
            stack.scales[expert] = torch.where(empty, scale.view(torch.uint8), stack.scales[expert])

    def cast(self, scale: Tensor) -> Tensor:
        """float8_e4m3fn, saturated."""
        return scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


class ZeroBlockScaleNan(SaturatedExport):
    """A zero NVFP4 block is exported as if its amax were 1: 448 / (global amax / 6) is beyond E4M3 and becomes NaN."""

    def cast(self, scale: Tensor) -> Tensor:
        """E4M3 has no infinity: what rounds beyond 448 is NaN, 0x7F, as CUDA's cast without saturation has it."""
        nan = torch.full_like(scale, torch.nan)
        return torch.where(scale > E4M3_OVERFLOW, nan, scale.clamp(max=E4M3_MAX)).to(torch.float8_e4m3fn)


FLASHINFER = "https://github.com/flashinfer-ai/flashinfer"
FAULTS = (
    planted("B004", GlobalScalesByRow, f"{VLLM}/pull/41711", ("scale_roll", "wrong_scales")),
    planted("B004", GlobalScaleOfFirstExpert, f"{VLLM}/pull/41711", ("scale_roll", "constant_factor", "wrong_scales")),
    planted("B024", SwizzleUnpadded, f"{VLLM}/pull/23140", ("exception",)),
    planted("B048", SwizzledAtLoadOnly, f"{VLLM}/pull/54773", ("zeros", "missing_expert", "wrong_scales")),
    planted("B083", ShardCutsScaleBlock, f"{SGLANG}/pull/9473", ("scale_roll", "wrong_scales")),
    planted("B103", ScalePaddingUnwritten, f"{FLASHINFER}/issues/3057", ("nan_from_padding", "non_finite", "poison")),
    planted("B130", ScaleColumnsAssert, f"{FLASHINFER}/issues/2122", ("exception",)),
    planted("B199", ZeroBlockScaleNan, "https://github.com/NVIDIA/Model-Optimizer/pull/1397", ("non_finite",)),
)
