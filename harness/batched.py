"""Experts passed several at once: a small layer's time is that of its operations' launches, not of their arithmetic.

Each expert's rows meet its weights alone, as in `reference.moe.passes`; they only lie side by side, padded to equal counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from reference.dispatch import dispatch
from reference.experts import ExpertPass, ExpertWeights, forward
from reference.grid import FLOATS
from reference.moe import Experts, entering, passes
from reference.rounding import Rounding
from reference.routing import Routing

WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # in float64 at once: 8 MiB, about a core's cache; 256 MiB
FEW = 16  # rows: reading an expert's weights takes longer than multiplying so many by them


@dataclass(frozen=True)
class Group:
    """Experts passed at once. slots [n]: theirs, expert after expert, `counts` of each; done and weights: of one expert, or
    of several along a leading axis, its rows padded with its first one; place [n]: the slots' rows among all of those."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    slots: Tensor
    done: ExpertPass
    weights: ExpertWeights
    place: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """[n, ...], one for each slot, of a tensor that lies as `done` does."""
        return x if self.place is None else x.flatten(0, 1)[self.place]

    def alone(self) -> Iterator[tuple[int, Tensor, ExpertPass]]:
        """(expert, slots, pass) one by one."""
        if self.place is None:
            yield self.experts[0], self.slots, self.done
            return
        for i, (expert, count, slots) in enumerate(zip(self.experts, self.counts, self.slots.split(self.counts), strict=True)):
            up = None if self.done.up is None else self.done.up[i, :count]
            others = (t[i, :count] for t in (self.done.middle, self.done.row))
            yield expert, slots, ExpertPass(self.done.x[i, :count], self.done.gate[i, :count], up, *others)


def groups(x: Tensor, routing: Routing, experts: Experts, roundings: Sequence[Rounding]) -> Iterator[Group]:
    """All experts that received a token, passed under the first of `roundings`; the others are what a caller will ask of the
    passes. One at a time where a point is a format with scales: those are fitted to matrices."""
    if not all(_elementwise(rounding) for rounding in roundings):
        for expert, slots, done, weights in passes(x, routing, experts, roundings[0]):
            yield Group((expert,), (len(slots),), slots, done, weights)
        return
    found = dispatch(routing.ids, experts.count)
    offsets = found.offsets.tolist()
    counts = {e: end - start for e, (start, end) in enumerate(pairwise(offsets)) if end > start}
    for members in _alike(counts, experts, x.device.type):
        most = counts[members[0]]
        mine = [torch.arange(offsets[e], offsets[e + 1]) for e in members]
        padded = torch.stack([torch.cat((m, m[:1].expand(most - len(m)))) for m in mine]).to(x.device)
        place = torch.cat([i * most + torch.arange(counts[e]) for i, e in enumerate(members)]).to(x.device)
        rows, inside = entering(x, found.order[padded], routing, experts, roundings[0])
        weights = _stacked([experts.weights(e) for e in members])
        slots = found.order[torch.cat(mine).to(x.device)]
        done = forward(rows, weights, experts.activation, inside)
        yield Group(tuple(members), tuple(counts[e] for e in members), slots, done, weights, place)


def _elementwise(rounding: Rounding) -> bool:
    """Is every rounding point inside an expert a plain element type?"""
    points = ("x", "weighted_x", "product", "gate_up", "activated", "middle", "row")
    return all(step in FLOATS for point in points for step in rounding.steps(point))


def _alike(counts: dict[int, int], experts: Experts, device: str) -> list[list[int]]:
    """The experts by falling number of rows, parted where padding would double a group's rows or its weights grow too many."""
    found: list[list[int]] = []
    room = 0
    for expert in sorted(counts, key=lambda e: (-counts[e], e)):
        if not room:
            room = max(1, WEIGHTS[device] // max(1, 3 * experts.weights(expert).gate.numel()))
        if found and len(found[-1]) < room and counts[found[-1][0]] <= max(FEW, 2 * counts[expert]):
            found[-1].append(expert)
        else:
            found.append([expert])
    return found


def _stacked(weights: Sequence[ExpertWeights]) -> ExpertWeights:
    def stack(name: str) -> Tensor | None:
        parts = [getattr(w, name) for w in weights]
        if parts[0] is None:
            return None
        whole = torch.stack(parts)
        return whole.unsqueeze(1) if name.endswith("_bias") else whole

    return ExpertWeights(*(stack(f.name) for f in fields(ExpertWeights)))  # type: ignore[arg-type]
