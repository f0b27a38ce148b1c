"""A failed comparison -> what it looks like. Every kind is a hypothesis that is tested; "unexplained" when none survives.

A hypothesis predicts the output of a kernel with just that defect. It survives if the prediction explains EXPLAINED of the
error's norm in the rows that are hit. Of several survivors the best wins; of those that predict the same, the one that
claims least about the cause, and `evidence["also"]` names the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from harness.evidence import Claim, Evidence
from harness.mechanisms import Inside
from harness.oracle import Expected
from harness.places import place, precision, tile_claims, unstable
from harness.symptoms import never_written, non_finite, symptoms
from harness.verdict import Comparison, Diagnosis, Finding

TIED = 1.1  # residual energies closer than this are one and the same
FITTED = 4.0  # a claim with factors of its own to fit must leave so many times less than one without

# What predicts the same output is called by the first of these names: what is seen before how it came about.
PREDICTING = (
    "zeros",
    "wrong_tile",
    "row_permutation",
    "column_permutation",
    "clamped",
    "constant_factor",
    "stale",
    "gate_up_swap",
    "gate_up_interleave",
    "transposed",
    "missing_expert",
    "wrong_expert",
    "expert_permutation",
    "missing_slot",
    "duplicated_slot",
    "unweighted",
    "wrong_weights",
    "missing_bias",
    "wrong_activation",
    "next_expert_scales",
    "scale_roll",
    "wrong_scales",
    "weight_order",
    "dropped_k_tail",
)
KINDS = ("never_written", "nan_from_padding", "non_finite", *PREDICTING, "tail_tile", "unstable", "precision", "unexplained")


def diagnose(expected: Expected, got: Tensor, comparison: Comparison, findings: Sequence[Finding] = ()) -> Diagnosis:
    """What the failure looks like. got [tokens, hidden] in the out dtype, CPU; `findings` of the checks of the same call.

    "never_written" says that elements hold the poison that memory held before, "poison" that the output changes with it;
    "repeat" makes an unexplained error unstable.
    """
    assert expected.layer is not None  # of a case, which everything judged has
    e = Evidence(expected, got, comparison, findings)
    if claim := never_written(e) or non_finite(e):
        return _told(e, claim, ())
    inside = Inside(e, expected.layer)
    claims = [c for c in (*symptoms(e), *tile_claims(e), *inside.claims()) if c is not None]
    if not claims:
        claims = [c for c in inside.last_claims() if c is not None]
    if claims:
        best, also = rank(claims)
        return _told(e, best, also)
    last = unstable(e) or inside.faint() or place(e) or (None if inside.suspects() else precision(e))
    if last is not None:
        return _told(e, last, ())
    rows = int(e.hit.sum())
    text = f"{comparison.beyond} of {comparison.total} elements in {rows} rows; no known pattern fits"
    return Diagnosis("unexplained", text, 0.0, _base(e))


def rank(claims: Sequence[Claim]) -> tuple[Claim, tuple[str, ...]]:
    """The claim to make, and the other kinds that predict the same."""
    best = min(claims, key=lambda c: c.left * (FITTED if c.late else 1.0))
    tied = sorted((c for c in claims if c.left <= TIED * best.left), key=lambda c: (c.late, PREDICTING.index(c.kind)))
    if best.late and not tied[0].late:
        tied.insert(0, best)
    return tied[0], tuple(dict.fromkeys(c.kind for c in tied[1:] if c.kind != tied[0].kind))


def _told(e: Evidence, claim: Claim, also: tuple[str, ...]) -> Diagnosis:
    others = {"also": list(also)} if also else {}
    return Diagnosis(claim.kind, claim.text, round(claim.explained, 4), {**_base(e), **claim.evidence, **others})


def _base(e: Evidence) -> dict[str, object]:
    rows = e.hit.nonzero().flatten().tolist()
    return {"rows_hit": len(rows), "first_rows": rows[:8]}
