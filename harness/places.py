"""Hypotheses about where the error is (a tile, a tail) and about its statistics (precision), for what nothing else explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.evidence import Claim, Evidence, box

TILES = (16, 32, 64, 128, 256)  # tile sizes kernels use; a place is named after the smallest that holds the evidence
FILLED = 0.75  # share of a tile's rows and columns that must be hit before the tile is blamed
BY_CHANCE = 0.05  # probability that so many rows or columns all lie in a tail by chance, above which it is not blamed
STRIPES = 8  # parts of the columns that must all be worse than expected before the error is everywhere
MANY_ROWS = 8  # tokens below which a few wrong neurons reach every row: no statistics of rows to speak of
PRECISION = 0.125  # rel-L2 above which an error is no rounding: half a step of E2M1, the coarsest grid, is 1/8 of its value
UNLIKE = 0.25  # correlation of error and value above which it is no rounding to nearest
SHARED = 2.0  # energy of the errors' means along an axis, in units of that of independent errors
OFFSET = 6.0  # standard deviations of the mean error
HEAVY = 20.0  # kurtosis of z above which few elements make the error (a normal has 3, uniform roundings less)


def tile_claims(e: Evidence) -> Iterator[Claim | None]:
    """The hit elements are one tile, and hold zeros or a neighbouring tile."""
    found = tile_of(e.bad)
    if found is None:
        return
    top, bottom, left, right = found
    text = f"the tile of rows {top}..{bottom}, columns {left}..{right}"
    evidence: dict[str, Any] = {"rows": [top, bottom], "columns": [left, right]}
    high, wide = bottom - top + 1, right - left + 1
    for name, down, across in (("left", 0, -wide), ("right", 0, wide), ("upper", -high, 0), ("lower", high, 0)):
        rows, columns = (top + down, bottom + 1 + down), (left + across, right + 1 + across)
        if min(rows[0], columns[0]) >= 0 and rows[1] <= len(e.value) and columns[1] <= e.value.shape[1]:
            wrong = e.value.clone()
            wrong[top : bottom + 1, left : right + 1] = e.value[slice(*rows), slice(*columns)]
            yield e.claim("wrong_tile", f"{text} holds its {name} neighbour", wrong[e.rows], {"holds": name, **evidence})
    wrong = e.value.clone()
    wrong[top : bottom + 1, left : right + 1] = 0
    yield e.claim("wrong_tile", f"{text} is zero", wrong[e.rows], {"holds": "zeros", **evidence})


def tile_of(bad: Tensor) -> tuple[int, int, int, int] | None:
    """(first row, last row, first column, last column) of the smallest aligned tile that holds all of bad [rows, columns]
    and is filled by it; None if there is none smaller than the whole."""
    top, bottom, left, right = box(bad)
    rows, columns = _span(top, bottom, bad.shape[0]), _span(left, right, bad.shape[1])
    if columns is None or rows is None or (columns == (0, bad.shape[1] - 1) and rows == (0, bad.shape[0] - 1)):
        return None
    filled = all(
        int(bad.any(1 - axis).sum()) >= FILLED * (last - first + 1) for axis, (first, last) in enumerate((rows, columns))
    )
    return (*rows, *columns) if filled else None


def _span(first: int, last: int, size: int) -> tuple[int, int] | None:
    """The aligned tile that holds first..last, cut at `size`; the whole axis where no tile does and all of it is spanned."""
    for tile in TILES:
        if first // tile == last // tile:
            return first // tile * tile, min(size, first // tile * tile + tile) - 1
    return (0, size - 1) if first == 0 and last == size - 1 else None


def place(e: Evidence) -> Claim | None:
    """Where the error is, when it is one tile or the last tile of an axis."""
    if tail := tail_of(e.bad):
        axis, first, tile = tail
        size = e.bad.shape[axis]
        name = ("rows", "columns")[axis]
        text = f"{int(e.bad.sum())} wrong elements; all within the last tile of {tile} {name} ({first}..{size - 1})"
        return Claim("tail_tile", text, 1.0, 0.0, {"axis": name, "tile": tile, "first": first})
    found = tile_of(e.bad)
    if found is None or _by_chance(e.bad, found) > BY_CHANCE:
        return None
    text = f"{int(e.bad.sum())} wrong elements fill the tile of rows {found[0]}..{found[1]}, columns {found[2]}..{found[3]}"
    return Claim("wrong_tile", text, 1.0, 0.0, {"rows": list(found[:2]), "columns": list(found[2:])})


def _by_chance(bad: Tensor, tile: tuple[int, int, int, int]) -> float:
    """How likely so many hit rows and columns are to lie in one such tile of the output, wherever they are."""
    likely = 1.0
    for axis, (first, last) in enumerate((tile[:2], tile[2:])):
        share = (last - first + 1) / bad.shape[axis]
        likely *= share ** (int(bad.any(1 - axis).sum()) - 1)
    return likely


def tail_of(bad: Tensor) -> tuple[int, int, int] | None:
    """(axis, first index, tile) if all of bad lies in the last tile of an axis, fills it, and hardly does so by chance."""
    for axis in (0, 1):
        size, hit = bad.shape[axis], bad.any(1 - axis).nonzero().flatten()
        for tile in TILES:
            start = (size - 1) // tile * tile
            tail = size - start
            if 0 < start <= int(hit[0]) and len(hit) >= FILLED * tail and (tail / size) ** len(hit) <= BY_CHANCE:
                return axis, start, tile
    return None


def precision(e: Evidence) -> Claim | None:
    """Errors everywhere, like those of rounding but larger: in every row and every stripe of columns, unlike the value."""
    judged = ~e.expected.ambiguous
    z, error, value = e.z[judged], (e.actual - e.value)[judged], e.value[judged]
    if e.comparison.rel_l2 > PRECISION or not bool(z.isfinite().all()) or len(z) < MANY_ROWS:
        return None
    squared = z.square()
    large = 1.0 if not e.expected.exact else 0.0
    rows = float((squared.mean(1) > large).double().mean())
    stripes = torch.stack([part.mean() for part in squared.tensor_split(min(STRIPES, squared.shape[1]), dim=1)])
    mean = float(squared.mean())
    kurtosis = float(squared.square().mean() / squared.mean() ** 2)
    alike = abs(float((error * value).sum() / (error.norm() * value.norm())))
    if rows < 0.5 or bool((stripes <= large).any()) or kurtosis > HEAVY or alike > UNLIKE or _patterned(error):
        return None
    text = (
        f"errors everywhere, {mean**0.5:.3g} times as large as the declared rounding makes them, without structure: "
        "a rounding point more, or a narrower accumulator"
    )
    return Claim("precision", text, 0.0, 1.0, {"factor": mean**0.5, "rel_l2": e.comparison.rel_l2, "kurtosis": kurtosis})


def _patterned(error: Tensor) -> bool:
    """Whether rows share an error vector, or a row's or the whole error has a mean: independent errors average out."""
    energy = error.square().sum()
    means = [error.mean(axis, keepdim=True).expand_as(error).square().sum() / energy * error.shape[axis] for axis in (0, 1)]
    offset = float(error.mean().abs() / error.square().mean().sqrt())
    return max(float(m) for m in means) > SHARED or offset * error.numel() ** 0.5 > OFFSET


def unstable(e: Evidence) -> Claim | None:
    """The finding that two calls differ, when no fixed pattern explains the first."""
    finding = e.finding("repeat")
    if finding is None:
        return None
    return Claim("unstable", f"wrong in a way that changes from call to call: {finding.text}", 0.0, 1.0)
