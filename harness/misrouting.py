"""Hypotheses about which experts a token reached and how much each of them counts, read off the output by a fit.

The outputs of all experts for one token are far from parallel, so the few that make up its row can be told from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harness.evidence import Claim, Evidence
from harness.whatif import Layer, spread
from reference.routing import RULES

MAX_TOKENS = 16  # hit rows at which every expert is tried: each is a pass over all weights
DETERMINED = 0.75  # unknowns per equation above which a plain least-squares fit says nothing; then experts go one by one
STRANGE = 0.05  # share of its row's error that experts which were not chosen must carry before the token was misrouted
TOLD = 4  # tokens that a text tells about


@dataclass(frozen=True)
class Misrouted:
    """The hit rows of `tokens` [n] as sums of experts that the routing did not choose."""

    e: Evidence
    layer: Layer
    tokens: Tensor

    @classmethod
    def of(cls, e: Evidence, layer: Layer) -> Misrouted | None:
        """At as many hit rows as the cost allows; None where no expert was left out, or a row holds no numbers."""
        shape = layer.case.shape
        tokens = spread(e.hit.nonzero().flatten(), MAX_TOKENS)
        if shape.experts < 2 or not layer.experts_affordable(len(tokens)) or not bool(e.actual[tokens].isfinite().all()):
            return None
        return cls(e, layer, tokens)

    @cached_property
    def rows(self) -> Tensor:
        """[n, experts, hidden]: what every expert makes of the tokens."""
        return torch.stack([self.layer.expert_rows(x, self.tokens) for x in range(self.layer.case.shape.experts)], 1)

    @cached_property
    def gram(self) -> Tensor:
        """[n, experts, experts]: scalar products of the experts' rows."""
        return self.rows @ self.rows.transpose(1, 2)

    @cached_property
    def due(self) -> tuple[Tensor, Tensor]:
        """(ids, weights) [n, top_k] of the right routing."""
        routing = self.e.expected.routing
        return routing.ids[self.tokens], routing.weights[self.tokens]

    def claims(self) -> Iterator[Claim | None]:
        """In each row one expert in another's place or the experts of another selection; then any few experts with weights
        of their own."""
        ids, weights = self.due
        used, prediction = self._replaced(ids, weights)
        if ids.shape[1] == self.layer.case.shape.experts:
            yield self._claim(used, prediction, "")
            return
        chosen, fitted = self._chosen(ids.shape[1])
        by_rule = self._sum(chosen, self._weights_by_rule(chosen))
        closer = (self._left(by_rule) < self._left(prediction))[:, None]
        yield self._claim(torch.where(closer, chosen, used), torch.where(closer, by_rule, prediction), "")
        if self._strange(chosen, fitted):
            claim = self._claim(chosen, self._sum(chosen, fitted), " with weights that the rule does not give them")
            yield None if claim is None else replace(claim, late=True)

    def _claim(self, used: Tensor, prediction: Tensor, how: str) -> Claim | None:
        ids, _ = self.due
        if not bool((used.sort(-1).values != ids.sort(-1).values).any(-1).all()):
            return None
        moves = [[int(t), u.tolist(), d.tolist()] for t, u, d in zip(self.tokens, used, ids, strict=True)]
        told = "; ".join(f"token {t} by {u}, not {d}" for t, u, d in moves[:TOLD])
        text = f"{int(self.e.hit.sum())} tokens were computed by other experts{how}: {told}"
        return self.e.claim("wrong_expert", text, prediction, {"routed": moves}, self.tokens)

    def _left(self, prediction: Tensor) -> Tensor:
        """[n]: what a prediction leaves of each row."""
        return (self.e.actual[self.tokens] - prediction).square().sum(-1)

    def _sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """[n, hidden]: experts ids [n, k] of each token, weighted."""
        picked = self.rows.gather(1, ids[..., None].expand(*ids.shape, self.rows.shape[-1]))
        return (picked * weights[..., None]).sum(1)

    def _replaced(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(ids with one slot's expert exchanged, the output then), for each token the exchange that fits best."""
        error = (self.e.actual - self.e.value)[self.tokens]
        along = (self.rows @ error[..., None])[..., 0]
        square = self.gram.diagonal(dim1=1, dim2=2)
        mine = self.gram.gather(1, ids[..., None].expand(*ids.shape, self.gram.shape[-1]))  # [n, k, experts]
        step = square[:, None, :] - 2 * mine + square.gather(1, ids)[..., None]  # |row of e' - row of slot k|^2
        pull = along[:, None, :] - along.gather(1, ids)[..., None]
        left = weights[..., None].square() * step - 2 * weights[..., None] * pull
        best = left.flatten(1).argmin(-1)
        slot, expert = best // left.shape[-1], best % left.shape[-1]
        used = ids.clone()
        used[torch.arange(len(ids)), slot] = expert
        return used, self._sum(used, weights)

    def _chosen(self, top_k: int) -> tuple[Tensor, Tensor]:
        """(ids, weights) [n, top_k] of the experts that explain the rows best."""
        experts, hidden = self.rows.shape[1:]
        actual = self.e.actual[self.tokens]
        along = (self.rows @ actual[..., None])[..., 0]
        length = self.gram.diagonal(dim1=1, dim2=2).sqrt()
        if experts <= DETERMINED * hidden:
            share = (torch.linalg.pinv(self.gram, hermitian=True) @ along[..., None])[..., 0] * length
            ids = share.abs().topk(top_k, dim=-1).indices
            return ids, self._fitted(ids, along)
        ids = along.new_zeros(len(along), 0, dtype=torch.int64)
        left = actual
        for _ in range(top_k):
            score = (self.rows @ left[..., None])[..., 0].abs() / length.clamp(min=torch.finfo(length.dtype).tiny)
            score.scatter_(1, ids, -1.0)
            ids = torch.cat((ids, score.argmax(-1, keepdim=True)), -1)
            left = actual - self._sum(ids, self._fitted(ids, along))
        return ids, self._fitted(ids, along)

    def _fitted(self, ids: Tensor, along: Tensor) -> Tensor:
        """The weights [n, k] with which experts ids [n, k] come closest; along [n, experts]: rows times the output."""
        across = self.gram.gather(1, ids[..., None].expand(*ids.shape, self.gram.shape[-1]))
        inner = across.gather(2, ids[:, None, :].expand(*ids.shape, ids.shape[1]))
        fitted: Tensor = torch.linalg.pinv(inner, hermitian=True) @ along.gather(1, ids)[..., None]
        return fitted[..., 0]

    def _weights_by_rule(self, ids: Tensor) -> Tensor:
        """float64 [n, k]: what the case's rule weighs these experts with."""
        inputs, rule = self.layer.inputs, RULES[self.layer.case.routing]
        at = self.tokens.to(inputs.device)
        scores = rule.scores(inputs.logits[at], inputs.bias)[0].cpu()
        return rule.weights(scores, ids)

    def _strange(self, ids: Tensor, weights: Tensor) -> bool:
        """Whether in every row experts that were not chosen carry a fair share of the error."""
        due, _ = self.due
        outside = ~(ids[..., None] == due[:, None, :]).any(-1)
        theirs = self._sum(ids, torch.where(outside, weights, 0.0)).square().sum(-1)
        error = (self.e.actual - self.e.value)[self.tokens].square().sum(-1)
        return bool((theirs > STRANGE * error).all())
