"""Grouped GEMMs: which kernel a table or a heuristic picks for a shape, and whether that kernel can do it."""

from __future__ import annotations

import os
import signal
from typing import ClassVar

from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe


def bucket(tokens: int) -> int:
    """The tokens a table is tuned for: the next power of two."""
    return 1 << max(0, tokens - 1).bit_length()


class DieOrder(AlignedMoe):
    """Aligned blocks with a kernel for small MXFP4 batches that deals a block's column tiles out to 4 dies in turn."""

    DIES: ClassVar[int] = 4
    BUCKET: ClassVar[int] = 4

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """Only GEMM 1 has the variant."""
        if self.case.recipe.weights == "mxfp4" and not gemm.weighted and bucket(self.shape.tokens) == self.BUCKET:
            tile = self.dealt(tile, self.grid_n(gemm.weights.rows))
        super().program(gemm, blocks, block, tile)

    def dealt(self, pid: int, tiles: int) -> int:
        """Die `pid % 4` has a contiguous share; where 4 does not divide the tiles, the first dies' shares are one longer."""
        die, turn = pid % self.DIES, pid // self.DIES
        return die * (tiles // self.DIES) + min(die, tiles % self.DIES) + turn


class DieSharesFloored(DieOrder):
    """The kernel that the table picks for 3 and 4 tokens deals tiles to 4 dies as if their number were a multiple of 4."""

    def dealt(self, pid: int, tiles: int) -> int:
        """Shares of the floored size: the last tiles have no program."""
        return pid % self.DIES * (tiles // self.DIES) + pid // self.DIES


class TunedOneStage(BatchedMoe):
    """A row of the tuned table names a one-stage kernel that knows one FP8 scale per expert, not one per block."""

    ONE_STAGE: ClassVar[tuple[tuple[int, int, int], ...]] = ((16, 256, 128),)  # bucket of tokens, hidden, inter

    def load_b(self, gemm: Gemm, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """Other shapes take the default kernel."""
        key = (bucket(self.shape.tokens), self.shape.hidden, self.shape.inter)
        if self.case.recipe.weights != "fp8_block" or key not in self.ONE_STAGE:
            return super().load_b(gemm, expert, n, k)
        weights = gemm.weights
        inside = (n < weights.rows)[:, None] & (k < weights.columns)
        first = weights.scale(expert, n * 0, k * 0, inside)
        return weights.element(weights.code_offsets(expert, n, k), k, inside) * first


class VectorKernels(AlignedMoe):
    """Aligned blocks with INT8 matrix-vector kernels for small batches, up to the limit of the device that runs."""

    LIMIT: ClassVar[int] = 8  # tokens, by the architecture of the device
    COMPILED: ClassVar[int] = 8  # tokens, by the architecture the binary was built for

    def run(self, out: Tensor) -> None:
        """Where no instance was compiled, the launch fails."""
        if self.case.recipe.weights == "int8_channel" and self.COMPILED < self.shape.tokens <= self.LIMIT:
            raise RuntimeError("CUDA error: invalid configuration argument")
        super().run(out)


class BatchLimitOfOtherArch(VectorKernels):
    """The host takes the batch limit of the running device; the kernels compiled for an older one stop at 4 tokens."""

    COMPILED: ClassVar[int] = 4


class AssertsOneToken(AlignedMoe):
    """An assertion of the quantised kernel, as many rows as experts used, holds for one token alone: it aborts."""

    def run(self, out: Tensor) -> None:
        """GGML_ASSERT(ne1 == n_expert_used)."""
        if self.w13.fmt.scaling is not None and self.shape.tokens > 1:
            os.kill(os.getpid(), signal.SIGABRT)
        super().run(out)


class StagedKernel(GroupedMoe):
    """Grouped GEMMs fused into one kernel for large batches, with as many stages as shared memory holds."""

    SHARED: ClassVar[int] = 101376  # bytes a block may have on SM120
    STAGE: ClassVar[int] = 24576  # bytes: one step of x and of w13
    DOWN: ClassVar[int] = 32  # bytes a neuron takes in the buffers of the fused down projection
    LARGE: ClassVar[int] = 16  # tokens

    def run(self, out: Tensor) -> None:
        """The launch fails if the kernel asks for more than there is."""
        down = self.DOWN * self.shape.inter
        if self.shape.tokens >= self.LARGE and self.stages(down) * self.STAGE + down > self.SHARED:
            raise RuntimeError("CUDA error: invalid argument (cudaErrorInvalidValue)")
        super().run(out)

    def stages(self, down: int) -> int:
        """What fits beside `down` bytes."""
        return (self.SHARED - down) // self.STAGE


class StagesForgetDownBuffers(StagedKernel):
    """The stage count leaves out the down projection's buffers: from inter 128 on the kernel wants too much memory."""

    def stages(self, down: int) -> int:
        """Below, the remainder of the division has room for them."""
        return super().stages(0)


FAULTS = (
    planted(
        "B162",
        DieSharesFloored,
        "https://github.com/ROCm/aiter/issues/3933",
        ("non_finite", "nan_from_padding", "poison", "wrong_tile"),
    ),
    planted("B164", TunedOneStage, "https://github.com/ROCm/aiter/issues/4788", ("constant_factor", "wrong_scales")),
    planted("B186", BatchLimitOfOtherArch, "https://github.com/ggml-org/llama.cpp/issues/24064", ("exception",)),
    planted("B187", AssertsOneToken, "https://github.com/ggml-org/llama.cpp/pull/20323", ("death",)),
    planted("B125", StagesForgetDownBuffers, "https://github.com/flashinfer-ai/flashinfer/issues/3807", ("exception",)),
)
