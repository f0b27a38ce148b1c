"""Expert parallelism on ranks of one process: all-to-all dispatch to the ranks that hold the experts, and combine back.

As in DeepEP and the one-sided all-to-alls: receive buffers of fixed capacity per source rank, counts beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.twins.base import Gemm, Twin
from harness.twins.memory import load, store


@dataclass
class Mailbox:
    """What one rank receives: x [ranks * capacity, hidden], local expert ids and weights [ranks * capacity] (-1: no entry),
    counts int64 [ranks]; slot int64 [ranks * capacity]: the sender's slot, for the way back."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    counts: Tensor
    slot: Tensor


class RankedMoe(Twin):
    """Expert-parallel ranks: tokens and experts in shards, dispatch, local experts, combine."""

    NAME: ClassVar[str] = "twin_ranks"
    RECIPES: ClassVar[tuple[str, ...]] = ("bf16", "nvfp4", "mxfp4")
    EXPERT_PARALLEL: ClassVar[bool] = False
    RANKS: ClassVar[int] = 2

    def run(self, out: Tensor) -> None:
        """Every rank dispatches its tokens, computes what it received, and the partial rows go home."""
        boxes = [self.mailbox() for _ in range(self.RANKS)]
        for rank in range(self.RANKS):
            self.dispatch(rank, boxes)
        partials = [self.compute(rank, boxes[rank]) for rank in range(self.RANKS)]
        self.combine(partials, boxes, out)

    # -- who holds what

    def tokens_of(self, rank: int) -> range:
        """The tokens of a rank: contiguous shares, the last one smaller."""
        share = -(-self.shape.tokens // self.RANKS)
        return range(min(rank * share, self.shape.tokens), min((rank + 1) * share, self.shape.tokens))

    def experts_of(self, rank: int) -> range:
        """The experts of a rank: contiguous shares, the last one smaller."""
        share = -(-self.shape.experts // self.RANKS)
        return range(min(rank * share, self.shape.experts), min((rank + 1) * share, self.shape.experts))

    def capacity(self) -> int:
        """Slots that one rank may send to another: all of its own."""
        return -(-self.shape.tokens // self.RANKS) * self.shape.top_k

    # -- dispatch

    def mailbox(self) -> Mailbox:
        """Receive buffers: contents undefined, counts zero."""
        size = self.RANKS * self.capacity()
        ids, slot = (torch.empty(size, dtype=torch.int64) for _ in range(2))
        weights = torch.empty(size)
        return Mailbox(self.empty(size, self.shape.hidden), ids, weights, torch.zeros(self.RANKS, dtype=torch.int64), slot)

    def dispatch(self, rank: int, boxes: list[Mailbox]) -> None:
        """Send each slot of the rank's tokens to the rank that holds its expert."""
        tokens = self.tokens_of(rank)
        ids = self.step["ids"][tokens.start : tokens.stop].flatten()
        slots = torch.arange(tokens.start * self.shape.top_k, tokens.stop * self.shape.top_k)
        for target, box in enumerate(boxes):
            experts = self.experts_of(target)
            self.send(rank, box, experts, (slots, ids))

    def send(self, rank: int, box: Mailbox, experts: range, what: tuple[Tensor, Tensor]) -> None:
        """Put the slots whose expert is in `experts` into the box's part for this rank, one behind the other."""
        slots, ids = what
        mine = slots[(ids >= experts.start) & (ids < experts.stop)]
        at = rank * self.capacity() + torch.arange(len(mine))
        columns = torch.arange(self.shape.hidden)
        x = self.step["x"]
        values = load(x, (mine // self.shape.top_k)[:, None] * x.stride(0) + columns * x.stride(1))
        store(box.x, at[:, None] * box.x.stride(0) + columns, values)
        store(box.ids, at, self.step["ids"].flatten()[mine] - experts.start)
        store(box.weights, at, self.step["topk_weights"].flatten()[mine])
        store(box.slot, at, mine)
        box.counts[rank] = len(mine)

    # -- local experts

    def received(self, box: Mailbox) -> Tensor:
        """bool [ranks * capacity]: the entries that were sent."""
        place = torch.arange(len(box.ids))
        return place % self.capacity() < box.counts[place // self.capacity()] if len(place) else place.bool()

    def compute(self, rank: int, box: Mailbox) -> Tensor:
        """[ranks * capacity, hidden]: the rows of this rank's experts for what it received."""
        size = len(box.ids)
        pre, middle = self.empty(size, self.w13.rows), self.empty(size, self.shape.inter)
        rows = self.empty(size, self.shape.hidden)
        used = self.received(box)
        for local, expert in enumerate(self.experts_of(rank)):
            mine = (used & (box.ids == local)).nonzero().flatten()
            self.gemm(Gemm(box.x, self.w13, pre), expert, mine)
            middle[mine] = self.activate(pre[mine].float()).to(middle.dtype)
            self.gemm(Gemm(middle, self.w2, rows), expert, mine)
        return rows

    def gemm(self, gemm: Gemm, expert: int, rows: Tensor) -> None:
        """The rows `rows` in blocks, every column tile."""
        for start in range(0, len(rows), self.BLOCK_M):
            block = rows[start : start + self.BLOCK_M]
            mask = torch.ones(len(block), dtype=torch.bool)
            for tile in range(self.grid_n(gemm.weights.rows)):
                self.write(gemm, self.multiply(gemm, expert, block, mask, tile), block, mask, tile)

    # -- combine

    def combine(self, partials: list[Tensor], boxes: list[Mailbox], out: Tensor) -> None:
        """Each rank adds what comes back for its tokens, in fp32."""
        total = torch.zeros(self.shape.tokens * self.shape.top_k, self.shape.hidden)
        for rows, box in zip(partials, boxes, strict=True):
            used = self.received(box).nonzero().flatten()
            total[box.slot[used]] = rows[used].float() * box.weights[used, None]
        out.copy_(total.view(self.shape.tokens, self.shape.top_k, total.shape[1]).sum(1))
