"""A failed comparison -> what it looks like. Every kind is a hypothesis that is tested; "unexplained" when none survives.

A hypothesis is accepted when the output it predicts agrees with what the kernel wrote far better than the truth does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.compare import z_limit
from harness.oracle import Expected
from harness.verdict import Comparison, Diagnosis

EXPLAINED = 0.05  # a prediction explains an output if at most this share of the error's norm is left
TILES = (16, 32, 64, 128, 256)  # tile sizes kernels use; a tail is named after the smallest that holds the evidence
FACTOR_SPREAD = 0.02  # a constant factor holds if the middle half of the ratios lies within 2 % of the median


def diagnose(expected: Expected, got: Tensor, comparison: Comparison) -> Diagnosis:
    """The first kind whose prediction holds, most specific evidence first. got [tokens, hidden], CPU."""
    actual = got.double()
    bad = _bad(expected, actual, comparison)
    for kind in KINDS:
        text = kind(expected, actual, bad)
        if text is not None:
            return Diagnosis(kind.__name__.strip("_"), text)
    rows = int(bad.any(-1).sum())
    return Diagnosis("unexplained", f"{comparison.beyond} of {comparison.total} elements in {rows} rows; no known pattern fits")


def _bad(expected: Expected, actual: Tensor, comparison: Comparison) -> Tensor:
    """The elements to explain: those beyond the limit; all of them when only the mean of z**2 is off."""
    z = torch.where(actual.isfinite(), (actual - expected.value).abs() / expected.sigma, torch.inf)
    limit = z_limit(z.numel()) if comparison.lane == "ratio" else comparison.limit
    bad = (z > limit) & ~expected.ambiguous[:, None]
    return bad if bad.any() else (z > 0) & ~expected.ambiguous[:, None]


def _explains(prediction: Tensor, expected: Expected, actual: Tensor, bad: Tensor) -> bool:
    """True if `prediction` leaves at most EXPLAINED of the error's norm in the rows that are hit."""
    rows = bad.any(-1)
    left = (actual - prediction)[rows].norm()
    return bool(left <= EXPLAINED * (actual - expected.value)[rows].norm())


def _non_finite(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    wrong = ~actual.isfinite()
    if not wrong.any():
        return None
    nan = int(actual.isnan().sum())
    return f"{nan} NaN and {int(wrong.sum()) - nan} inf, {_extent(wrong)}"


def _zeros(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    if not (actual[bad] == 0).all():
        return None
    what = "the whole output is zero: never written?" if not actual.any() else f"zeros, {_extent(bad)}"
    return what + _tail(bad)


def _gate_up_swap(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    swapped = expected.impostors.get("gate_up_swap")
    if swapped is None or not _explains(swapped, expected, actual, bad):
        return None
    return "the output is that of gate and up exchanged: half order of w13"


def _stale(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    if not _explains(expected.impostors["stale"], expected, actual, bad):
        return None
    return "the output is that of the previous call's activations"


def _row_permutation(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    """Each hit row equals another token's row."""
    rows = bad.any(-1).nonzero().flatten()
    similar = _cosine(actual[rows], expected.value)
    source = similar.argmax(-1)
    if bool((source == rows).any()) or len(source.unique()) < len(source):
        return None
    if not _explains(expected.value.index_copy(0, rows, expected.value[source]), expected, actual, bad):
        return None
    moves = ", ".join(f"{int(r)} holds {int(s)}" for r, s in list(zip(rows, source, strict=True))[:4])
    shifts = (source - rows).unique()
    by = f", all shifted by {int(shifts[0])}" if len(shifts) == 1 else ""
    return f"{len(rows)} rows are other tokens' rows ({moves}{', ...' if len(rows) > 4 else ''}{by})"


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def _missing_expert(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    """The hit rows are exactly one expert's tokens, and its contribution is what is missing."""
    rows = bad.any(-1)
    for expert in _common_experts(expected.routing.ids, rows):
        if _explains(expected.value - expected.contribution(expert), expected, actual, bad):
            return f"the contribution of expert {expert} is missing in all its {int(rows.sum())} tokens"
    return None


def _common_experts(ids: Tensor, rows: Tensor) -> list[int]:
    """Experts whose set of tokens contains every hit row and little else (a hit may stay below the limit)."""
    found = []
    for expert in ids[rows].unique().tolist():
        mine = (ids == expert).any(-1)
        if bool(mine[rows].all()) and int(mine.sum()) <= 2 * int(rows.sum()):
            found.append(int(expert))
    return found


def _constant_factor(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    rows = bad.any(-1)
    value, seen = expected.value[rows], actual[rows]
    large = value.abs() > value.square().mean().sqrt()
    if int(large.sum()) < 8:
        return None
    ratio = seen[large] / value[large]
    low, median, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratio.dtype)).tolist()
    if abs(median - 1) < FACTOR_SPREAD or high - low > FACTOR_SPREAD * abs(median):
        return None
    if not _explains(expected.value * median, expected, actual, bad):
        return None
    power = torch.tensor(abs(median)).log2()
    exact = f" (2**{int(power.round())})" if abs(power - power.round()) < 0.01 else ""
    return f"{int(rows.sum())} rows are {median:.4g} times the expected{exact}: a scale twice, missing, or another expert's?"


def _tail_tile(expected: Expected, actual: Tensor, bad: Tensor) -> str | None:
    where = _tail(bad)
    return f"{int(bad.sum())} wrong elements{where}" if where else None


def _tail(bad: Tensor) -> str:
    """ "" unless all bad elements lie in the last tile of the rows or of the columns, and it is not everything."""
    for axis, name in ((0, "rows"), (1, "columns")):
        size, hit = bad.shape[axis], bad.any(1 - axis).nonzero().flatten()
        first = int(hit[0])
        for tile in TILES:
            start = (size - 1) // tile * tile
            if 0 < start <= first:
                return f"; all within the last tile of {tile} {name} ({start}..{size - 1})"
    return ""


def _extent(mask: Tensor) -> str:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return f"rows {int(rows[0])}..{int(rows[-1])}, columns {int(columns[0])}..{int(columns[-1])}"


KINDS: tuple[Callable[[Expected, Tensor, Tensor], str | None], ...] = (
    _non_finite,
    _zeros,
    _gate_up_swap,
    _stale,
    _row_permutation,
    _missing_expert,
    _constant_factor,
    _tail_tile,
)
