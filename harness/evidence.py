"""What a hypothesis sees of a failed comparison, and the yardstick: the share of the error that a prediction explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.compare import z_limit
from harness.oracle import Expected
from harness.verdict import Comparison, Finding
from harness.whatif import spread

EXPLAINED = 0.95  # share of the error's norm that a prediction must explain
OWN = 0.25  # share of the output's own norm it may leave: where next to nothing was written, any small prediction is close
NOISE = 1.25  # a wrong kernel's own rounding may be this much more energy than the right kernel's
SIGNAL = 4.0  # energy of an error, in units of the rounding noise, below which nothing but its statistics is read
MAX_ROWS = 256  # hit rows that are looked at
SETTLED = 1e-4  # residual energy, as share of the error's, below which two predictions are equally good


@dataclass(frozen=True)
class Claim:
    """A hypothesis that survived: what it is called, in words, and how much it leaves unexplained (energy, as share of the
    error's, floored where it is all noise). late: true as well, but says less than others that predict the same."""

    kind: str
    text: str
    explained: float
    left: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)
    late: bool = False


class Evidence:
    """A failed comparison. actual [tokens, hidden] float64; bad: the elements to explain, those beyond the limit or, when
    only the mean of z**2 is off, all that differ; rows: the hit rows, at most MAX_ROWS of them, evenly taken."""

    def __init__(self, expected: Expected, got: Tensor, comparison: Comparison, findings: Sequence[Finding]) -> None:
        self.expected, self.comparison, self.findings = expected, comparison, findings
        self.actual, self.dtype = got.double(), got.dtype
        self.value = expected.value
        z = torch.where(self.actual.isfinite(), (self.actual - self.value).abs() / expected.sigma, torch.inf)
        self.z = torch.where(self.actual == self.value, 0.0, z)
        judged = ~expected.ambiguous[:, None]
        limit = z_limit(self.z.numel()) if comparison.lane == "ratio" else comparison.limit
        bad = (self.z > limit) & judged
        self.bad = bad if bad.any() else (self.z > 0) & judged

    @cached_property
    def hit(self) -> Tensor:
        """[tokens] bool: the rows with a bad element."""
        return self.bad.any(-1)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [n]: hit rows."""
        return spread(self.hit.nonzero().flatten(), MAX_ROWS)

    def finding(self, *checks: str) -> Finding | None:
        """The first finding of one of these checks."""
        return next((f for f in self.findings if f.check in checks), None)

    def leaves(self, prediction: Tensor, rows: Tensor) -> tuple[float, float] | None:
        """(explained share of the norm, residual energy as share of the error's) of prediction [n, hidden] for rows [n];
        None if it is not even close, or the error too faint to tell."""
        prediction = prediction.to(self.dtype).double()
        finite = self.actual[rows].isfinite()
        error = self._energy(self.value[rows], rows, finite)
        noise = 0.0 if self.expected.exact else float(self.expected.sigma[rows][finite].square().sum())
        if error < SIGNAL * noise or error == 0:
            return None
        left = self._energy(prediction, rows, finite)
        if not math.isfinite(left):
            return None
        excess = max(0.0, left - NOISE * noise)
        if excess > OWN**2 * float(self.actual[rows][finite].square().sum()):
            return None
        explained = 1 - (excess / (error - noise)) ** 0.5
        return (explained, max(left / error, NOISE * noise / error, SETTLED)) if explained >= EXPLAINED else None

    def _energy(self, prediction: Tensor, rows: Tensor, finite: Tensor) -> float:
        return float((self.actual[rows] - prediction)[finite].square().sum())

    def claim(
        self, kind: str, text: str, prediction: Tensor, evidence: dict[str, Any], rows: Tensor | None = None
    ) -> Claim | None:
        """A claim if prediction [n, hidden] explains the output in `rows` (the hit rows without), else None."""
        rows = self.rows if rows is None else rows
        found = self.leaves(prediction, rows)
        return None if found is None else Claim(kind, text, found[0], found[1], evidence)

    @cached_property
    def common_experts(self) -> tuple[int, ...]:
        """Experts whose tokens contain every hit row and little else (a hit may stay below the limit)."""
        ids, found = self.expected.routing.ids, []
        for expert in ids[self.hit].unique().tolist():
            mine = (ids == expert).any(-1)
            if bool(mine[self.hit].all()) and int(mine.sum()) <= 2 * int(self.hit.sum()):
                found.append(int(expert))
        return tuple(found)


def where(mask: Tensor) -> str:
    """The bounding box of mask [rows, columns] in words."""
    top, bottom, left, right = box(mask)
    return f"rows {top}..{bottom}, columns {left}..{right}"


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of the True elements."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
