"""What a routing rule is: scores of all experts, a selection by score (within groups), weights of the selected.

Everything in float64. Equal scores go to the lower expert index, as trtllm-gen and triton_kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """ids [tokens, top_k] int64, weights [tokens, top_k] float64, margin [tokens] float64: the gap between the last
    selected and the first rejected selection score (inf when every expert is selected), or between the last kept and the
    first dropped group where that is smaller."""

    ids: Tensor
    weights: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Slack:
    """How far apart, in selection score, two experts may be and still come out of a right kernel in the other order:
    absolute + relative * |k-th score|, and `ulps` spacings of the logits' dtype relative to that score."""

    absolute: float = 0.0
    relative: float = 0.0
    ulps: float = 0.0

    def at(self, kth: Tensor, dtype: torch.dtype) -> Tensor:
        """[tokens] float64, for the k-th scores `kth` [tokens] of logits of `dtype`; 0 where a score is not finite."""
        relative = self.relative + self.ulps * torch.finfo(dtype).eps
        return torch.where(kth.isfinite(), self.absolute + relative * kth.abs(), 0.0)


@dataclass(frozen=True)
class Rule:
    """A routing rule. score(logits) -> scores [tokens, experts]; a bias is added for the selection only; weigh(scores of
    the selected) -> weights [tokens, top_k], times `scale`. `groups`: (number of expert groups, groups kept), a group
    scoring the sum of its two best experts, or its best one if not `pairs`. `slack` covers the kernels known to compute
    it. `bias_dtype`: what the bias is rounded to first, None for not at all. `shared`: how many of a token's top_k slots are
    fused shared experts (reference/routing/shared.py), which no score selects: logits and bias are of the routed experts."""

    name: str
    score: Callable[[Tensor], Tensor]
    weigh: Callable[[Tensor], Tensor]
    source: str
    biased: bool = False
    groups: tuple[int, int] = (1, 1)
    pairs: bool = True
    scale: float = 1.0
    slack: Slack = Slack(ulps=1.0)
    bias_dtype: torch.dtype | None = None
    shared: int = 0

    def __call__(self, logits: Tensor, bias: Tensor | None, top_k: int) -> Routing:
        """Route logits [tokens, routed experts] (any float dtype); bias [routed experts] iff `biased`. Logits are compared as
        given: those of a kernel that works in bf16 come as bf16, and their ties are ties."""
        scores, biased = self.scores(logits, bias)
        masked, group_margin = self.mask(biased)
        ids, margin = select(masked, top_k - self.shared)
        weights = self.weigh(scores.gather(-1, ids)) * self.scale
        routing = Routing(ids, weights, torch.minimum(margin, group_margin))
        return with_shared(routing, logits.shape[-1], self.shared) if self.shared else routing

    def weights(self, scores: Tensor, ids: Tensor) -> Tensor:
        """[tokens, k] float64: what experts ids [tokens, k] would count with, given the scores [tokens, routed experts]: the
        routed ones by the rule, as if no other slot were there, a shared one 1."""
        shared = ids >= scores.shape[-1]
        never = self.score(scores.new_tensor([[0.0, -torch.inf]]))[0, 1]  # adds nothing to a sum or a softmax
        chosen = scores.gather(-1, ids.clamp(max=scores.shape[-1] - 1)).masked_fill(shared, never)
        return torch.where(shared, 1.0, self.weigh(chosen) * self.scale)

    def units(self, top_k: int) -> tuple[int, int]:
        """Weights of a routed and of a shared slot (0: there is none) where the routed ones are equal shares of `scale`, as
        integers on their common grid."""
        factor, denominator = self.scale.as_integer_ratio()
        return factor, denominator * (top_k - self.shared) if self.shared else 0

    @property
    def alone(self) -> bool:
        """Is the weight of a lone expert the same whatever its score?"""
        low, high = self.weigh(torch.tensor([[0.25], [0.75]], dtype=torch.float64)).flatten()
        return bool(low == high)

    def scores(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scores, selection scores), both [tokens, experts] float64: without and with the bias."""
        if (bias is not None) != self.biased:
            raise ValueError(f"{self.name}: a bias must {'' if self.biased else 'not '}be given")
        scores = self.score(logits.double())
        if bias is None:
            return scores, scores
        rounded = bias if self.bias_dtype is None else bias.to(self.bias_dtype)
        return scores, scores + rounded.double()

    def group_scores(self, selection: Tensor) -> Tensor:
        """[tokens, groups]: the sum of each group's two best selection scores, or its best one."""
        grouped: Tensor = selection.unflatten(-1, (self.groups[0], -1))
        return grouped.topk(2, dim=-1).values.sum(-1) if self.pairs else grouped.amax(-1)

    def mask(self, selection: Tensor) -> tuple[Tensor, Tensor]:
        """(selection scores with -inf outside the kept groups, margin of the group choice [tokens]). A zero mask instead
        of -inf would let masked experts win whenever all biased scores are negative."""
        total, kept = self.groups
        if total == 1:
            return selection, selection.new_full((len(selection),), torch.inf)
        ids, margin = select(self.group_scores(selection), kept)
        keep = torch.zeros(len(selection), total, dtype=torch.bool, device=selection.device).scatter(-1, ids, True)
        return keep_groups(selection, keep), margin

    def problem(self, experts: int, top_k: int) -> str | None:
        """Why this rule cannot route such a shape, or None. Both numbers count the shared experts."""
        if min(experts, top_k) <= self.shared:
            return f"{self.name} wants a routed expert and a slot for it beside {self.shared} shared, got {experts} and {top_k}"
        total, kept = self.groups
        experts, top_k = experts - self.shared, top_k - self.shared
        if total == 1:
            return None
        if experts % total or experts // total < 2:
            beside = f" routed beside {self.shared} shared" if self.shared else ""
            return f"{self.name} wants experts in {total} equal groups of at least 2, got {experts}{beside}"
        if top_k > kept * (experts // total):
            return f"{self.name} keeps {kept} groups of {experts // total} experts, too few for top_k {top_k}"
        return None


def with_shared(routing: Routing, experts: int, shared: int, weight: float = 1.0) -> Routing:
    """Fused shared experts as extra slots: ids experts, experts + 1, ... for every token. weight is 1, or
    1 / routed_scaling_factor where the whole output is scaled afterwards (vLLM) and in FlashInfer's hash_topk."""
    extra = torch.arange(experts, experts + shared, device=routing.ids.device).expand(len(routing.ids), shared)
    weights = routing.weights.new_full(extra.shape, weight)
    return replace(routing, ids=torch.cat((routing.ids, extra), -1), weights=torch.cat((routing.weights, weights), -1))


def keep_groups(selection: Tensor, keep: Tensor) -> Tensor:
    """selection [tokens, experts] with -inf in the groups where keep [tokens, groups] is false."""
    grouped: Tensor = selection.unflatten(-1, (keep.shape[-1], -1))
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)


def select(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids [tokens, top_k] by descending score, ties to the lower index; margin [tokens]). NaN ranks above +inf."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ids = order[:, :top_k]
    if top_k == scores.shape[-1]:
        return ids, scores.new_full((len(scores),), torch.inf)
    last, first = scores.gather(-1, order[:, top_k - 1 : top_k + 1]).unbind(-1)
    return ids, _gap(last, first)


def _gap(last: Tensor, first: Tensor) -> Tensor:
    """last - first for last >= first: 0 between equal infinities or two NaNs, inf between a NaN and a number."""
    tied = (last == first) | (last.isnan() & first.isnan())
    return torch.where(tied, 0.0, torch.where(last.isnan(), torch.inf, last - first))
