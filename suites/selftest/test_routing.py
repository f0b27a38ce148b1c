"""Routing rules: worked examples, ties, margins, group masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.routing import RULES, Routing, Rule, select, select_by_key, sort_keys

# of test_routing_shared.py: rules that also send every token to a fused shared expert
each_rule = pytest.mark.parametrize("rule", [r for r in RULES.values() if not r.shared], ids=lambda r: r.name)
PROBABILITIES = {"default", "deepseek_v2", "grouped_softmax", "grouped_softmax_bias"}
UNNORMALIZED = {"topk", "topk_sigmoid", "llama4", "sigmoid", "grouped_sigmoid", "grouped_sigmoid_bias"}
V3 = replace(RULES["deepseek_v3"], groups=(4, 2), scale=2.5)
V3_LOGITS = torch.tensor([[0, 1, 2, -1, 0.5, 0.5, 3, -3]])
V3_BIAS = torch.tensor([0, 0, -0.5, 0, 0.3, 0.3, -0.6, 0])


def route(rule: Rule, tokens: int = 50, experts: int = 32, top_k: int = 4) -> Routing:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(tokens, experts, generator=generator)
    return rule(logits, torch.randn(experts, generator=generator) / 8 if rule.biased else None, top_k)


def test_deepseek_v3_routes_the_worked_example() -> None:
    """Expert 6 has the largest unbiased score of all and must lose; 4 and 5 tie and come in index order."""
    routing = V3(V3_LOGITS, V3_BIAS, 2)
    assert routing.ids.tolist() == [[4, 5]]
    assert torch.allclose(routing.weights, torch.full((1, 2), 1.25, dtype=torch.float64), rtol=1e-12)


def test_deepseek_v3_margin_is_the_smaller_of_group_and_expert_gap() -> None:
    """Group sums 1.8449, 1.2311, 0.6497: gap 0.5814; experts: 0.9225 against 0.7311: gap 0.1914."""
    assert V3(V3_LOGITS, V3_BIAS, 2).margin.item() == pytest.approx(0.19140, abs=1e-4)
    near = replace(V3, groups=(4, 1))(V3_LOGITS, V3_BIAS, 2)
    assert near.margin.item() == pytest.approx(0.57, abs=0.05)


def test_groups_off_the_list_are_masked_with_minus_infinity() -> None:
    """Biased scores all below zero: a mask of 0 would pick [2, 3] from the group that lost."""
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).logit()
    bias = torch.tensor([-0.6, -0.7, -0.8, -0.9])
    assert replace(V3, groups=(2, 1))(scores, bias, 2).ids.tolist() == [[0, 1]]


def test_a_group_scores_the_sum_of_its_best_two() -> None:
    """The group with the single best expert loses; scoring by the maximum would keep it."""
    logits = torch.tensor([[0.95, 0.01, 0.02, 0.6, 0.61, 0.03]]).logit()
    assert replace(V3, groups=(2, 1))(logits, torch.zeros(6), 2).ids.tolist() == [[4, 3]]


def test_deepseek_v3_weights_ignore_the_bias() -> None:
    bias = torch.tensor([0.0, 5.0, 0.0, 4.0])
    routing = replace(V3, groups=(1, 1), scale=1.0)(torch.tensor([[0.2, 0.1, 0.8, 0.4]]).logit(), bias, 2)
    assert routing.ids.tolist() == [[1, 3]]
    assert torch.allclose(routing.weights, torch.tensor([[0.2, 0.8]], dtype=torch.float64), atol=1e-6)


def test_renormalize_and_default_route_the_worked_example() -> None:
    logits = torch.tensor([[1, 2, 0.5, 2]])
    renormalized, default = RULES["renormalize"](logits, None, 2), RULES["default"](logits, None, 2)
    assert renormalized.ids.tolist() == default.ids.tolist() == [[1, 3]]
    assert renormalized.weights.tolist() == [[0.5, 0.5]]
    assert default.weights[0].tolist() == pytest.approx([0.38595, 0.38595], abs=1e-5)


def test_renormalize_is_a_softmax_over_the_selected() -> None:
    weights = RULES["renormalize"](torch.tensor([[0.0, 1.0, -5.0]]), None, 2).weights[0]
    e = float(torch.tensor(1.0, dtype=torch.float64).exp())
    assert weights.tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)])


@each_rule
def test_ties_go_to_the_lower_index(rule: Rule) -> None:
    """torch.topk promises no order among equals, and on wide rows it gives none."""
    bias = torch.zeros(64) if rule.biased else None
    ids = rule(torch.zeros(3, 64), bias, 8).ids
    assert ids.tolist() == [list(range(8))] * 3


@each_rule
def test_ids_of_a_token_are_distinct_and_in_range(rule: Rule) -> None:
    ids = route(rule).ids
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 32


@each_rule
def test_weights_sum_to_the_scale_where_they_are_shares(rule: Rule) -> None:
    """Probabilities taken as they are sum to less, single sigmoids and logits to anything."""
    weights = route(rule).weights
    sums, wanted = weights.sum(-1), torch.full_like(weights[:, 0], rule.scale)
    assert (weights > 0).all() or rule.name == "topk"
    if rule.name in PROBABILITIES:
        assert (sums < wanted).all()
    elif rule.name not in UNNORMALIZED:
        assert torch.allclose(sums, wanted, rtol=1e-12)


@each_rule
def test_a_gap_below_the_margin_changes_no_selection(rule: Rule) -> None:
    """Moving every selection score by less than half the margin: no score has a slope above 1 in its logit."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(40, 32, generator=generator).double()
    bias = torch.zeros(32) if rule.biased else None
    routing = rule(logits, bias, 4)
    shift = (torch.rand(40, 32, generator=generator) * 2 - 1) * routing.margin.clamp(max=0.1)[:, None] / 4.1
    assert torch.equal(rule(logits + shift, bias, 4).ids.sort(-1).values, routing.ids.sort(-1).values)


def test_margin_is_the_gap_between_last_selected_and_first_rejected() -> None:
    ids, margin = select(torch.tensor([[5.0, 1.0, 4.0, 3.5]]), 2)
    assert ids.tolist() == [[0, 2]]
    assert margin.tolist() == [0.5]


def test_margin_is_infinite_when_nobody_is_rejected() -> None:
    assert select(torch.tensor([[5.0, 1.0]]), 2)[1].tolist() == [float("inf")]


def test_nan_ranks_above_infinity() -> None:
    assert select(torch.tensor([[1.0, float("inf"), float("nan")]]), 2)[0].tolist() == [[2, 1]]


@each_rule
def test_a_missing_or_unwanted_bias_is_refused(rule: Rule) -> None:
    bias: Tensor | None = None if rule.biased else torch.zeros(32)
    with pytest.raises(ValueError, match="a bias must"):
        rule(torch.zeros(1, 32), bias, 2)


@pytest.mark.parametrize(
    ("experts", "top_k", "reason"),
    [(30, 2, "equal groups"), (8, 2, "at least 2"), (32, 17, "too few for top_k 17"), (32, 16, None), (16, 8, None)],
)
def test_grouped_rules_say_which_shapes_they_refuse(experts: int, top_k: int, reason: str | None) -> None:
    problem = RULES["deepseek_v3"].problem(experts, top_k)
    assert problem is None if reason is None else reason in str(problem)


def test_ungrouped_rules_refuse_no_shape() -> None:
    assert RULES["renormalize"].problem(7, 7) is None


def test_scales_and_groups_are_those_of_the_published_models() -> None:
    assert (RULES["deepseek_v3"].groups, RULES["deepseek_v3"].scale) == ((8, 4), 2.5)
    assert (RULES["kimi_k2"].groups, RULES["kimi_k2"].scale) == ((1, 1), 2.827)


@each_rule
def test_routing_is_computed_in_float64(rule: Rule) -> None:
    routing = route(rule)
    assert (routing.ids.dtype, routing.weights.dtype, routing.margin.dtype) == (torch.int64, torch.float64, torch.float64)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ([INF, INF, 1.0], 0),
        ([-INF, -INF, -INF], 0),
        ([NAN, NAN, NAN], 0),
        ([NAN, NAN, 1.0], INF),
        ([3.0, 2.0, -INF], INF),
        ([3.0, NAN, 1.0], 2),
    ],
)
def test_margins_of_infinities_and_nans_say_tie_or_not(row: list[float], margin: float) -> None:
    """inf - inf is NaN, and a NaN margin is below no threshold: the tie would count as clear."""
    top_k = 1 if row[:2] == [INF, INF] else 2
    assert select(torch.tensor([row]), top_k)[1].tolist() == [margin]


@each_rule
def test_a_row_of_nan_spoils_no_other_row(rule: Rule) -> None:
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(16) if rule.biased else None
    clean = rule(logits, bias, 2)
    logits[1] = NAN
    spoilt = rule(logits, bias, 2)
    assert torch.equal(spoilt.ids[::2], clean.ids[::2])
    assert torch.equal(spoilt.weights[::2], clean.weights[::2])
    assert spoilt.ids[1].tolist() == [0, 1]
    assert spoilt.margin[1] == 0


@each_rule
def test_experts_at_minus_infinity_are_never_selected(rule: Rule) -> None:
    """How callers mask experts out: 8 of 32 remain, two in each of four groups of four."""
    logits = torch.full((5, 32), -INF)
    alive = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    logits[:, alive] = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    routing = rule(logits, torch.zeros(32) if rule.biased else None, 4)
    assert torch.isin(routing.ids, alive).all()
    assert routing.weights.isfinite().all()


@each_rule
def test_bf16_logits_tie_and_go_to_the_lower_index(rule: Rule) -> None:
    """1 + 1/512 is 1 in bf16: as fp32 the later expert is better, as bf16 they are equal. The kernel's dtype decides."""
    logits = torch.zeros(1, 16)
    logits[0, 3], logits[0, 9] = 1.0, 1.0 + 1 / 512
    bias = torch.zeros(16) if rule.biased else None
    assert rule(logits, bias, 2).ids.tolist() == [[9, 3]]
    assert rule(logits.bfloat16(), bias, 2).ids.tolist() == [[3, 9]]


@pytest.mark.parametrize("name", [rule.name for rule in RULES.values() if rule.biased])
def test_all_negative_selection_scores_choose_as_positive_ones_do(name: str) -> None:
    """A bias that moves every score by the same amount changes nothing, below zero either."""
    logits = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    up, down = (RULES[name](logits, torch.full((32,), by), 4) for by in (4.0, -4.0))
    assert torch.equal(up.ids, down.ids)
    assert torch.equal(up.weights, down.weights)


def test_a_bias_may_be_rounded_first() -> None:
    """The grouped kernel of trtllm-gen rounds the bias to bf16; 1 + 1/512 becomes 1 and the lower index wins."""
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 1.0, 1.0 + 1 / 512, 0.0])
    exact = replace(V3, groups=(1, 1))
    assert exact(logits, bias, 1).ids.tolist() == [[2]]
    assert replace(exact, bias_dtype=torch.bfloat16)(logits, bias, 1).ids.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keys_sort_every_16_bit_value_as_its_bits_say(dtype: torch.dtype) -> None:
    """Ascending: negative NaNs, -inf, ..., -0, +0, ..., +inf, positive NaNs."""
    codes = torch.arange(1 << 15, dtype=torch.int32)
    values = torch.cat((codes.flip(0) - (1 << 15), codes)).to(torch.int16).view(torch.bfloat16)
    values = values if dtype == torch.bfloat16 else values.float().to(dtype)
    keys = sort_keys(values[:, None])[:, 0]
    wanted = values.float()
    steps = (wanted.diff() > 0) | (keys.diff() >= 0)
    assert steps[~wanted.diff().isnan()].all()


def test_keys_differ_from_a_comparison_of_floats_at_zero_and_nan_only() -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0]])
    assert select(scores, 4)[0].tolist() == [[0, 1, 3, 2]]
    assert select_by_key(scores, 4).tolist() == [[1, 3, 0, 2]]
    assert select_by_key(torch.tensor([[INF, NAN, 1.0, -INF]]), 4).tolist() == [[1, 0, 2, 3]]
    assert select_by_key(torch.tensor([[-NAN, -INF]]).copysign(torch.tensor(-1.0)), 2).tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keys_select_as_we_do_where_no_zero_has_a_sign(dtype: torch.dtype) -> None:
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    scores[:, ::7] = 0.5
    assert torch.equal(select_by_key(scores, 9), select(scores, 9)[0])
