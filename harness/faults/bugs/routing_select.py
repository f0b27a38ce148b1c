"""Faults of the routing kernel's selection: groups, sentinels, padded lanes, candidate slots, what it refuses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.grouped import GroupedMoe
from harness.twins.router import ROUTERS, Router

WARP = 32  # lanes of a warp: the width a router pads the experts to
CANDIDATES = 8  # shared-memory slots of a warp's candidates: the largest top_k that kernel takes
FEWEST_EXPERTS = 22  # the lower bound that the DeepSeek kernel was given


class OwnRouter(GroupedMoe):
    """Clean: the library's routing kernel is `ROUTER`."""

    ROUTER: ClassVar[type[Router]] = Router

    def router(self) -> Router:
        """The kernel with the rule's parameters."""
        return self.ROUTER(**vars(ROUTERS[self.case.routing]()))

    def route(self) -> tuple[Tensor, Tensor]:
        """See GroupedMoe."""
        return self.router()(self.step["logits"], self.step.get("bias"), self.shape.top_k)


class _BestOfGroup(Router):
    def group_scores(self, grouped: Tensor) -> Tensor:
        return grouped.amax(-1)


class GroupScoreIsItsMaximum(OwnRouter):
    """A group scores its best expert although there is a correction bias; the sum of its two best is due."""

    ROUTER = _BestOfGroup


class _ZeroMask(Router):
    def mask_groups(self, selection: Tensor) -> Tensor:
        masked = super().mask_groups(selection)
        return torch.where(masked.isneginf(), 0.0, masked)


class DroppedGroupsScoreZero(OwnRouter):
    """Dropped groups are masked with 0, not -inf: their experts win when all the biased scores kept are negative."""

    ROUTER = _ZeroMask


class _ZeroSentinel(Router):
    def select(self, selection: Tensor, top_k: int) -> Tensor:
        lanes = -selection.shape[-1] % WARP
        return super().select(torch.nn.functional.pad(selection, (0, lanes)), top_k)


class InvalidScoreIsZero(OwnRouter):
    """The score of lanes without an expert is 0, which is above every negative biased score."""

    ROUTER = _ZeroSentinel


class _StaleCandidates(Router):
    def select(self, selection: Tensor, top_k: int) -> Tensor:
        scores = torch.empty(len(selection), CANDIDATES)
        ids = torch.empty(scores.shape, dtype=torch.int64)
        ids[:, :top_k] = super().select(selection, top_k)
        scores[:, :top_k] = selection.gather(-1, ids[:, :top_k])
        return ids.gather(-1, super().select(scores, top_k))


class StaleCandidateSlots(OwnRouter):
    """Ungrouped DeepSeek routing with top_k below 8: the last stage also reads candidate slots that nobody wrote."""

    def router(self) -> Router:
        """One warp writes top_k of its 8 slots in shared memory; the grouped kernel masks the rest."""
        rule = super().router()
        return _StaleCandidates(**vars(rule)) if "bias" in self.step and rule.groups[0] == 1 else rule


class ExpertCapacityCountsGroups(OwnRouter):
    """The check of top_k counts the groups, not the experts in the kept groups, and refuses ungrouped DeepSeek routing."""

    def router(self) -> Router:
        """groups = kept = 1 leaves room for one expert."""
        rule = super().router()
        number, kept = rule.groups
        if "bias" in self.step and number * kept < self.shape.top_k:
            raise RuntimeError(f"n_group {number} * topk_group {kept} must be at least top_k {self.shape.top_k}")
        return rule


class FewExpertsRefused(OwnRouter):
    """The DeepSeek routing kernel's lower bound was raised: fewer than 22 experts, which used to work, are refused."""

    def router(self) -> Router:
        """Grouped rules only."""
        rule = super().router()
        if rule.groups[0] > 1 and self.shape.experts < FEWEST_EXPERTS:
            raise RuntimeError(f"routing kernel expects at least {FEWEST_EXPERTS} experts, got {self.shape.experts}")
        return rule


class _Bf16Sum(Router):
    def biased(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else (scores.bfloat16() + bias.bfloat16()).float()


class SelectionScoresInBf16(OwnRouter):
    """Score plus bias is added in bf16: experts that only fp32 tells apart change places."""

    ROUTER = _Bf16Sum


class _PaddedGroups(Router):
    def __call__(self, logits: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        number = self.groups[0]
        size = logits.shape[-1] // number
        lanes = 1 << (size - 1).bit_length()

        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x.unflatten(-1, (number, size)), (0, lanes - size)).flatten(-2)

        ids, weights = super().__call__(padded(logits), None if bias is None else padded(bias), top_k)
        return ids // lanes * size + ids % lanes, weights


class PaddedLanesNotMaskedAgain(OwnRouter):
    """Groups are padded to a power of two; the padded lanes are not masked again behind the sigmoid and score 0.5."""

    def router(self) -> Router:
        """grouped_topk serves the biased sigmoid rules; one group is all experts."""
        rule = super().router()
        return _PaddedGroups(**vars(rule)) if "bias" in self.step else rule


class _EqualsMaximum(Router):
    def select(self, selection: Tensor, top_k: int) -> Tensor:
        left, ids, width = selection.clone(), [], selection.shape[-1]
        for _ in range(top_k):
            hit = left == left.amax(-1, keepdim=True)
            ids.append(torch.where(hit.any(-1, keepdim=True), hit.int().argmax(-1, keepdim=True), width))
            left.scatter_(-1, ids[-1].clamp(max=width - 1), -torch.inf)
        return torch.cat(ids, -1)


class NoLaneEqualsNan(OwnRouter):
    """The best lane is the one that equals the maximum: in a row of NaN none does, and the id is the number of lanes."""

    ROUTER = _EqualsMaximum


_V3 = "https://github.com/vllm-project/vllm/pull/13474"
_CAPACITY = "https://github.com/flashinfer-ai/flashinfer/pull/5165"
_F32 = "https://github.com/flagos-ai/FlagGems/pull/5469"
# Another expert came in where the right one was due; where its score is 0, as in the exact fill, what one sees is the right
# experts without the one that had to go, and with the weights that renormalising leaves them.
MISROUTED = ("wrong_expert", "missing_slot", "missing_expert", "wrong_weights")
FAULTS = (
    planted("B014", GroupScoreIsItsMaximum, _V3, MISROUTED),
    planted("B014", DroppedGroupsScoreZero, _V3, MISROUTED),
    planted("B059", NoLaneEqualsNan, "https://github.com/sgl-project/sglang/pull/30079", ("exception", "non_finite")),
    planted(
        "B114", InvalidScoreIsZero, "https://github.com/flashinfer-ai/flashinfer/issues/2168", ("exception", "missing_slot")
    ),
    planted("B115", StaleCandidateSlots, _CAPACITY, ("exception", "poison", "non_finite", "wrong_expert", "missing_slot")),
    planted("B115", ExpertCapacityCountsGroups, _CAPACITY, ("exception",)),
    planted("B129", FewExpertsRefused, "https://github.com/flashinfer-ai/flashinfer/pull/2451", ("exception",)),
    planted("B201", SelectionScoresInBf16, _F32, MISROUTED),
    planted("B201", PaddedLanesNotMaskedAgain, _F32, ("exception", "zeros", *MISROUTED)),
)
