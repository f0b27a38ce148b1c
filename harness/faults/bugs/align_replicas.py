"""Faults of replicated experts without an all-to-all: every rank sees every token, and the ranks' partial sums are added."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.ranks import Mailbox, RankedMoe

REPLICATED = 1  # logical experts, from 0 on, that every rank holds a copy of


class ReplicatedMoe(RankedMoe):
    """Clean: redundant experts, of which each token uses the copy on the rank that its number names."""

    def capacity(self) -> int:
        """Every rank takes its slots from all tokens."""
        return -(-self.shape.tokens * self.shape.top_k // self.RANKS)

    def dispatch(self, rank: int, boxes: list[Mailbox]) -> None:
        """Nothing is sent: a rank keeps the slots whose physical expert it holds."""
        ids = self.step["ids"].flatten()
        slots = torch.arange(len(ids))
        owner = self.owner(rank, ids, slots // self.shape.top_k)
        self.keep(boxes[rank], slots[owner == rank])

    def owner(self, rank: int, ids: Tensor, tokens: Tensor) -> Tensor:
        """The rank that computes each slot, as `rank` sees it; all must see the same."""
        share = -(-self.shape.experts // self.RANKS)
        return torch.where(ids < REPLICATED, tokens % self.RANKS, ids // share)

    def keep(self, box: Mailbox, mine: Tensor) -> None:
        """Copy the slots into the box, one behind the other; ids stay logical."""
        place = torch.arange(len(mine))
        box.x[place] = self.step["x"][mine // self.shape.top_k]
        box.ids[place] = self.step["ids"].flatten()[mine]
        box.weights[place] = self.step["topk_weights"].flatten()[mine]
        box.slot[place] = mine
        capacity = max(1, self.capacity())
        box.counts.copy_((len(mine) - torch.arange(self.RANKS) * capacity).clamp(0, capacity))

    def experts_of(self, rank: int) -> range:
        """All: a rank holds copies, and its slots say which it uses."""
        return range(self.shape.experts)

    def combine(self, partials: list[Tensor], boxes: list[Mailbox], out: Tensor) -> None:
        """The all-reduce: partial sums of all ranks, added in fp32."""
        total = torch.zeros(self.shape.tokens * self.shape.top_k, self.shape.hidden)
        for rows, box in zip(partials, boxes, strict=True):
            used = self.received(box).nonzero().flatten()
            total.index_add_(0, box.slot[used], rows[used].float() * box.weights[used, None])
        out.copy_(total.view(self.shape.tokens, self.shape.top_k, total.shape[1]).sum(1))


class EveryRankPicksItsOwnReplica(ReplicatedMoe):
    """The map to physical experts takes the nearest copy: each rank computes a replicated expert, which is summed twice."""

    def owner(self, rank: int, ids: Tensor, tokens: Tensor) -> Tensor:
        """The nearest copy is one's own."""
        return torch.where(ids < REPLICATED, rank, super().owner(rank, ids, tokens))


FAULTS = (
    planted(
        "B080",
        EveryRankPicksItsOwnReplica,
        "https://github.com/sgl-project/sglang/pull/32962",
        ("duplicated_slot", "constant_factor"),
    ),
)
