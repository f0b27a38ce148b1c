"""What a layer over several ranks should give: the packets that the routing asks for, and the whole's value and error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.backends.base import Backend
from harness.inputs import Inputs
from harness.oracle import Expected, expect
from harness.parallel.blame import Splits
from harness.parallel.host import Received
from harness.parallel.part import part
from harness.parallel.placement import Placement
from reference.bounds import rounding_variance
from reference.rounding import THEN, Rounding


@dataclass(frozen=True)
class Traffic:
    """packets[source][target]: int64 [n, 2], (token, slot) of what one rank sends to another; slot -1 where a packet is a
    token with all its slots."""

    placement: Placement
    packets: tuple[tuple[Tensor, ...], ...]

    def received(self, inputs: Inputs, rank: int) -> Received:
        """What a rank gets to compute."""
        place = torch.cat([row[rank] for row in self.packets])
        token, slot = place[:, 0], place[:, 1]
        if not self.placement.slots:
            return Received(inputs.x[token], inputs.topk_ids[token], inputs.topk_weights[token])
        return Received(inputs.x[token], inputs.topk_ids[token, slot, None], torch.ones(len(token), 1))

    def due(self) -> dict[str, list[Splits]]:
        """Exchange -> the splits of each rank."""
        ranks = range(self.placement.ranks)
        there = [(tuple(len(p) for p in self.packets[r]), tuple(len(self.packets[s][r]) for s in ranks)) for r in ranks]
        return {"dispatch": there, "return": [(receive, send) for send, receive in there]}


def traffic(inputs: Inputs, placement: Placement) -> Traffic:
    """From the routing alone."""
    rows = []
    for source in range(placement.ranks):
        tokens = placement.tokens_of(source)
        ids = inputs.topk_ids[tokens.start : tokens.stop]
        row = []
        for target in range(placement.ranks):
            experts = placement.experts_of(target)
            hit = (ids >= experts.start) & (ids < experts.stop)
            if placement.slots:
                place = hit.nonzero()
            else:
                token = hit.any(-1).nonzero()
                place = torch.cat([token, torch.full_like(token, -1)], dim=1)
            row.append(place + torch.tensor([tokens.start, 0]))
        rows.append(tuple(row))
    return Traffic(placement, tuple(rows))


def declared(backend: Backend, inputs: Inputs, placement: Placement) -> Rounding | None:
    """The backend's roundings and the combine's. Of slots: a kernel leaves each row in the output's type, its sum has one term
    and its weight is 1; the weighted sum is fp32, rounded once."""
    rounding = backend.rounding(inputs.case)
    if rounding is None or not placement.slots:
        return rounding
    row: list[str] = []
    for point in ("row", "weighted", "partial", "out"):
        row += [step for step in rounding.steps(point) if row[-1:] != [step]]
    final = None if inputs.case.recipe.out == "fp32" else inputs.case.recipe.out
    return replace(rounding, row=THEN.join(row) or None, routing_weight=None, weighted=None, partial=None, out=final)


def whole(backend: Backend, inputs: Inputs, traffic: Traffic) -> Expected:
    """The layer on all ranks. Of tokens: every rank's partial sum errs by itself, and so does the sum of the partial sums."""
    rounding = declared(backend, inputs, traffic.placement)
    expected = expect(inputs.case, inputs, rounding)
    if traffic.placement.slots or rounding is None:
        return expected
    final = replace(rounding, out=None if inputs.case.recipe.out == "fp32" else inputs.case.recipe.out)
    variance, exact = rounding_variance(final, "out", expected.value), expected.exact
    everything = Received(inputs.x, inputs.topk_ids, inputs.topk_weights)
    for rank in range(traffic.placement.ranks):
        alone = expect(inputs.case, part(inputs, traffic.placement, rank, everything), rounding, guard=False)
        variance, exact = variance + alone.sigma.square(), exact and alone.exact
    return replace(expected, sigma=variance.sqrt(), exact=exact)


def of_rank(backend: Backend, given: Inputs) -> Expected:
    """What a rank's kernel should give for what it received."""
    return expect(given.case, given, backend.rounding(given.case), guard=False)


def contributions(rows: Tensor, sent: Sequence[Tensor], weights: Tensor, tokens: int) -> Tensor:
    """float64 [ranks, tokens, hidden]: what the rows that came back to a rank from each rank add to its tokens. sent: the
    packets of each rank as (token counted from the rank's first, slot); weights [tokens, top_k]."""
    added = torch.zeros(len(sent), tokens, rows.shape[1], dtype=torch.float64)
    start = 0
    for rank, packets in enumerate(sent):
        token, slot = packets[:, 0], packets[:, 1]
        worth = torch.where(slot < 0, 1.0, weights[token, slot.clamp(min=0)].double())
        added[rank].index_add_(0, token, rows[start : start + len(packets)].double() * worth[:, None])
        start += len(packets)
    return added
