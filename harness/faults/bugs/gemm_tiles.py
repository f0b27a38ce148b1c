"""Grouped GEMMs: which program does which tile, and how far a step of the reduction reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from harness.case import Case
from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs
from harness.twins.weights import Stack

INT4, FP8 = "int4_g32", "fp8_block"


def tile_scaled_at(weights: Stack, expert: int, n: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """float32 [len(n), len(k)]: a weight tile whose column k[i] gets the scale of column at[i]."""
    inside = (n < weights.rows)[:, None] & (k < weights.columns)
    values = weights.element(weights.code_offsets(expert, n, k), k, inside)
    return values * weights.scale(expert, n, at, inside) * weights.factor(expert, n)[:, None]


class SwappedDivisors(AlignedMoe):
    """pid_m = pid % grid_n and pid_n = pid // grid_m: where the grid is not square, some tiles have no program."""

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """Column-major order wants pid % grid_m."""
        grid_m, grid_n = self.grid_m(blocks), self.grid_n(gemm.weights.rows)
        for pid in range(grid_m * grid_n):
            self.program(gemm, blocks, pid % grid_n, pid // grid_m)


class FirstRowBlockOnly(BatchedMoe):
    """The loop over an expert's row ids stops after one tile of rows: more tokens than that are left out."""

    def grid_m(self, slabs: Slabs, expert: int) -> int:
        """Never more than one."""
        return min(1, super().grid_m(slabs, expert))


class ScalePerStep(BatchedMoe):
    """Batched experts whose FP8 kernel loads one block scale a K step; BLOCK_K comes from a tuned table."""

    TUNED: ClassVar[Mapping[int, int]] = {0: 64, 16: 128}  # from so many tokens on -> BLOCK_K

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        if case.recipe.weights == FP8:
            self.BLOCK_K = self.TUNED[max(t for t in self.TUNED if t <= case.shape.tokens)]  # type: ignore[misc]

    def load_b(self, gemm: Gemm, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """All columns of a step take the scale of its first one."""
        if self.case.recipe.weights != FP8:
            return super().load_b(gemm, expert, n, k)
        return tile_scaled_at(gemm.weights, expert, n, k, k[:1].expand_as(k))


class StepSpansTwoScales(ScalePerStep):
    """A tuned BLOCK_K of 256 over scale groups of 128: the whole step is scaled by its first group's scale."""

    TUNED: ClassVar[Mapping[int, int]] = {0: 64, 16: 256}


class ScaleRowPerStep(AlignedMoe):
    """Aligned blocks whose INT4 kernel takes the scales of step i from scale row i: BLOCK_K must be the group."""

    TUNED: ClassVar[Mapping[int, Mapping[str, int]]] = {16: {"BLOCK_K": 32}}  # by experts
    DEFAULT: ClassVar[Mapping[str, int]] = {"BLOCK_K": 64}

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        if case.recipe.weights == INT4:
            self.BLOCK_K = self.settings(self.TUNED.get(case.shape.experts, self.DEFAULT))["BLOCK_K"]  # type: ignore[misc]

    def settings(self, config: Mapping[str, int]) -> dict[str, int]:
        """The configuration, with what the scales dictate on top."""
        return {**config, "BLOCK_K": self.w13.group}

    def load_b(self, gemm: Gemm, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """One scale row a step."""
        if self.case.recipe.weights != INT4:
            return super().load_b(gemm, expert, n, k)
        return tile_scaled_at(gemm.weights, expert, n, k, (k[:1] // self.BLOCK_K * gemm.weights.group).expand_as(k))


class ConfigOverridesGroup(ScaleRowPerStep):
    """The default configuration is merged over the BLOCK_K that the INT4 scales dictate, so a step spans two groups."""

    def settings(self, config: Mapping[str, int]) -> dict[str, int]:
        """The later one wins."""
        return {"BLOCK_K": self.w13.group, **config}


class SizedSteps(AlignedMoe):
    """Aligned blocks whose INT4 kernel takes 1, 2 or 4 groups a step, the more the more blocks it expects."""

    ENOUGH: ClassVar[int] = 128  # blocks that keep the device busy; fewer K steps than that gain nothing

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """Choose BLOCK_K, refuse what the kernel has no instance of."""
        if self.case.recipe.weights == INT4 and self.shape.tokens:
            self.BLOCK_K = self.choose(gemm, self.experts(gemm))  # type: ignore[misc]
            if self.BLOCK_K // gemm.weights.group not in (1, 2, 4):
                raise RuntimeError("BLOCK_SIZE_K // group_size must be one of [1, 2, 4]")
        super().gemm(gemm, blocks)

    def experts(self, gemm: Gemm) -> int:
        """Every expert may add a partial row block."""
        return gemm.weights.codes.shape[0]

    def choose(self, gemm: Gemm, experts: int) -> int:
        """Double the step while it divides K and enough blocks are left."""
        block_k, row_blocks = gemm.weights.group, gemm.out.shape[0] // self.BLOCK_M + experts
        columns = gemm.weights.columns
        while columns % (2 * block_k) == 0 and row_blocks * (columns // block_k) >= self.ENOUGH:
            block_k *= 2
        return block_k


class ExpertsFromWrongAxis(SizedSteps):
    """The heuristic is given B.size(1), the rows, as number of experts: BLOCK_K grows past what the kernel takes."""

    def experts(self, gemm: Gemm) -> int:
        """Axis 1 of [experts, rows, columns]."""
        return gemm.weights.codes.shape[1]


UNVISITED = ("non_finite", "nan_from_padding", "never_written", "poison", "wrong_tile")
FAULTS = (
    planted("B158", SwappedDivisors, "https://github.com/meta-pytorch/applied-ai/issues/25", UNVISITED),
    planted("B190", FirstRowBlockOnly, "https://github.com/ggml-org/llama.cpp/pull/12316", UNVISITED),
    planted("B039", StepSpansTwoScales, "https://github.com/vllm-project/vllm/pull/14987", ("scale_roll", "wrong_scales")),
    planted("B055", ConfigOverridesGroup, "https://github.com/vllm-project/vllm/pull/6502", ("scale_roll", "wrong_scales")),
    planted("B006", ExpertsFromWrongAxis, "https://github.com/vllm-project/vllm/issues/36008", ("exception",)),
)
