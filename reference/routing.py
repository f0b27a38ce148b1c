"""Routing rules: logits -> which experts, with which weights, and how close the next expert came.

Everything in float64. Rules carry names, never numbers: the numbers of FlashInfer and vLLM differ (9 is TopKSigmoid in
one and Unspecified in the other). Equal scores go to the lower expert index, as trtllm-gen and triton_kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """ids [tokens, top_k] int64, weights [tokens, top_k] float64, margin [tokens] float64: the gap between the last
    selected and the first rejected selection score (inf when every expert is selected)."""

    ids: Tensor
    weights: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Rule:
    """A routing rule. `groups`: (number of expert groups, groups kept); `scale` multiplies the final weights."""

    name: str
    apply: Callable[[Rule, Tensor, Tensor | None, int], Routing]
    source: str
    biased: bool = False
    groups: tuple[int, int] = (1, 1)
    scale: float = 1.0

    def __call__(self, logits: Tensor, bias: Tensor | None, top_k: int) -> Routing:
        """Route logits [tokens, experts] (any float dtype); bias [experts] iff `biased`."""
        if (bias is not None) != self.biased:
            raise ValueError(f"{self.name}: a bias must {'' if self.biased else 'not '}be given")
        return self.apply(self, logits.double(), None if bias is None else bias.double(), top_k)

    def problem(self, experts: int, top_k: int) -> str | None:
        """Why this rule cannot route such a shape, or None."""
        total, kept = self.groups
        if total == 1:
            return None
        if experts % total or experts // total < 2:
            return f"{self.name} wants experts in {total} equal groups of at least 2, got {experts}"
        if top_k > kept * (experts // total):
            return f"{self.name} keeps {kept} groups of {experts // total} experts, too few for top_k {top_k}"
        return None


def select(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids [tokens, top_k] by descending score, ties to the lower index; margin [tokens]). NaN ranks above +inf."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ids = order[:, :top_k]
    if top_k == scores.shape[-1]:
        return ids, torch.full_like(scores[:, 0], torch.inf)
    ranked = scores.gather(-1, order[:, top_k - 1 : top_k + 1])
    return ids, ranked[:, 0] - ranked[:, 1]


def _default(rule: Rule, logits: Tensor, bias: Tensor | None, top_k: int) -> Routing:
    probabilities = logits.softmax(-1)
    ids, margin = select(probabilities, top_k)
    return Routing(ids, probabilities.gather(-1, ids), margin)


def _renormalize(rule: Rule, logits: Tensor, bias: Tensor | None, top_k: int) -> Routing:
    ids, margin = select(logits, top_k)
    return Routing(ids, logits.gather(-1, ids).softmax(-1), margin)


def _deepseek_v3(rule: Rule, logits: Tensor, bias: Tensor | None, top_k: int) -> Routing:
    scores = logits.sigmoid()
    biased = scores if bias is None else scores + bias
    masked, group_margin = _mask_groups(biased, rule.groups)
    ids, margin = select(masked, top_k)
    weights = scores.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * rule.scale
    return Routing(ids, weights, torch.minimum(margin, group_margin))


def _mask_groups(biased: Tensor, groups: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(scores with -inf outside the kept groups, margin of the group choice [tokens]). A group scores the sum of its two
    best; a zero mask instead of -inf would let masked experts win whenever all biased scores are negative."""
    total, kept = groups
    if total == 1:
        return biased, torch.full_like(biased[:, 0], torch.inf)
    grouped = biased.unflatten(-1, (total, -1))
    best_two = grouped.topk(2, dim=-1).values.sum(-1)
    kept_ids, margin = select(best_two, kept)
    keep = torch.zeros_like(best_two, dtype=torch.bool).scatter(-1, kept_ids, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2), margin


_V3 = "DeepSeek-V3 modeling code (MoEGate, noaux_tc); FlashInfer RoutingMethodType.DeepSeekV3"
RULES = {
    rule.name: rule
    for rule in (
        Rule("default", _default, "FlashInfer RoutingMethodType.Default: softmax over all, then top-k"),
        Rule("renormalize", _renormalize, "FlashInfer RoutingMethodType.Renormalize: top-k, then softmax over the selected"),
        Rule("deepseek_v3", _deepseek_v3, _V3, biased=True, groups=(8, 4), scale=2.5),
        Rule("kimi_k2", _deepseek_v3, "Kimi-K2 config.json: n_group 1, routed_scaling_factor 2.827", biased=True, scale=2.827),
    )
}
