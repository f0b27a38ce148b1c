"""Hosts of several ranks that are wrong on one of them, and kernels that are; each must be caught, and that rank named."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import replace

import torch
from torch import Tensor

from harness.parallel.host import Host, Received, Sent

GUILTY = 1
LONG_S = 3600.0


class WrongSplits(Host):
    """Rank 1 forgets a row of what it owes rank 0: its splits and everybody's counts disagree."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Received, Sent]:
        """See Host."""
        if self.rank != GUILTY:
            return super().dispatch(x, ids, weights)
        rows = self.wire.rows

        def fewer(stage: str, given: Tensor, send: list[int], receive: list[int]) -> Tensor:
            first = max(0, send[0] - 1)
            return rows(stage, given[send[0] - first :], [first, *send[1:]], receive)

        self.wire.rows = fewer  # type: ignore[assignment, method-assign]
        try:
            return super().dispatch(x, ids, weights)
        finally:
            self.wire.rows = rows  # type: ignore[method-assign]


class OtherTokens(Host):
    """Rank 1 sends its tokens' rows in the wrong order, with the right experts and weights."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Received, Sent]:
        """See Host."""
        return super().dispatch(x.flip(0) if self.rank == GUILTY else x, ids, weights)


class SwappedCombine(Host):
    """Rank 1 adds the rows that came back to the tokens in the wrong order."""

    def combine(self, rows: Tensor, sent: Sent, tokens: int) -> Tensor:
        """See Host."""
        return super().combine(rows.flip(0) if self.rank == GUILTY else rows, sent, tokens)


class DroppedResults(Host):
    """Rank 0 leaves out of the sum what rank 1 gave back."""

    def combine(self, rows: Tensor, sent: Sent, tokens: int) -> Tensor:
        """See Host."""
        if self.rank:
            return super().combine(rows, sent, tokens)
        start = sum(sent.send[:GUILTY])
        lost = rows.clone()
        lost[start : start + sent.send[GUILTY]] = 0
        return super().combine(lost, sent, tokens)


class SilentReturn(Host):
    """Rank 1 gives back rows of zeros in the place of its results."""

    def give_back(self, rows: Tensor, sent: Sent) -> Tensor:
        """See Host."""
        return super().give_back(torch.zeros_like(rows) if self.rank == GUILTY else rows, sent)


class WeightsTwice(Host):
    """Rank 1 applies the routing weights at home once more than it should."""

    def combine(self, rows: Tensor, sent: Sent, tokens: int) -> Tensor:
        """See Host."""
        twice = sent.weights.square() if self.placement.slots else sent.weights / 2
        return super().combine(rows, replace(sent, weights=twice) if self.rank == GUILTY else sent, tokens)


class Segfaults(Host):
    """Rank 1 dies while it sends its results back."""

    def give_back(self, rows: Tensor, sent: Sent) -> Tensor:
        """See Host."""
        if self.rank == GUILTY:
            ctypes.string_at(0)
        return super().give_back(rows, sent)


class Exits(Host):
    """Rank 1 ends the process before it dispatches."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Received, Sent]:
        """See Host."""
        if self.rank == GUILTY:
            os._exit(7)
        return super().dispatch(x, ids, weights)


class Hangs(Host):
    """Rank 1 never comes to the dispatch."""

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Received, Sent]:
        """See Host."""
        if self.rank == GUILTY:
            time.sleep(LONG_S)
        return super().dispatch(x, ids, weights)


class Raises(Host):
    """Rank 1 fails to add up what came back."""

    def combine(self, rows: Tensor, sent: Sent, tokens: int) -> Tensor:
        """See Host."""
        if self.rank == GUILTY:
            raise RuntimeError("no room for the sum")
        return super().combine(rows, sent, tokens)


class BadAddress(Host):
    """On GPUs: rank 1's results are read past the end of what is mapped, an illegal memory access on its device."""

    def give_back(self, rows: Tensor, sent: Sent) -> Tensor:
        """See Host."""
        if self.rank == GUILTY:
            far = torch.full((1,), 1 << 40, dtype=torch.int64, device=rows.device)
            rows = rows + rows.flatten().take(far)
        return super().give_back(rows, sent)
