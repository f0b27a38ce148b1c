"""Faults of all-to-all dispatch: ids of slots nobody filled, and requests that overrun a queue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.memory import load
from harness.twins.ranks import Mailbox, RankedMoe

INVALID = -1  # expert id of a slot that nobody filled


@dataclass
class Inbox(Mailbox):
    """A mailbox that remembers which entries its rank computed. processed: bool [ranks * capacity]."""

    processed: Tensor


class OneSided(RankedMoe):
    """Clean: global ids travel, a kernel marks the slots beyond the counts invalid, and the experts go by the ids alone."""

    def mailbox(self) -> Mailbox:
        """Nothing processed yet."""
        box = super().mailbox()
        return Inbox(**vars(box), processed=torch.zeros(len(box.ids), dtype=torch.bool))

    def send(self, rank: int, box: Mailbox, experts: range, what: tuple[Tensor, Tensor]) -> None:
        """Ids as the sender knows them."""
        super().send(rank, box, experts, what)
        start = rank * self.capacity()
        box.ids[start : start + int(box.counts[rank])] += experts.start

    def compute(self, rank: int, box: Mailbox) -> Tensor:
        """Every row whose id maps to a local expert is computed, and goes back to its slot."""
        assert isinstance(box, Inbox)
        self.sanitize(box)
        local = self.local_ids(rank, box.ids)
        box.processed = local >= 0
        return super().compute(rank, replace(box, ids=local))

    def sanitize(self, box: Inbox) -> None:
        """moe_a2a_sanitize_expert_ids."""
        box.ids[~super().received(box)] = INVALID

    def local_ids(self, rank: int, ids: Tensor) -> Tensor:
        """Global ids through the rank's expert map; invalid ones do not index it."""
        return load(self.map_of(rank), ids, ids != INVALID, other=INVALID)

    def map_of(self, rank: int) -> Tensor:
        """int64 [experts]: the local id, INVALID for other ranks' experts."""
        experts = self.experts_of(rank)
        expert_map = torch.full((self.shape.experts,), INVALID)
        expert_map[experts.start : experts.stop] = torch.arange(len(experts))
        return expert_map

    def received(self, box: Mailbox) -> Tensor:
        """The rows that come back."""
        assert isinstance(box, Inbox)
        return box.processed


class SentinelIndexesExpertMap(OneSided):
    """Padding slots carry id -1 and index expert_map before they are filtered: -1 wraps to the last expert."""

    def local_ids(self, rank: int, ids: Tensor) -> Tensor:
        """On the last rank the last expert is local: padding is computed and sent wherever its slot field points."""
        return self.map_of(rank)[ids]


class PaddingNotSanitized(OneSided):
    """dispatch() is not told an invalid expert id, so the ids of slots beyond the counts are never sanitized."""

    def sanitize(self, box: Inbox) -> None:
        """The kernel is skipped without an id to write."""


class KeptInboxes(OneSided):
    """Clean: the receive buffers live in a workspace that every call uses again."""

    def __init__(self, case: object, inputs: Inputs) -> None:
        self.boxes: list[Mailbox] = []
        super().__init__(case, inputs)  # type: ignore[arg-type]

    def mailbox(self) -> Mailbox:
        """The next rank's, in turn: counts zero, the rest as the last call left it."""
        while len(self.boxes) < self.RANKS:
            box = super().mailbox()
            box.ids.fill_(INVALID)
            self.boxes.append(box)
        self.boxes.append(self.boxes.pop(0))
        self.boxes[-1].counts.zero_()
        return self.boxes[-1]


class PaddingKeepsOldIds(KeptInboxes):
    """Slots beyond the counts are not sanitized in a kept workspace: they hold valid ids of an earlier call."""

    def sanitize(self, box: Inbox) -> None:
        """Harmless until a rank receives less than before."""


class SanitizedAfterRelease(KeptInboxes):
    """The sanitize kernel releases its dependents before it writes (PDL): the experts read the ids of the call before."""

    def compute(self, rank: int, box: Mailbox) -> Tensor:
        """The consumer wins the race."""
        assert isinstance(box, Inbox)
        early = replace(box, ids=box.ids.clone(), counts=torch.full_like(box.counts, self.capacity()))
        rows = super().compute(rank, early)
        box.processed = early.processed
        self.sanitize(box)
        return rows

    def sanitize(self, box: Inbox) -> None:
        """By the counts, as ever."""
        super().sanitize(box)


class QueueOverrun(RankedMoe):
    """A send queue of 8 requests per expert is not drained in time: under a hot expert later ones overwrite earlier."""

    DEPTH: ClassVar[int] = 8  # NVSHMEM_QP_DEPTH in the thread, where 512 tokens fit and more do not

    def send(self, rank: int, box: Mailbox, experts: range, what: tuple[Tensor, Tensor]) -> None:
        """The counts say that everything arrived."""
        super().send(rank, box, experts, what)
        start = rank * self.capacity()
        sent = box.ids[start : start + int(box.counts[rank])].clone()
        for expert in range(len(experts)):
            lost = start + (sent == expert).nonzero().flatten()[: -self.DEPTH]
            box.x[lost] = self.empty(len(lost), self.shape.hidden)
            box.weights[lost] = torch.empty(len(lost))
            box.slot[lost], box.ids[lost] = (torch.empty(len(lost), dtype=torch.int64) for _ in range(2))


FAULTS = (
    planted(
        "B032",
        SentinelIndexesExpertMap,
        "https://github.com/vllm-project/vllm/pull/42034",
        ("non_finite", "nan_from_padding", "poison", "exception", "wrong_expert"),
    ),
    planted(
        "B081",
        PaddingNotSanitized,
        "https://github.com/sgl-project/sglang/pull/24850",
        ("non_finite", "nan_from_padding", "poison", "exception"),
    ),
    planted("B081", PaddingKeepsOldIds, "https://github.com/sgl-project/sglang/pull/24850", ("next_step", "graph", "stale")),
    planted(
        "B131",
        SanitizedAfterRelease,
        "https://github.com/flashinfer-ai/flashinfer/pull/3697",
        ("next_step", "graph", "stale", "repeat"),
    ),
    planted(
        "B155",
        QueueOverrun,
        "https://github.com/deepseek-ai/DeepEP/issues/427",
        ("exception", "non_finite", "nan_from_padding", "poison", "missing_slot", "missing_expert"),
    ),
)
