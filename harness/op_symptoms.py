"""A failed comparison of an op beside the whole layer -> what it looks like. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.case import Case
from harness.op_answers import code_bytes
from harness.oracle import Expected
from harness.verdict import Comparison, Diagnosis
from reference.formats import get

EXPLAINED = 0.95  # share of the elements in which an impostor differs from the truth that must be its own (harness/evidence.py)
LOOKS = {
    "zeros": "the output is zero",
    "next_row": "every row holds the next row's result",
    "rolled_scales": "the scales are those of the neighbouring groups",
    "gate_up_swap": "gate and up are swapped",
    "gate_up_interleave": "gate and up are read interleaved",
    "next_expert": "every id is the next expert's",
}


def describe(case: Case, expected: Expected, got: Tensor, comparison: Comparison) -> Diagnosis:
    """The impostor whose output it is, or which part of the output is wrong."""
    rows = comparison.rows_hit
    actual = expected.read(got).double()
    for name, wrong in expected.impostors.items():
        theirs = expected.read(wrong.to(got.dtype)).double()
        telling = ~torch.eq(theirs, expected.value)
        share = float(torch.isclose(actual, theirs, rtol=0, atol=0, equal_nan=True)[telling].double().mean())
        if share >= EXPLAINED:
            return Diagnosis(name, LOOKS[name], round(share, 4), {"rows_hit": rows})
    permuted = _row_permutation(expected, got)
    if permuted:
        return Diagnosis("row_permutation", permuted, 1.0, {"rows_hit": rows})
    text = f"{_parts(case, expected, got)} in {rows} of {len(got)} rows"
    return Diagnosis("unexplained", text, 0.0, {"rows_hit": rows})


def _parts(case: Case, expected: Expected, got: Tensor) -> str:
    actual = expected.read(got).double()
    differ = (actual != expected.value) | ~actual.isfinite()
    if case.op == "quantize":
        wide = code_bytes(get(case.recipe.weights), case.shape.hidden)
        return f"{int(differ[:, :wide].sum())} bytes of codes and {int(differ[:, wide:].sum())} of scales differ"
    if case.op == "route":
        wrong = int(actual.isnan().sum())
        return f"{wrong} experts are wrong ones or weights NaN, {int(differ.sum()) - wrong} weights differ"
    return f"{int((~actual.isfinite()).sum())} elements are not finite, {int(differ.sum())} of {differ.numel()} differ"


def _row_permutation(expected: Expected, got: Tensor) -> str:
    """Rows that are right, each in another's place; "" if not."""
    actual = expected.read(got).double()
    if not expected.exact or len(actual) < 2 or not actual.isfinite().all():
        return ""
    mine, due = (sorted(map(tuple, rows.tolist())) for rows in (actual, expected.value))
    return "every row is right but in another row's place" if mine == due else ""
