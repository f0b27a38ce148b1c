"""Is another kernel's selection as right as ours? Near ties may go either way, a worse expert may not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reference.routing.rule import Rule, keep_groups, select


def legal(rule: Rule, logits: Tensor, bias: Tensor | None, ids: Tensor, delta: float | None = None) -> Tensor:
    """[tokens] bool: do ids [tokens, top_k] hold distinct experts, none of them further than delta below an expert that
    was left out, out of groups that could have been kept within delta? delta None is the rule's own slack. Order within
    a token does not matter; NaN scores rank as +inf, so which NaN is taken does not either. A fused shared expert must be
    there once."""
    if rule.shared:
        ids = ids.sort(-1).values
        due = logits.shape[-1] + torch.arange(rule.shared, device=ids.device)
        routed = legal(replace(rule, shared=0), logits, bias, ids[:, : -rule.shared], delta)
        return routed & (ids[:, -rule.shared :] == due).all(-1)
    _, selection = rule.scores(logits, bias)
    selection = selection.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    experts, top_k = selection.shape[-1], ids.shape[-1]
    inside = ((ids >= 0) & (ids < experts)).all(-1)
    chosen = torch.zeros_like(selection, dtype=torch.bool).scatter(-1, ids.long().clamp(0, experts - 1), True)
    kth = select(rule.mask(selection)[0], top_k)[0][:, -1:]
    slack = rule.slack.at(selection.gather(-1, kth)[:, 0], logits.dtype) if delta is None else _same(delta, selection)
    groups_right = torch.ones_like(inside)
    if rule.groups[0] > 1:
        selection, groups_right = _in_best_groups(rule, selection, chosen, slack)
    worst = selection.masked_fill(~chosen, torch.inf).amin(-1)
    missed = selection.masked_fill(chosen, -torch.inf).amax(-1)
    return inside & (chosen.sum(-1) == top_k) & groups_right & (worst >= missed - slack)


def _same(delta: float, selection: Tensor) -> Tensor:
    return selection.new_full((len(selection),), delta)


def _in_best_groups(rule: Rule, selection: Tensor, chosen: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """(selection outside the kept groups set to -inf, whether the chosen experts lie in groups that may be kept).

    Of all choices of groups within slack of the last kept one that contain the chosen experts, the one whose other
    members score least: if the selection is wrong there, it is wrong everywhere. A sum of two scores errs twice.
    """
    total, kept = rule.groups
    scores = rule.group_scores(selection)
    last = scores.gather(-1, select(scores, kept)[0][:, -1:])
    slack = slack[:, None] * (2 if rule.pairs else 1)
    must, may = scores > last + slack, scores >= last - slack
    touched = chosen.unflatten(-1, (total, -1)).any(-1)
    held = must | touched
    best = selection.unflatten(-1, (total, -1)).amax(-1).masked_fill(held | ~may, torch.inf)
    order = best.argsort(dim=-1)
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(total, device=order.device).expand_as(order))
    filled = held | (may & (rank < kept - held.sum(-1, keepdim=True)))
    return keep_groups(selection, filled), (touched <= may).all(-1) & (held.sum(-1) <= kept)
