"""Faults of id -1: slots whose expert is on another rank, in bitmatrices, permutations, blocks and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.faults.fault import planted
from harness.twins.aligned import NOWHERE, AlignedMoe, Blocks
from harness.twins.base import Gemm, Twin
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.memory import load, store
from reference.rounding import Rounding

WORD = 32  # experts of a bitmatrix word (triton_kernels)


@dataclass
class Gathered(Permutation):
    """source int32 [tokens * top_k]: the token of each permuted row, undefined behind the last local one."""

    source: Tensor


class GatherMoe(GroupedMoe):
    """Clean: experts are counted in a bitmatrix, and permuted rows gather their tokens."""

    def permute(self, ids: Tensor, weights: Tensor) -> Gathered:
        """Row of a slot: its expert's offset plus its rank among that expert's slots."""
        inside = (ids >= self.local.start) & (ids < self.local.stop)
        local = torch.where(inside, ids - self.local.start, -1)
        counts = self.histogram(local)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row_of, flat = torch.full_like(local.flatten(), -1), local.flatten()
        for expert in range(len(self.local)):
            mine = flat == expert
            row_of[mine] = offsets[expert] + torch.arange(int(mine.sum()))
        source = torch.empty(flat.shape, dtype=torch.int32)
        slots = torch.arange(len(flat))
        store(source, row_of, slots // self.shape.top_k, row_of >= 0)
        return Gathered(offsets, row_of.view(ids.shape), weights, source)

    def histogram(self, local: Tensor) -> Tensor:
        """int64 [local experts] from a bitmatrix of local ids [tokens, top_k], -1 for none."""
        words = -(-len(self.local) // WORD)
        matrix = torch.zeros(len(local), words, dtype=torch.int64)
        for k in range(local.shape[1]):
            word, bit, valid = self.place(local[:, k])
            matrix.scatter_(1, word[:, None], matrix.gather(1, word[:, None]) | (valid.long() << bit)[:, None])
        bits = matrix[:, :, None] >> torch.arange(WORD) & 1
        return bits.flatten(1)[:, : len(self.local)].sum(0)

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(word, bit, whether there is one) of each id."""
        valid = ids >= 0
        return torch.where(valid, ids // WORD, 0), torch.where(valid, ids % WORD, 0), valid

    def expand(self, a: Tensor, plan: Permutation) -> None:
        """Every row gathers its token."""
        assert isinstance(plan, Gathered)
        rows, columns, x = torch.arange(self.gathered(plan)), torch.arange(self.shape.hidden), self.step["x"]
        token = load(plan.source, rows).long()[:, None]
        store(a, rows[:, None] * a.stride(0) + columns, load(x, token * x.stride(0) + columns * x.stride(1)))

    def gathered(self, plan: Gathered) -> int:
        """Rows that gather: those of the local experts."""
        return int(plan.offsets[-1])


class TruncatedDivisionSetsBit31(GatherMoe):
    """pack_bitmatrix does not guard id -1: C division gives word 0, and the shift by -1 sets bit 31, which is expert 31."""

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-1 / 32 is 0 in C; the remainder -1 shifts by 31, as the low five bits say."""
        word = torch.div(ids, WORD, rounding_mode="trunc")
        return word, (ids - word * WORD) & (WORD - 1), torch.ones_like(ids, dtype=torch.bool)


class ShuffleReadsUnwrittenMap(GatherMoe):
    """Slots of id -1 are not counted, their places in the permutation stay unwritten, and shuffle_rows reads all of it."""

    def gathered(self, plan: Gathered) -> int:
        """Every slot's row."""
        return len(plan.source)


class NowhereBlocksSkipped(AlignedMoe):
    """Blocks of other ranks' experts are skipped without writing zeros, and the sum over the slots reads their rows."""

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """Returns on expert id -1."""
        if int(blocks.expert_ids[block]) != NOWHERE:
            super().program(gemm, blocks, block, tile)


class ExpertIdsAreBlockIndices(AlignedMoe):
    """With expert parallelism the sort writes each block's running index where the local expert id is due."""

    def align(self, ids: Tensor) -> Blocks:
        """The GEMM takes it for the index of the weights."""
        blocks = super().align(ids)
        if len(self.local) < self.shape.experts:
            used = blocks.expert_ids != NOWHERE
            blocks.expert_ids[used] = torch.arange(len(blocks.expert_ids), dtype=torch.int32)[used]
        return blocks


class ContiguousMoe(AlignedMoe):
    """Clean: DeepGEMM's contiguous layout. Tokens are copied to the aligned rows, which an inverse permutation undoes."""

    def run(self, out: Tensor) -> None:
        """Align, permute, GEMM 1, activation, GEMM 2, unpermute and weighted sum."""
        ids, _ = self.topk()
        blocks = self.align(ids)
        source, inverse = self.permutations(blocks.sorted_ids.long(), ids.numel())
        rows = len(source)
        straight = Blocks(torch.arange(rows, dtype=torch.int32), blocks.expert_ids, blocks.post_padded)
        a, columns, x = self.empty(rows, self.shape.hidden), torch.arange(self.shape.hidden), self.step["x"]
        if ids.numel():
            token = (source // self.shape.top_k)[:, None]
            store(a, torch.arange(rows)[:, None] * a.stride(0) + columns, load(x, token * x.stride(0) + columns * x.stride(1)))
        pre, middle = self.empty(rows, self.w13.rows), self.empty(rows, self.shape.inter)
        self.gemm(Gemm(a, self.w13, pre), straight)
        self.activation_kernel(pre, middle)
        done = self.empty(rows, self.shape.hidden)
        self.gemm(Gemm(middle, self.w2, done), straight)
        weighted = done[inverse].float() * self.topk()[1].flatten()[:, None]
        out.copy_(weighted.view(self.shape.tokens, self.shape.top_k, out.shape[1]).sum(1))

    def permutations(self, sorted_ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """(slot of each row, row of each slot); a padding row copies the last slot."""
        return sorted_ids.clamp(max=slots - 1), sorted_ids.argsort(stable=True)[:slots]

    @classmethod
    def rounding(cls, case: Case) -> Rounding:
        """Weights come in fp32, with the sum."""
        return Twin.rounding(case)


class ClampedBeforeArgsort(ContiguousMoe):
    """The sentinels of padding rows are clamped to the last slot before the argsort, which then finds one of them for it."""

    def permutations(self, sorted_ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Equal keys: the first row of them is taken for the last slot's."""
        clamped = sorted_ids.clamp(max=slots - 1)
        return clamped, clamped.argsort(stable=True)[:slots]


class ScoresOfLocalExpertsPaired(AlignedMoe):
    """On an EP rank scores are a dense [tokens, local experts]; flattened, they are paired with the top-k ids."""

    def topk(self) -> tuple[Tensor, Tensor]:
        """Slot i takes the i-th dense score."""
        ids, weights = super().topk()
        if len(self.local) == self.shape.experts:
            return ids, weights
        dense = torch.zeros(self.shape.tokens, self.shape.experts).scatter_add_(1, self.step["ids"], weights)
        return ids, dense[:, self.local.start : self.local.stop].contiguous()


_EP = ("expert_parallel",)
FAULTS = (
    planted("B005", TruncatedDivisionSetsBit31, "https://github.com/vllm-project/vllm/pull/38504", (*_EP, "exception")),
    planted("B035", ShuffleReadsUnwrittenMap, "https://github.com/vllm-project/vllm/pull/54747", (*_EP, "exception")),
    planted("B057", NowhereBlocksSkipped, "https://github.com/sgl-project/sglang/pull/12701", _EP),
    planted(
        "B152",
        ClampedBeforeArgsort,
        "https://github.com/vllm-project/vllm/pull/17934",
        ("wrong_expert", "missing_slot", "missing_expert"),
    ),
    planted("B160", ExpertIdsAreBlockIndices, "https://github.com/ROCm/aiter/pull/2478", (*_EP, "exception")),
    planted(
        "B178",
        ScoresOfLocalExpertsPaired,
        "https://github.com/huggingface/transformers/pull/45473",
        (*_EP, "exception"),
    ),
)
