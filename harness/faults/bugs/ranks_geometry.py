"""Faults of what ranks must agree on (sizes, id types, ranks without tokens), and of a combine that reads too early."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.ranks import Mailbox, RankedMoe


class StrideFromOwnTokens(RankedMoe):
    """A sender's stride in the receive buffers comes from its own token count, not the largest: rows land elsewhere."""

    sender: int | None = None

    def send(self, rank: int, box: Mailbox, experts: range, what: tuple[Tensor, Tensor]) -> None:
        """The receiver reads with the stride its buffer was made for."""
        self.sender = rank
        super().send(rank, box, experts, what)
        self.sender = None

    def capacity(self) -> int:
        """The sender's, while it sends."""
        return super().capacity() if self.sender is None else len(self.tokens_of(self.sender)) * self.shape.top_k


class ExactCapacity(RankedMoe):
    """Clean: without dropped tokens the capacity is any expert's largest count on any rank, by an all-reduce."""

    def run(self, out: Tensor) -> None:
        """An all-to-all of unequal shapes never completes."""
        if len({self.agreed(rank) for rank in range(self.RANKS)}) > 1:
            self.stall()
        super().run(out)

    def agreed(self, rank: int) -> int:
        """What the rank takes the capacity to be."""
        return max(self.largest(other) for other in range(self.RANKS))

    def largest(self, rank: int) -> int:
        """The rank's slots of its most wanted expert."""
        tokens = self.tokens_of(rank)
        ids = self.step["ids"][tokens.start : tokens.stop].flatten()
        return int(torch.bincount(ids, minlength=self.shape.experts).max())

    def stall(self) -> None:
        """As a collective does whose peers wait for other sizes."""
        while True:
            time.sleep(1)


class CapacityFromOwnTokens(ExactCapacity):
    """Each rank takes the capacity from its own tokens: the shapes of the all-to-all differ, and it never returns."""

    def agreed(self, rank: int) -> int:
        """No all-reduce."""
        return self.largest(rank)


class IdsOfInt32(RankedMoe):
    """Clean: the all-to-all takes int32 ids; where the load is uniform they come from the routing simulator."""

    SIMULATED: ClassVar[torch.dtype] = torch.int32

    def step_buffers(self, inputs: Inputs) -> dict[str, Tensor]:
        """The router's are int32."""
        dtype = self.SIMULATED if self.case.skew == "uniform" else torch.int32
        return {**super().step_buffers(inputs), "ids": inputs.topk_ids.to(dtype)}

    def dispatch(self, rank: int, boxes: list[Mailbox]) -> None:
        """Check, then send."""
        if self.step["ids"].dtype != torch.int32:
            raise RuntimeError("Check failed: expertsIds.dtype() == dl_int32")
        super().dispatch(rank, boxes)


class SimulatedIdsInt64(IdsOfInt32):
    """The routing simulator makes int64 ids by default; the all-to-all behind it checks for int32 and refuses them."""

    SIMULATED: ClassVar[torch.dtype] = torch.int64


class EmptyRankRefused(RankedMoe):
    """Dispatch launches a block per token of its rank: a rank without tokens launches an empty grid, which is an error."""

    def dispatch(self, rank: int, boxes: list[Mailbox]) -> None:
        """The other ranks are right."""
        if not len(self.tokens_of(rank)):
            raise RuntimeError("CUDA error: invalid configuration argument")
        super().dispatch(rank, boxes)


class CombineTakesStaleChunk(RankedMoe):
    """At full batches one combine in fifty reads a quarter of one row too early: it takes what the slot held before."""

    FULL: ClassVar[int] = 17  # tokens of a rank, the most it ever has here; 256 in the thread, where 128 are clean
    RARELY: ClassVar[int] = 50  # calls: 1.5 % to 3.3 % of them in the thread
    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def combine(self, partials: list[Tensor], boxes: list[Mailbox], out: Tensor) -> None:
        """Plausible values of the right magnitude."""
        super().combine(partials, boxes, out)
        if len(self.tokens_of(0)) >= self.FULL and next(self.calls) % self.RARELY == 0:
            chunk = slice(self.shape.hidden // 4, self.shape.hidden // 2)
            out[3, chunk] = out[2, chunk]


FAULTS = (
    planted(
        "B082",
        StrideFromOwnTokens,
        "https://github.com/sgl-project/sglang/pull/27945",
        ("non_finite", "nan_from_padding", "poison", "exception", "never_written"),
    ),
    planted(
        "B184",
        CapacityFromOwnTokens,
        "https://github.com/deepspeedai/DeepSpeed/issues/6809",
        ("death", "hung"),
    ),
    planted("B050", SimulatedIdsInt64, "https://github.com/vllm-project/vllm/pull/38352", ("exception",)),
    planted("B154", EmptyRankRefused, "https://github.com/deepseek-ai/DeepEP/pull/374", ("exception",)),
    planted(
        "B153",
        CombineTakesStaleChunk,
        "https://github.com/deepseek-ai/DeepEP/issues/700",
        ("repeat", "wrong_tile", "unexplained"),
    ),
)
