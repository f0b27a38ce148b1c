"""The arithmetic of the exact fill: what fixes the scales of a quantised row, and which integers fit beside it.

A dynamic quantiser derives a group's scale from its largest magnitude. An anchor makes that the largest code times a power of
two, so the scale is a power of two and every integer that is a code at that scale passes unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from harness.fills import on_grid, peak
from harness.hashing import Stream
from reference.format import Format
from reference.formats import get
from reference.grid import ElementType, IntegerType

GATE = (1, 2)  # what a gate that fires may be, in units of SATURATED: one entry of x
UP_TERMS = (3, 2, 1)  # entries of x in an up sum, each 1 or 2
LIFTS = (1, 0)  # powers of two by which groups of the middle may differ


@dataclass(frozen=True)
class Anchors:
    """What fixes the scales of one quantised row: indices [groups] of the anchors and of spare places beside them, and the
    power of two [groups] each anchor is raised by."""

    at: Tensor
    spare: Tensor
    lift: Tensor


def anchors(fmt: Format, size: int, stream: Stream) -> Anchors:
    """Two places a scale group, never among the last two of the row; none of a plain format."""
    if fmt.scaling is None:
        empty = torch.zeros(0, dtype=torch.int64, device=stream.device)
        return Anchors(empty, empty, empty)
    group = fmt.scaling.group[1] or size
    words = stream.fields(size // group, 2, 16)
    first = words[:, 0] % (group - 2)
    second = (first + 1 + words[:, 1] % max(1, group - 3)) % (group - 2)
    start = torch.arange(0, size, group, device=stream.device)
    return Anchors(start + first, start + second, words[:, 0] >> 8 & 1 if size > group else torch.ones_like(first))


@dataclass(frozen=True)
class Products:
    """Which gate * up the middle's format holds beside its anchor, all in units of SATURATED.

    up_terms: how many entries an up sum may have; peak: the anchor, `peak_code` times a power of two; parts: two integers of
    that sum, codes of the weights' format at one scale; most_lift: by which power of two an anchor may be raised.
    """

    up_terms: int
    peak: int
    peak_code: float
    parts: tuple[int, int]
    most_lift: int

    @classmethod
    @cache
    def of(cls, weights: str, middle: str, gated: bool, scaled: bool) -> Products:
        """The most that fits; ValueError where nothing does. `scaled`: the routing weights take bits, so sums stay short."""
        fmt = get(middle)
        for terms in UP_TERMS[2:] if scaled else UP_TERMS:
            values = {g * u for g in GATE for u in (range(1, 2 * terms + 1) if gated else (1,))}
            if fmt.scaling is None:
                return cls(terms, 0, 0.0, (0, 0), 0)
            code = peak(fmt)
            anchor = _odd(code)
            while anchor < max(values):
                anchor *= 2
            lifts = [lift for lift in LIFTS if on_grid(fmt.element, [v * code / anchor / 2**lift for v in values])]
            if lifts:
                return cls(terms, anchor, code, _parts(get(weights), anchor, middle), lifts[0])
        raise ValueError(f"{middle} does not hold the products 1, 2 and 4 beside its largest code")


def _odd(value: float) -> int:
    """The odd factor of a float that is an integer."""
    whole = int(value)
    return whole // (whole & -whole)


def _parts(weights: Format, total: int, middle: str) -> tuple[int, int]:
    """Two weights of one scale that add up to `total`, the second as small as can be."""
    element = weights.element
    assert isinstance(element, ElementType | IntegerType)
    for second in range(total // 2 + 1):
        first = total - second
        shrink = 2.0 ** max(0, math.ceil(math.log2(first / element.max)))
        if on_grid(element, [first / shrink, second / shrink]):
            return first, second
    raise ValueError(f"no two codes of {weights.name} add up to {total}, the anchor of {middle}")
