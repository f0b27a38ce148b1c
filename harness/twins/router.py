"""Top-k routing as a fused router kernel does it: scores, groups, selection round by round, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -torch.inf


@dataclass(frozen=True)
class Router:
    """Every step is a method, so that a fault replaces one. logits float32 [tokens, experts]; `bias` float32 [experts] or None.

    softmax: scores are a softmax over all experts, else sigmoids; selected_softmax: the softmax is taken over the selected
    logits; groups: (number, kept); renormalize: weights are divided by their sum; scale: routed scaling factor.
    """

    softmax: bool = True
    selected_softmax: bool = False
    groups: tuple[int, int] = (1, 1)
    renormalize: bool = False
    scale: float = 1.0

    def __call__(self, logits: Tensor, bias: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """(ids int64, weights float32), both [tokens, top_k]."""
        scores = self.score(logits.float())
        selection = self.mask_groups(self.biased(scores, bias))
        ids = self.select(selection, top_k)
        return ids, self.weigh(scores.gather(-1, ids))

    def score(self, logits: Tensor) -> Tensor:
        """[tokens, experts]."""
        if self.selected_softmax:
            return logits
        return logits.softmax(-1) if self.softmax else torch.sigmoid(logits)

    def biased(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Scores that select."""
        return scores if bias is None else scores + bias.float()

    def group_scores(self, grouped: Tensor) -> Tensor:
        """[tokens, groups] from [tokens, groups, experts / groups]: the sum of the two best."""
        return grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)

    def mask_groups(self, selection: Tensor) -> Tensor:
        """Experts of groups that are not kept can not be selected."""
        number, kept = self.groups
        if number == 1:
            return selection
        grouped = selection.unflatten(-1, (number, -1))
        best = self.group_scores(grouped).topk(kept, dim=-1).indices
        keep = torch.zeros(selection.shape[0], number, dtype=torch.bool).scatter_(-1, best, True)
        return torch.where(keep.unsqueeze(-1), grouped, LOWEST).flatten(-2)

    def select(self, selection: Tensor, top_k: int) -> Tensor:
        """The best expert, then the best of the rest, ...: equal scores go to the lower index."""
        left, ids = selection.clone(), []
        for _ in range(top_k):
            ids.append(left.argmax(-1, keepdim=True))
            left.scatter_(-1, ids[-1], LOWEST)
        return torch.cat(ids, -1)

    def weigh(self, chosen: Tensor) -> Tensor:
        """Weights of the selected [tokens, top_k]."""
        if self.selected_softmax:
            return chosen.softmax(-1) * self.scale
        if self.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen * self.scale


ROUTERS: dict[str, Callable[[], Router]] = {
    "default": lambda: Router(),
    "renormalize": lambda: Router(selected_softmax=True),
    "sigmoid": lambda: Router(softmax=False),
    "deepseek_v3": lambda: Router(softmax=False, groups=(8, 4), renormalize=True, scale=2.5),
    "minimax2": lambda: Router(softmax=False, renormalize=True),
}
