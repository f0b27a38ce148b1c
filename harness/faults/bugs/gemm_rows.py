"""Grouped GEMMs: which rows a block has, what their weights are, and what happens to the rows behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.backends.base import Launch
from harness.case import Case
from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import NOWHERE, AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.memory import load

ALLOCATION = 512  # bytes that CUDA's caching allocator rounds up to (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
INT4 = "int4_g32"


class PaddedLanesRaceForLaneZero(AlignedMoe):
    """Padded lanes also fill lane 0 of the shared weights, from a slot id that may still be the block's before."""

    VECTOR = 4  # lanes a thread fills

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.before, self.races = torch.zeros(1), 0

    def row_weights(self, slots: Tensor, mask: Tensor) -> Tensor:
        """A thread with valid and padded lanes, other than the first, races with the first; every other race is lost."""
        weights, valid = super().row_weights(slots, mask), int(mask.sum())
        mine = weights[:1].clone()
        if valid > self.VECTOR and valid % self.VECTOR:
            self.races += 1
            weights[0] = mine[0] if self.races % 2 else self.before[0]
        self.before = mine
        return weights


class WeightOfPreviousRow(AlignedMoe):
    """The fused epilogue of the NVFP4 kernel multiplies a row by the routing weight of the sorted position before it."""

    def row_weights(self, slots: Tensor, mask: Tensor) -> Tensor:
        """Within a block; its first row takes the last one's."""
        weights = super().row_weights(slots, mask)
        if self.case.recipe.weights == "nvfp4":
            weights[mask] = weights[mask].roll(1)
        return weights


class HalfWeightsReadAsFloat(AlignedMoe):
    """The INT4 kernel casts the pointer of 16-bit router weights, as Llama 4's sigmoid router returns them, to float."""

    def topk(self) -> tuple[Tensor, Tensor]:
        """Two weights are read as one; behind them is the rest of the allocation."""
        ids, weights = super().topk()
        if self.case.recipe.weights == INT4 and self.case.routing == "sigmoid":
            half = self.empty(max(ALLOCATION // 2, 2 * weights.numel()))
            half[: weights.numel()] = weights.flatten()
            weights = half.view(torch.float32)[: weights.numel()].view_as(weights)
        return ids, weights


class IdsEndInsideBlock(AlignedMoe):
    """The INT4 kernel trusts num_tokens_post_pad, whole blocks, and reads past sorted_token_ids, whose length is none."""

    def align(self, ids: Tensor) -> Blocks:
        """sorted_token_ids has slots + experts * (block - 1) entries, in memory that nobody wrote beyond."""
        blocks = super().align(ids)
        if self.case.recipe.weights != INT4 or not ids.numel():
            return blocks
        room = ids.numel() + (len(self.local) + 1) * (self.BLOCK_M - 1)
        found = self.empty(len(blocks.sorted_ids) + ALLOCATION // 4, dtype=torch.int32)
        found[:room] = blocks.sorted_ids[:room]
        return Blocks(found[:room], blocks.expert_ids, -(-room // self.BLOCK_M) * self.BLOCK_M)


class NegativeExpertComputed(AlignedMoe):
    """Blocks of expert -1 are not skipped: their weights are addressed at -1 times an expert's size."""

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """No test of the expert."""
        if block * self.BLOCK_M >= blocks.post_padded or int(blocks.expert_ids[block]) != NOWHERE:
            super().program(gemm, blocks, block, tile)
            return
        slots = load(blocks.sorted_ids, block * self.BLOCK_M + torch.arange(self.BLOCK_M)).long()
        mask = slots < gemm.out.shape[0]
        self.write(gemm, self.multiply(gemm, NOWHERE, slots // gemm.divisor, mask, tile), slots, mask, tile)


class DenseCombine(BatchedMoe):
    """Batched experts combined by one matrix product over every row of the slabs, unused ones being zero."""

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """What the product reads is cleared."""
        return super().workspace(name, rows, columns).zero_() if name == "rows" else super().workspace(name, rows, columns)

    def combine(self, done: Tensor, slabs: Slabs, out: Tensor) -> None:
        """[tokens, rows] of routing weights times the rows."""
        used = slabs.position >= 0
        weights = torch.zeros(self.shape.tokens, len(done))
        weights.scatter_add_(1, slabs.position.clamp(min=0), torch.where(used, self.step["topk_weights"], 0.0))
        out.copy_(weights @ done.float())


class NanBehindMaskedRows(DenseCombine):
    """The masked GEMM writes NaN to the rows of its last tile behind masked_m, which the combine multiplies by 0."""

    def write(self, gemm: Gemm, total: Tensor, rows: Tensor, mask: Tensor, tile: int) -> None:
        """The tile is stored whole, as far as the slab goes."""
        slab = rows // max(1, self.capacity()) == rows[0] // max(1, self.capacity())
        super().write(gemm, torch.where(mask[:, None], total, torch.nan), rows, slab, tile)


class PaddedRows(GroupedMoe):
    """Grouped GEMMs over rows padded to a fixed length, which an indexed sum brings back to the tokens."""

    ROWS: ClassVar[int] = 16

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """Rounded up."""
        return super().workspace(name, -(-rows // self.ROWS) * self.ROWS, columns)

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """Rows of no slot go to token 0 with weight 0."""
        token, weight = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), 1)
        used = plan.row_of >= 0
        token[plan.row_of[used]] = torch.arange(self.shape.tokens)[:, None].expand_as(used)[used]
        weight[plan.row_of[used], 0] = plan.weights[used]
        total = torch.zeros(self.shape.tokens, self.shape.hidden)
        if len(total):
            total.index_add_(0, token, self.defined(rows, plan).float() * weight)
        out.copy_(total)

    def defined(self, rows: Tensor, plan: Permutation) -> Tensor:
        """The rows, 0 behind the last expert's."""
        return torch.where((torch.arange(len(rows)) < plan.offsets[-1])[:, None], rows, 0)


class RowsBehindOffsets(PaddedRows):
    """The input is padded beyond offsets[-1]; the GEMM leaves those rows unwritten and the sum reads them."""

    def defined(self, rows: Tensor, plan: Permutation) -> Tensor:
        """As they are."""
        return rows


class OffsetsPrefetched(GroupedMoe):
    """The kernel prefetches the ends of the next groups without a bound: it reads past the offsets of the last one."""

    AHEAD = 48  # the sanitizer saw a read 189 bytes behind 4 bytes of offsets

    def program(self, gemm: Gemm, plan: Permutation, place: tuple[int, int], tile: int) -> None:
        """The value is not used."""
        load(plan.offsets, place[0] + torch.arange(self.AHEAD))
        super().program(gemm, plan, place, tile)


class AdapterMoe(AlignedMoe):
    """Aligned blocks with a LoRA branch of zero adapters; DeepSeek's shared expert is one more slot, of id `experts`."""

    RANK: ClassVar[int] = 8

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.lora_a = torch.zeros(len(self.local), self.RANK, self.shape.hidden, dtype=self.dtype)
        self.lora_b = torch.zeros(len(self.local), self.shape.hidden, self.RANK, dtype=self.dtype)

    def launch(self) -> Launch:
        """The adapters are buffers too."""
        launch = super().launch()
        return replace(launch, buffers={**launch.buffers, "lora_a": self.lora_a, "lora_b": self.lora_b})

    def run(self, out: Tensor) -> None:
        """The layer, then what the adapters of each token's experts add."""
        super().run(out)
        ids = self.topk()[0]
        if self.case.routing == "deepseek_v3":
            ids = torch.cat([ids, torch.full_like(ids[:, :1], len(self.local))], dim=1)
        for expert in ids.unique().tolist():
            if not self.skips(expert):
                tokens = (ids == expert).any(1)
                a, b = self.adapter(self.lora_a, expert), self.adapter(self.lora_b, expert)
                out[tokens] += (self.step["x"][tokens].float() @ a.T @ b.T).to(out.dtype)

    def adapter(self, stack: Tensor, expert: int) -> Tensor:
        """float32: one expert's matrix, by address."""
        size = stack.shape[1] * stack.shape[2]
        return load(stack, expert * size + torch.arange(size)).view(stack.shape[1:]).float()

    def skips(self, expert: int) -> bool:
        """No adapter belongs to another rank's expert, nor to the shared one."""
        return not 0 <= expert < len(self.local)


class SharedExpertHasNoAdapter(AdapterMoe):
    """The LoRA kernel guards only expert -1: the fused shared expert, id `experts`, reads behind the stacked adapters."""

    def skips(self, expert: int) -> bool:
        """The other end is open."""
        return expert == NOWHERE


UNWRITTEN = ("non_finite", "nan_from_padding", "poison")
FAULTS = (
    planted(
        "B045",
        PaddedLanesRaceForLaneZero,
        "https://github.com/vllm-project/vllm/pull/28619",
        ("repeat", "next_step", "other_weights", "constant_factor", "wrong_weights"),
    ),
    planted(
        "B213",
        WeightOfPreviousRow,
        "https://github.com/vllm-project/vllm/issues/48895",
        ("zero_weight", "constant_factor", "wrong_weights"),
    ),
    planted(
        "B025",
        HalfWeightsReadAsFloat,
        "https://github.com/vllm-project/vllm/pull/16801",
        (*UNWRITTEN, "constant_factor", "wrong_weights", "zeros", "missing_expert"),  # a weight of what memory held, 0 too
    ),
    planted("B036", IdsEndInsideBlock, "https://github.com/vllm-project/vllm/pull/45539", ("exception", "poison")),
    planted(
        "B147",
        NegativeExpertComputed,
        "https://github.com/deepseek-ai/DeepGEMM/issues/38",
        ("exception", "expert_parallel"),
    ),
    planted("B101", NanBehindMaskedRows, "https://github.com/flashinfer-ai/flashinfer/issues/1632", UNWRITTEN),
    planted("B144", RowsBehindOffsets, "https://github.com/pytorch/torchtitan/issues/1237", UNWRITTEN),
    planted("B142", OffsetsPrefetched, "https://github.com/pytorch/pytorch/issues/163462", ("exception",)),
    planted(
        "B070",
        SharedExpertHasNoAdapter,
        "https://github.com/sgl-project/sglang/pull/40240",
        (*UNWRITTEN, "exception"),
    ),
)
