"""The fused_moe of vLLM and SGLang (Triton): top-k slots sorted and padded to blocks of one expert each, two grouped GEMMs.

Structure as in vLLM's moe_align_block_size and fused_moe_kernel: sorted_ids, expert_ids, num_tokens_post_padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.case import Case
from harness.twins.base import Gemm, Twin
from harness.twins.memory import load, store
from reference.rounding import Rounding

NOWHERE = -1  # expert id of a block whose expert lives on another rank


@dataclass
class Blocks:
    """sorted_ids int32 [capacity]: slots (token * top_k + k) sorted by expert, each expert padded to whole blocks with
    the sentinel `slots`; expert_ids int32 [capacity / block]: local expert of each block; post_padded: ids in use."""

    sorted_ids: Tensor
    expert_ids: Tensor
    post_padded: int


class AlignedMoe(Twin):
    """Aligned blocks: moe_align_block_size, grouped GEMM with masks, activation, weighted GEMM, sum over the slots."""

    NAME: ClassVar[str] = "twin_aligned"
    RECIPES: ClassVar[tuple[str, ...]] = ("bf16", "fp16", "nvfp4", "mxfp4", "int4_g32", "fp8_channel", "int8_channel")

    def run(self, out: Tensor) -> None:
        """Align, GEMM 1, activation, GEMM 2 times routing weight, sum."""
        ids, _ = self.topk()
        blocks = self.align(ids)
        slots, inner = ids.numel(), self.w13.rows
        pre = self.workspace("pre", slots, inner)
        self.gemm(Gemm(self.step["x"], self.w13, pre, divisor=self.shape.top_k), blocks)
        middle = self.workspace("middle", slots, self.shape.inter)
        self.activation_kernel(pre, middle)
        rows = self.workspace("rows", slots, self.shape.hidden)
        self.gemm(Gemm(middle, self.w2, rows, weighted=True), blocks)
        self.combine(rows, out)

    def topk(self) -> tuple[Tensor, Tensor]:
        """(ids, weights) [tokens, top_k] as handed in, the ids of other ranks' experts mapped to -1."""
        ids = self.step["ids"]
        return self.expert_map(ids), self.step["topk_weights"]

    def expert_map(self, ids: Tensor) -> Tensor:
        """Global expert ids -> local ones, NOWHERE for those of other ranks."""
        inside = (ids >= self.local.start) & (ids < self.local.stop)
        return torch.where(inside, ids - self.local.start, NOWHERE)

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] of x's dtype, uninitialised."""
        return self.empty(rows, columns)

    # -- moe_align_block_size

    def capacity(self, slots: int) -> int:
        """Room for every slot and a partial block per expert, and for one block of non-local slots."""
        blocks = -(-slots // self.BLOCK_M) + len(self.local) + 1
        return blocks * self.BLOCK_M

    def align(self, ids: Tensor) -> Blocks:
        """Sort the slots by expert into whole blocks; non-local slots get blocks of expert NOWHERE."""
        flat = ids.flatten()
        capacity = self.capacity(flat.numel())
        sorted_ids = torch.full((capacity,), flat.numel(), dtype=torch.int32)
        expert_ids = torch.full((capacity // self.BLOCK_M,), NOWHERE, dtype=torch.int32)
        counts, end = self.histogram(flat), 0
        for expert in (*range(len(self.local)), NOWHERE):
            count = int(counts[expert])
            if count:
                mine = (flat == expert).nonzero().flatten()
                store(sorted_ids, end + torch.arange(count), mine)
            blocks = -(-count // self.BLOCK_M)
            store(expert_ids, end // self.BLOCK_M + torch.arange(blocks), torch.tensor(expert))
            end += blocks * self.BLOCK_M
        return Blocks(sorted_ids, expert_ids, end)

    def histogram(self, flat: Tensor) -> Tensor:
        """int64 [local experts + 1]: slots per expert, the last entry those of no local expert."""
        return torch.bincount(torch.where(flat < 0, len(self.local), flat), minlength=len(self.local) + 1)

    # -- fused_moe_kernel

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """One program per block and column tile."""
        for block in range(self.grid_m(blocks)):
            for tile in range(self.grid_n(gemm.weights.rows)):
                self.program(gemm, blocks, block, tile)

    def grid_m(self, blocks: Blocks) -> int:
        """Blocks launched: all there is room for; a program beyond post_padded returns at once."""
        return len(blocks.expert_ids)

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """One tile: its slots, its expert, the sum over K, the epilogue."""
        if block * self.BLOCK_M >= blocks.post_padded:
            return
        slots = load(blocks.sorted_ids, block * self.BLOCK_M + torch.arange(self.BLOCK_M)).long()
        mask = slots < gemm.out.shape[0]
        expert = int(load(blocks.expert_ids, torch.tensor([block])))
        if expert == NOWHERE:
            self.write(gemm, torch.zeros(len(slots), self.BLOCK_N), slots, mask, tile)
            return
        total = self.multiply(gemm, expert, slots // gemm.divisor, mask, tile)
        if gemm.weighted:
            total = total * self.row_weights(slots, mask)[:, None]
        self.write(gemm, total, slots, mask, tile)

    def row_weights(self, slots: Tensor, mask: Tensor) -> Tensor:
        """float32 [BLOCK_M]: the routing weights of a block's slots."""
        return load(self.topk()[1], slots, mask)

    def activation_kernel(self, pre: Tensor, middle: Tensor) -> None:
        """act(gate) * up in fp32, row by row."""
        middle.copy_(self.activate(pre.float()))

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Sum the weighted rows [tokens * top_k, hidden] of each token in fp32."""
        out.copy_(rows.view(self.shape.tokens, self.shape.top_k, rows.shape[1]).float().sum(1))

    @classmethod
    def rounding(cls, case: Case) -> Rounding:
        """The weighted row is what GEMM 2 writes."""
        name = case.recipe.out
        return Rounding(gate_up=name, middle=name, weighted=name, out=name)
