"""Minimum detectable effect: the search finds the edge, and the edge is where the wrong layers of the audit turn red."""

from __future__ import annotations

import math

import pytest

from harness.case import Case
from harness.compare import compare
from harness.faults.audit import subject_of
from harness.faults.mde import LARGEST, SMALLEST, Effect, Threshold, mde, smallest, table
from harness.faults.wrong_layers import scaled_expert
from reference.rounding import IDEAL, Rounding

BF16 = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
ID = "moe.{recipe}.t33.h160.i96.e6.k{k}.renormalize.swiglu.standard.{fill}.s{seed}"


def cases(recipe: str, count: int = 3, fill: str = "real") -> list[Case]:
    return [Case.parse(ID.format(recipe=recipe, k=1 + seed % 2, fill=fill, seed=seed)) for seed in range(count)]


@pytest.mark.parametrize("edge", [1e-6, 0.015, 0.5, 30.0])
def test_the_search_finds_the_edge_from_above(edge: float) -> None:
    assert edge <= smallest(lambda eps: eps >= edge) < edge * 1.012


def test_what_is_never_or_always_refused() -> None:
    assert smallest(lambda eps: False) == math.inf
    assert smallest(lambda eps: True) < SMALLEST * 1.012
    assert smallest(lambda eps: eps == LARGEST) == LARGEST


def test_typical_is_the_median_and_most_the_95_percent_quantile() -> None:
    assert Threshold.of([3.0, 1.0, 2.0]) == Threshold(2.0, 3.0)
    assert Threshold.of([float(n) for n in range(1, 101)]) == Threshold(50.0, 95.0)
    assert Threshold.of([1.0] * 19 + [math.inf]) == Threshold(1.0, 1.0)
    assert Threshold.of([1.0] * 18 + [math.inf] * 2).most == math.inf


def test_the_edge_is_where_a_scaled_expert_turns_red() -> None:
    """The same defect made another way: the down projection read with a larger scale, all roundings after it."""
    for case in cases("bf16"):
        edge = mde([case], BF16).expert.typical
        subject = subject_of(case, BF16)
        assert compare(subject.expected, scaled_expert(1 + edge / 2)(subject.layer)).agrees
        assert not compare(subject.expected, scaled_expert(1 + edge * 2)(subject.layer)).agrees


def test_a_finer_kernel_leaves_less_unseen() -> None:
    """bf16 has 8 bits, fp16 11, fp32 24: the noise an error must stand out from falls accordingly."""
    half = mde(cases("fp16"), Rounding(gate_up="fp16", middle="fp16", row="fp16", out="fp16"))
    coarse, fine = mde(cases("bf16"), BF16), mde(cases("fp32"), IDEAL)
    assert 0.002 < coarse.expert.most < 0.03
    assert coarse.expert.typical / 16 < half.expert.typical < coarse.expert.typical / 4
    assert fine.expert.most < 1e-4
    assert coarse.output.most <= coarse.expert.most  # the same error in more places


def test_only_real_cases_of_one_recipe() -> None:
    for wrong in ([], cases("bf16", fill="exact"), [*cases("bf16", 1), *cases("fp16", 1)]):
        with pytest.raises(ValueError, match="real cases of one recipe"):
            mde(wrong, BF16)


def test_the_table_groups_by_recipe_and_rounding() -> None:
    plain = Rounding(out="bf16")
    planned = [(c, BF16) for c in cases("bf16", 2)] + [(c, plain) for c in cases("bf16", 1)]
    planned += [(c, BF16) for c in cases("bf16", 2, fill="exact")] + [(c, IDEAL) for c in cases("fp32", 1)]
    found = table(planned)
    assert [(e.recipe, e.rounding, e.cases) for e in found] == [("bf16", BF16, 2), ("bf16", plain, 1), ("fp32", IDEAL, 1)]


def test_the_sentence() -> None:
    effect = Effect("bf16", BF16, 40, Threshold(0.015, 0.021), Threshold(0.001, math.inf))
    assert effect.sentence == (
        "bf16: this green means a scale error of one expert above 1.5 % would have been red in a typical case"
        " (in 95 % of 40 cases: above 2.1 %)"
    )
    few = Effect("bf16", BF16, 3, Threshold(0.015, math.inf), Threshold(0.001, 0.002))
    assert few.sentence.endswith("(in all 3 cases: above no size at all)")
