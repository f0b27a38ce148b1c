"""Batched experts with masks (CuteDSL and DeepGEMM masked grouped GEMM): [experts, capacity, hidden] and masked_m.

Tokens are copied to their expert's slab; a GEMM computes the first masked_m[e] rows of each slab and leaves the rest alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.twins.base import Gemm, Twin
from harness.twins.memory import load, store


@dataclass
class Slabs:
    """masked_m int32 [local experts]: rows in use; position int64 [tokens, top_k]: row of a slot in the flattened
    [local experts * capacity] slabs, -1 for experts of other ranks."""

    masked_m: Tensor
    position: Tensor
    capacity: int


class BatchedMoe(Twin):
    """Batched experts: scatter into slabs, masked grouped GEMMs with swizzled scales, gather and weighted sum."""

    NAME: ClassVar[str] = "twin_batched"
    RECIPES: ClassVar[tuple[str, ...]] = ("bf16", "nvfp4", "mxfp4", "fp8_block")
    SWIZZLED: ClassVar[bool] = True

    def run(self, out: Tensor) -> None:
        """Dispatch, masked GEMM 1, activation, masked GEMM 2, combine."""
        slabs = self.dispatch(self.expert_map(self.step["ids"]))
        rows = len(self.local) * slabs.capacity
        a = self.scatter(slabs, rows)
        pre = self.workspace("pre", rows, self.w13.rows)
        self.gemm(Gemm(a, self.w13, pre), slabs)
        middle = self.workspace("middle", rows, self.shape.inter)
        self.activation_kernel(pre, middle, slabs)
        done = self.workspace("rows", rows, self.shape.hidden)
        self.gemm(Gemm(middle, self.w2, done), slabs)
        self.combine(done, slabs, out)

    def expert_map(self, ids: Tensor) -> Tensor:
        """Global expert ids -> local ones, -1 for those of other ranks."""
        inside = (ids >= self.local.start) & (ids < self.local.stop)
        return torch.where(inside, ids - self.local.start, -1)

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] of x's dtype, uninitialised."""
        return self.empty(rows, columns)

    def capacity(self) -> int:
        """Rows of a slab: a token may name an expert twice, so every slot may go to one expert."""
        return self.shape.tokens * self.shape.top_k

    def dispatch(self, ids: Tensor) -> Slabs:
        """Each slot takes the next free row of its expert's slab, in slot order."""
        flat, capacity = ids.flatten(), self.capacity()
        masked_m = torch.zeros(len(self.local), dtype=torch.int32)
        position = torch.full_like(flat, -1)
        for expert in range(len(self.local)):
            mine = (flat == expert).nonzero().flatten()
            masked_m[expert] = len(mine)
            position[mine] = expert * capacity + torch.arange(len(mine))
        return Slabs(masked_m, position.view(ids.shape), capacity)

    def scatter(self, slabs: Slabs, rows: int) -> Tensor:
        """x copied to its slots' rows; rows beyond masked_m are not written."""
        a = self.workspace("a", rows, self.shape.hidden)
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            position = slabs.position[:, k, None]
            store(a, position * a.stride(0) + columns, self.tokens(), (position >= 0).expand(-1, len(columns)))
        return a

    def tokens(self) -> Tensor:
        """x [tokens, hidden]."""
        return self.step["x"]

    def gemm(self, gemm: Gemm, slabs: Slabs) -> None:
        """Programs of every expert: row blocks up to masked_m, all column tiles."""
        for expert in range(len(self.local)):
            for block in range(self.grid_m(slabs, expert)):
                for tile in range(self.grid_n(gemm.weights.rows)):
                    self.program(gemm, slabs, (expert, block), tile)

    def grid_m(self, slabs: Slabs, expert: int) -> int:
        """Row blocks of one expert."""
        return -(-int(slabs.masked_m[expert]) // self.BLOCK_M)

    def program(self, gemm: Gemm, slabs: Slabs, place: tuple[int, int], tile: int) -> None:
        """One tile of one expert's slab."""
        expert, block = place
        inside = block * self.BLOCK_M + torch.arange(self.BLOCK_M)
        mask = inside < int(slabs.masked_m[expert])
        rows = expert * slabs.capacity + inside
        total = self.multiply(gemm, expert, rows, mask, tile)
        self.write(gemm, total, rows, mask, tile)

    def activation_kernel(self, pre: Tensor, middle: Tensor, slabs: Slabs) -> None:
        """act(gate) * up in fp32 of the rows in use."""
        for expert in range(len(self.local)):
            rows = slice(expert * slabs.capacity, expert * slabs.capacity + int(slabs.masked_m[expert]))
            middle[rows] = self.activate(pre[rows].float()).to(middle.dtype)

    def combine(self, done: Tensor, slabs: Slabs, out: Tensor) -> None:
        """Gather each token's rows and sum them with their routing weights in fp32."""
        total = torch.zeros(self.shape.tokens, self.shape.hidden)
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            position = slabs.position[:, k, None]
            rows = load(done, position * done.stride(0) + columns, (position >= 0).expand(-1, len(columns))).float()
            total = total + rows * self.step["topk_weights"][:, k, None]
        out.copy_(total)
