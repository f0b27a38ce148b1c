"""Grouped GEMMs: where the block scales of a weight tile are read, and what lies in and behind their padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.case import Case
from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.weights import Stack
from reference.layouts.swizzle_128x4 import COLUMNS, ROWS, swizzle

MX = "mxfp4"
FILTHY = 0xFF  # a byte that nobody wrote: NaN as a scale, E8M0 and E4M3 alike


class UnmaskedScales(Stack):
    """Scales read as whole tiles: columns beyond K are not masked off, only their codes are 0."""

    def scale(self, expert: int, n: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """0 times a NaN is a NaN."""
        return super().scale(expert, n, k, (n < self.rows)[:, None].expand_as(mask))


@dataclass
class QuadScales(UnmaskedScales):
    """Rows of scales padded with zeros to `multiple` columns."""

    multiple: int = COLUMNS

    @property
    def blocks(self) -> int:
        """Columns of a padded row."""
        return -(-super().blocks // self.multiple) * self.multiple


class QuadTiles(AlignedMoe):
    """Aligned blocks whose MXFP4 kernel reads scales four at a time, from rows padded to four."""

    MULTIPLE: ClassVar[int] = COLUMNS

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        if case.recipe.weights == MX:
            self.BLOCK_K = COLUMNS * self.w13.group  # type: ignore[misc]
            self.w13, self.w2 = self.quads(self.w13), self.quads(self.w2)

    def quads(self, stack: Stack) -> Stack:
        """Pad the rows of scales."""
        assert stack.scales is not None
        scales = torch.nn.functional.pad(stack.scales, (0, -stack.blocks % self.MULTIPLE))
        return QuadScales(**{**vars(stack), "scales": scales}, multiple=self.MULTIPLE)


class ScaleTileLeavesBuffer(QuadTiles):
    """MXFP4 scale rows are padded to 2 columns and read by 4: the last tile reads behind the buffer, where 0xFF is a NaN."""

    MULTIPLE: ClassVar[int] = 2


class FilthyPadding(GroupedMoe):
    """Grouped GEMMs whose swizzled MXFP4 scales hold arbitrary bytes in their padding, and mask them."""

    READER: ClassVar[type[Stack]] = Stack

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """The packer leaves the padding as memory was."""
        w13, w2 = super().pack(inputs)
        if inputs.case.recipe.weights != MX:
            return w13, w2
        return self.soiled(w13), self.soiled(w2)

    def soiled(self, stack: Stack) -> Stack:
        """Every byte of padding is FILTHY."""
        assert stack.scales is not None
        used = swizzle(torch.ones(stack.rows, stack.blocks, dtype=torch.uint8)).repeat(stack.experts).bool()
        return self.READER(**{**vars(stack), "scales": torch.where(used, stack.scales, FILTHY)})


class PaddingBytesCount(FilthyPadding):
    """The swizzled MXFP4 scale tile is unpacked whole, its columns beyond K not cleared: padding bytes enter the product."""

    READER: ClassVar[type[Stack]] = UnmaskedScales


class LogicalStrides(Stack):
    """Swizzled scales addressed by strides of the logical sizes."""

    def scale_offsets(self, expert: int, n: Tensor, block: Tensor) -> Tensor:
        """Right where rows are a multiple of 128 and scale columns one of 4."""
        tile = (n // ROWS)[:, None] * (self.blocks // COLUMNS) + block // COLUMNS
        inside = ((n % 32) * 16 + (n % ROWS) // 32 * 4)[:, None] + block % COLUMNS
        return expert * self.rows * self.blocks + tile * (ROWS * COLUMNS) + inside


class ScalesAddressedUnpadded(GroupedMoe):
    """Swizzled MX scales are addressed by logical N and K while they are stored padded: right for aligned shapes only."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Both projections."""
        w13, w2 = super().pack(inputs)
        if inputs.case.recipe.weights != MX:
            return w13, w2
        return LogicalStrides(**vars(w13)), LogicalStrides(**vars(w2))


class MnMajorScales(Stack):
    """Scales column by column, as a TMA load of one K group wants them."""

    def scale_offsets(self, expert: int, n: Tensor, block: Tensor) -> Tensor:
        """[experts, blocks, rows]."""
        return (expert * self.blocks + block) * self.rows + n[:, None]


class TransformedScales(BatchedMoe):
    """Batched experts whose FP8 and MX scales are brought into MN-major order for the architectures that read it."""

    SWIZZLED: ClassVar[bool] = False
    TRANSFORMED: ClassVar[tuple[int, ...]] = (10, 12)  # major architectures
    ARCH_MAJOR: ClassVar[int] = 12

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Both projections."""
        w13, w2 = super().pack(inputs)
        return (self.transform(w13), self.transform(w2)) if inputs.case.recipe.weights in ("fp8_block", MX) else (w13, w2)

    def transform(self, stack: Stack) -> Stack:
        """The kernel reads MN-major whatever was done here."""
        assert stack.scales is not None
        scales = stack.scales.mT.contiguous() if self.ARCH_MAJOR in self.TRANSFORMED else stack.scales
        return MnMajorScales(**{**vars(stack), "scales": scales})


class TransformGatedOnArch(TransformedScales):
    """The scale transform is gated on arch 10 alone: on arch 12 the same kernel is handed scales in plain row order."""

    TRANSFORMED: ClassVar[tuple[int, ...]] = (10,)


class DescriptorRace(GroupedMoe):
    """At a group switch the scale descriptor is rewritten in place; now and then the last K step still reads through it."""

    LOST = 7  # every so many switches the update wins the race

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.switches, self.following = 0, -1

    def program(self, gemm: Gemm, plan: Permutation, place: tuple[int, int], tile: int) -> None:
        """The last tile of an expert is followed by the next expert that has tokens."""
        expert, block = place
        last = block == self.grid_m(plan, expert) - 1 and tile == self.grid_n(gemm.weights.rows) - 1
        used = [e for e in range(expert + 1, len(self.local)) if self.grid_m(plan, e)]
        self.following = used[0] if last and used and self.case.recipe.weights == MX else -1
        super().program(gemm, plan, place, tile)

    def load_b(self, gemm: Gemm, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """Codes of this expert, scales through whatever the descriptor points to."""
        weights = gemm.weights
        if self.following < 0 or int(k[-1]) + 1 < weights.columns:
            return super().load_b(gemm, expert, n, k)
        self.switches += 1
        inside = (n < weights.rows)[:, None] & (k < weights.columns)
        values = weights.element(weights.code_offsets(expert, n, k), k, inside)
        seen = expert if self.switches % self.LOST else self.following
        return values * weights.scale(seen, n, k, inside) * weights.factor(expert, n)[:, None]


BEHIND = ("non_finite", "nan_from_padding", "poison", "exception")
MISPLACED = ("wrong_scales", "scale_roll", "exception", "poison", "non_finite", "nan_from_padding")
FAULTS = (
    planted("B047", ScaleTileLeavesBuffer, "https://github.com/vllm-project/vllm/pull/47910", BEHIND),
    planted("B156", PaddingBytesCount, "https://github.com/triton-lang/triton/pull/10190", ("non_finite", "nan_from_padding")),
    planted("B165", ScalesAddressedUnpadded, "https://github.com/ROCm/aiter/pull/4108", MISPLACED),
    planted("B150", TransformGatedOnArch, "https://github.com/deepseek-ai/DeepGEMM/pull/403", ("scale_roll", "wrong_scales")),
    planted(
        "B093",
        DescriptorRace,
        "https://github.com/flashinfer-ai/flashinfer/issues/5438",
        ("next_expert_scales", "repeat", "unstable", "next_step", "other_weights", "scale_roll", "wrong_tile", "tail_tile"),
    ),
)
