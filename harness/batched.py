"""Experts passed several at once: a small layer's time is that of its operations' launches, not of their arithmetic.

Each expert's rows meet its weights alone, as in `reference.moe.passes`; they only lie side by side, padded to equal counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from reference.dispatch import dispatch
from reference.experts import ExpertPass, ExpertWeights, forward, mapped
from reference.grid import FLOATS
from reference.moe import Experts, entering
from reference.rounding import Rounding
from reference.routing import Routing

WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # in float64 at once: 8 MiB, about a core's cache; 256 MiB
FEW = 16  # rows: reading an expert's weights takes longer than multiplying so many by them


Stacked = Callable[[Sequence[int]], ExpertWeights]  # experts -> their weights, along a leading axis


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

    def spread(self, x: Tensor) -> Tensor:
        """The inverse of `rows`: x [n, ...] as `done` lies, 0 in the rows that pad."""
        if self.place is None:
            return x
        shape = self.done.row.shape[:2]
        return x.new_zeros(shape.numel(), *x.shape[1:]).index_copy_(0, self.place, x).view(*shape, *x.shape[1:])

    def alone(self, wanted: Collection[int]) -> Iterator[Group]:
        """Those of the experts that are `wanted`, one by one."""
        if self.place is None:
            yield from [self] if self.experts[0] in wanted else []
            return
        for i, (expert, count, slots) in enumerate(zip(self.experts, self.counts, self.slots.split(self.counts), strict=True)):
            if expert in wanted:
                done = mapped(lambda t, i=i, count=count: t[0][i, :count], [self.done])  # type: ignore[misc]
                weights = mapped(lambda t, i=i: t[0][i], [self.weights])  # type: ignore[misc]
                yield Group((expert,), (count,), slots, done, weights)

    def only(self, kept: Tensor) -> Group | None:
        """The same experts with those of the slots alone that `kept` [n] says; None if these are none."""
        if bool(kept.all()):
            return self
        if not bool(kept.any()):
            return None
        if self.place is None:
            done = mapped(lambda t: t[0][kept], [self.done])
            return Group(self.experts, (len(done.row),), self.slots[kept], done, self.weights)
        experts, most = self.done.row.shape[:2]
        owner = self.place[kept] // most
        counts = torch.bincount(owner, minlength=experts)
        first, fewer = counts.cumsum(0) - counts, int(counts.max())
        place = owner * fewer + torch.arange(len(owner), device=owner.device) - first[owner]
        source = (torch.arange(experts, device=owner.device) * most).repeat_interleave(fewer)
        source[place] = self.place[kept]
        done = mapped(lambda t: t[0].flatten(0, 1)[source].unflatten(0, (experts, fewer)), [self.done])
        return Group(self.experts, tuple(counts.tolist()), self.slots[kept], done, self.weights, place)


def groups(x: Tensor, routing: Routing, experts: Experts, stacked: Stacked, roundings: Sequence[Rounding]) -> Iterator[Group]:
    """All experts that received a token, passed under the first of `roundings`; the others are what a caller will ask of the
    passes. One at a time where a point is a format with scales: those are fitted to matrices."""
    found = dispatch(routing.ids, experts.count)
    offsets = found.offsets.tolist()
    counts = {e: end - start for e, (start, end) in enumerate(pairwise(offsets)) if end > start}
    together = all(_elementwise(rounding) for rounding in roundings)
    for members in _alike(counts, experts, x.device.type) if together else [[e] for e in counts]:
        if len(members) == 1:
            (expert,) = members
            yield _one(expert, found.slots(expert), x, (routing, experts, roundings[0]))
            continue
        first, own = (torch.tensor([table[e] for e in members])[:, None] for table in (offsets, counts))
        row = torch.arange(counts[members[0]])
        real = row < own
        padded, place = (first + row * real).to(x.device), real.flatten().nonzero().flatten().to(x.device)
        rows, inside = entering(x, found.order[padded], routing, experts, roundings[0])
        weights = _for_rows(stacked(members))
        done = forward(rows, weights, experts.activation, inside)
        slots = found.order[padded.flatten()[place]]
        yield Group(tuple(members), tuple(counts[e] for e in members), slots, done, weights, place)


def _one(expert: int, slots: Tensor, x: Tensor, layer: tuple[Routing, Experts, Rounding]) -> Group:
    routing, experts, rounding = layer
    rows, inside = entering(x, slots, routing, experts, rounding)
    weights = experts.weights(expert)
    return Group((expert,), (len(slots),), slots, forward(rows, weights, experts.activation, inside), weights)


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


def _for_rows(weights: ExpertWeights) -> ExpertWeights:
    """Biases [experts, size] as they join rows [experts, rows, size]."""
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return ExpertWeights(weights.gate, weights.up, weights.down, *(None if b is None else b.unsqueeze(1) for b in biases))
