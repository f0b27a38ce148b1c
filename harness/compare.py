"""Expected + output -> Comparison. Pure; a tolerance here is a sentence with a derivation, never a percentage.

exact: `torch.equal`, element by element, -0 equal to +0.
real:  z = |got - expected| / sigma. An error built from many independent roundings is close to normal, so the largest of N
       stays below the two-sided normal quantile at FALSE_ALARM / N; and the mean of z**2 stays near 1.
ratio: where a kernel declares no roundings, no tile errs much more than an emulation's: see `harness.ratio`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from harness.oracle import Expected
from harness.ratio import FALSE_ALARM, TIMES, ratios
from harness.verdict import Comparison, Sample

SAMPLES = 5
MEAN_Z2_SLACK = 0.05  # a declared recipe sits at 1.00 +- 0.05 (lanes.md measured 0.965 and 0.999)


def compare(expected: Expected, got: Tensor) -> Comparison:
    """Compare got [tokens, hidden] (any float dtype, CPU; of another op as harness/op_answers.py has it) with `expected`;
    ambiguous rows are left out."""
    judged = ~expected.ambiguous
    actual = expected.read(got).double()
    columns = actual.shape[-1]
    error = (actual - expected.value).abs()
    finite = actual.isfinite()
    z = torch.where(error == 0, 0.0, error / expected.sigma)
    z = torch.where(finite, z, torch.inf)
    limit = 0.0 if expected.exact else z_limit(int(judged.sum()) * columns)
    bad, worst = (z > limit) & judged[:, None], float(z[judged].max()) if z[judged].numel() else 0.0
    by_ratio = expected.baseline is not None and not expected.exact and bool(judged.any())
    if by_ratio:
        bad, worst, limit = *_beyond_ratio(expected, actual, bad), TIMES
    usable = finite & judged[:, None]
    independent = float(expected.independent.sum())
    norm = expected.value[usable].square().sum().sqrt()
    mean_z2 = float(z[usable].square().mean()) if usable.any() else 0.0
    return Comparison(
        lane="exact" if expected.exact else "ratio" if by_ratio else "real",
        total=int(judged.sum()) * columns,
        beyond=int(bad.sum()),
        worst=worst,
        limit=limit,
        mean_z2=mean_z2,
        mean_z2_limit=math.inf if by_ratio else mean_z2_limit(independent),
        rel_l2=float(error[usable].square().sum().sqrt() / norm) if norm > 0 else 0.0,
        nonfinite=int((~finite & judged[:, None]).sum()),
        rows_hit=int(bad.any(-1).sum()),
        experts_hit=_experts_hit(expected, bad),
        samples=_samples(expected, actual, z, torch.where(finite, error, torch.inf) * bad),
        independent=independent,
    )


def _beyond_ratio(expected: Expected, actual: Tensor, outliers: Tensor) -> tuple[Tensor, float]:
    """The elements of failing tiles, of those the `outliers` if there are any, and the worst tile's ratio."""
    judged, bad, baseline = ~expected.ambiguous, torch.zeros_like(outliers), expected.baseline
    assert baseline is not None
    baseline = replace(baseline, output=baseline.output[judged], freedom=baseline.freedom[judged])
    result = ratios(baseline, expected.value[judged], expected.sigma[judged], actual[judged], expected.routing.ids[judged])
    bad[judged] = result.failing(actual.shape[-1])
    return bad & outliers if (bad & outliers).any() else bad, result.worst


def z_limit(elements: int) -> float:
    """The two-sided normal quantile at FALSE_ALARM / elements."""
    return -NormalDist().inv_cdf(FALSE_ALARM / (2 * max(1, elements)))


def mean_z2_limit(independent: float, false_alarm: float = FALSE_ALARM) -> float:
    """1 + slack + what chance adds to the mean of n squared normal errors with probability `false_alarm` at most:
    2 sqrt(x / n) + 2 x / n, x = log(1 / false_alarm) (Laurent and Massart 2000, lemma 1)."""
    chance = math.sqrt(-math.log(false_alarm) / max(independent, 1e-9))
    return 1 + MEAN_Z2_SLACK + 2 * chance + 2 * chance**2


def _experts_hit(expected: Expected, bad: Tensor) -> tuple[int, ...]:
    """Experts all of whose tokens are hit, when not everything is: what a lost or broken expert looks like."""
    rows = bad.any(-1)
    if not rows.any() or rows.all():
        return ()
    touched = expected.routing.ids[rows].unique()
    untouched = expected.routing.ids[~rows].unique()
    return tuple(int(e) for e in touched if e not in untouched)


def _samples(expected: Expected, actual: Tensor, z: Tensor, weight: Tensor) -> tuple[Sample, ...]:
    """The bad elements of largest error; `weight` is the error where bad, 0 or NaN elsewhere."""
    flat = weight.nan_to_num(0.0, posinf=torch.inf).flatten()
    worst = flat.topk(min(SAMPLES, int((flat > 0).sum()))).indices
    columns = actual.shape[-1]
    places = [(int(i) // columns, int(i) % columns) for i in worst]
    return tuple(Sample(t, c, float(expected.value[t, c]), float(actual[t, c]), float(z[t, c])) for t, c in places)
