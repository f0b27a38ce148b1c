"""Faults of fused shared experts: extra ids and weight rows behind the routed ones. Here the last expert is the shared one."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.bugs.routing_select import MISROUTED, OwnRouter
from harness.faults.fault import planted
from harness.twins.aligned import NOWHERE, AlignedMoe
from harness.twins.router import Router


class AlignedForRoutedExpertsOnly(AlignedMoe):
    """Without an expert map the slots are aligned for the routed experts only: the shared expert's id counts as invalid."""

    def expert_map(self, ids: Tensor) -> Tensor:
        """Ids from global_num_experts on, which does not count the shared expert, are nobody's."""
        mapped = super().expert_map(ids)
        routed = self.shape.experts - 1
        if len(self.local) < self.shape.experts or routed == 0:
            return mapped
        return torch.where(mapped >= routed, NOWHERE, mapped)


class SharedWeightDividedTwice(OwnRouter):
    """The shared expert's weight is divided by the routed scaling factor for a final multiplication that this path lacks."""

    def route(self) -> tuple[Tensor, Tensor]:
        """The factor is already in the routed weights, and the output is not multiplied."""
        ids, weights = super().route()
        return ids, torch.where(ids == self.shape.experts - 1, weights / self.router().scale, weights)


class SharedInLastSlot(Router):
    """Clean: where the shared expert is due, it replaces the last of the best top_k routed experts."""

    def best(self, selection: Tensor, top_k: int) -> Tensor:
        """ids [tokens, top_k], best first."""
        return super().select(selection, top_k)

    def select(self, selection: Tensor, top_k: int) -> Tensor:
        """See Router."""
        shared = selection.shape[-1] - 1
        due = (super().select(selection, top_k) == shared).any(-1)
        routed = selection.clone()
        routed[:, shared] = -torch.inf
        ids = self.best(routed, top_k)
        ids[due, -1] = shared
        return ids


class SharedExpertMoe(OwnRouter):
    """Clean: a router with a fused shared expert."""

    ROUTER = SharedInLastSlot


class _Unsorted(SharedInLastSlot):
    def best(self, selection: Tensor, top_k: int) -> Tensor:
        return super().best(selection, top_k).sort(-1).values


class UnsortedTopKLosesAnyExpert(SharedExpertMoe):
    """topk(sorted=False) gives the experts in index order: the shared expert replaces the last, not the least."""

    ROUTER = _Unsorted


FAULTS = (
    planted(
        "B012",
        AlignedForRoutedExpertsOnly,
        "https://github.com/vllm-project/vllm/pull/51632",
        ("missing_expert", "missing_slot", "zeros"),
    ),
    planted(
        "B064",
        SharedWeightDividedTwice,
        "https://github.com/sgl-project/sglang/pull/28237",
        ("constant_factor",),
    ),
    planted("B216", UnsortedTopKLosesAnyExpert, "https://github.com/sgl-project/sglang/pull/8125", MISROUTED),
)
