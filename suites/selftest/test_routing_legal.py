"""Whether another selection is as right: near ties either way, group choices included, nothing worse."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.routing import RULES, Rule, Slack, legal

RAW = RULES["renormalize"]
V3 = replace(RULES["deepseek_v3"], groups=(4, 2))
GROUPED = replace(RAW, groups=(4, 2), pairs=False)
PAIRED = replace(RAW, groups=(4, 2))
small = st.lists(st.integers(0, 6).map(lambda i: i / 4), min_size=8, max_size=8)


def verdict(rule: Rule, row: list[float], ids: list[int], delta: float | None = None) -> bool:
    bias = torch.zeros(len(row)) if rule.biased else None
    return bool(legal(rule, torch.tensor([row], dtype=torch.float64), bias, torch.tensor([ids]), delta))


@pytest.mark.parametrize(
    ("ids", "delta", "right"),
    [
        ([0, 1], 0.0, True),
        ([1, 0], 0.0, True),
        ([0, 2], 0.0, False),
        ([0, 2], 0.49, False),
        ([0, 2], 0.5, True),
        ([1, 2], 0.5, False),
        ([1, 2], 1.0, True),
        ([0, 0], 9.0, False),
        ([0, -1], 9.0, False),
        ([0, 4], 9.0, False),
    ],
)
def test_a_selection_is_legal_up_to_delta(ids: list[int], delta: float, right: bool) -> None:
    """Scores 3, 2.5, 2, -1: how far the worst selected may be below the best left out."""
    assert verdict(RAW, [3.0, 2.5, 2.0, -1.0], ids, delta) is right


def test_order_and_ties_do_not_matter() -> None:
    assert all(verdict(RAW, [1.0, 2.0, 1.0, 1.0], list(ids), 0.0) for ids in ((1, 0), (1, 2), (3, 1)))
    assert not verdict(RAW, [1.0, 2.0, 1.0, 1.0], [0, 2], 0.0)


def test_raw_logits_get_one_spacing_of_their_dtype() -> None:
    """1.0078125 is one bf16 spacing above 1; in fp32 that is far away."""
    row = torch.tensor([[1.0078125, 1.0, 0.5]])
    assert bool(legal(RAW, row.bfloat16(), None, torch.tensor([[1]])))
    assert not bool(legal(RAW, row, None, torch.tensor([[1]])))
    assert not bool(legal(RAW, row.bfloat16(), None, torch.tensor([[2]])))


def test_sigmoid_rules_get_what_tanh_approx_may_err() -> None:
    """Twice 2**-12; probabilities err relative to their size, so a tiny one is no excuse."""
    row = torch.tensor([0.5, 0.5 - 4e-4, 0.5 - 6e-4]).double().logit()[None]
    assert bool(legal(RULES["sigmoid"], row, None, torch.tensor([[1]])))
    assert not bool(legal(RULES["sigmoid"], row, None, torch.tensor([[2]])))
    tiny = torch.tensor([[20.0, 1.0, 0.99]])
    assert not bool(legal(RULES["default"], tiny, None, torch.tensor([[0, 2]])))


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.name)
def test_our_own_selection_is_legal_and_a_worse_one_is_not(rule: Rule) -> None:
    logits = torch.randn(60, 32, generator=torch.Generator().manual_seed(8))
    bias = torch.randn(32, generator=torch.Generator().manual_seed(9)) / 8 if rule.biased else None
    routing = rule(logits, bias, 4)
    assert legal(rule, logits, bias, routing.ids, 0.0).all()
    assert legal(rule, logits, bias, routing.ids).all()
    selection = rule.mask(rule.scores(logits, bias)[1])[0]
    worst = selection.masked_fill(selection.isinf(), torch.inf).argmin(-1)  # inside the kept groups
    wrong = torch.cat((routing.ids[:, :3], worst[:, None]), -1)
    assert not legal(rule, logits, bias, wrong).any()


@pytest.mark.parametrize("rule", [r for r in RULES.values() if not r.shared], ids=lambda r: r.name)
def test_nan_and_infinite_rows_accept_any_of_the_tied(rule: Rule) -> None:
    bias = torch.zeros(32) if rule.biased else None
    logits = torch.full((1, 32), float("nan"))
    assert legal(rule, logits, bias, torch.tensor([[0, 2]])).all()
    assert legal(rule, torch.full((1, 32), 3.0), bias, torch.tensor([[0, 2]])).all()
    assert not legal(rule, logits, bias, torch.tensor([[4, 4]])).any()


def test_a_finite_score_never_loses_to_minus_infinity() -> None:
    row = [1.0, float("-inf"), 0.0, float("-inf")]
    assert not verdict(RAW, row, [0, 1])
    assert verdict(RAW, row, [0, 2])
    assert verdict(RAW, [float("-inf")] * 4, [1, 3])


def test_experts_of_a_group_that_lost_are_illegal_however_good() -> None:
    """Group sums 1.8, 1.2, 1.0, 0.2: expert 4 scores best of all, in the third group."""
    scores = torch.tensor([[0.9, 0.9, 0.6, 0.6, 0.99, 0.01, 0.1, 0.1]]).double().logit()
    assert not bool(legal(V3, scores, torch.zeros(8), torch.tensor([[4, 0]])))
    assert bool(legal(V3, scores, torch.zeros(8), torch.tensor([[4, 0]]), 0.11))
    assert bool(legal(V3, scores, torch.zeros(8), torch.tensor([[1, 0]]), 0.0))


def test_a_group_choice_within_slack_brings_its_own_best_experts() -> None:
    """Groups 1 and 2 tie for the second place; whoever takes group 2 must take its 0.7 before group 0's 0.6."""
    row = [0.9, 0.6, 0.5, 0.5, 0.7, 0.3, 0.0, 0.0]
    assert verdict(PAIRED, row, [0, 1], 0.0)
    assert verdict(PAIRED, row, [0, 4], 0.0)
    assert not verdict(PAIRED, row, [4, 1], 0.0)
    assert not verdict(PAIRED, row, [0, 2], 0.0)


def brute_force(rule: Rule, row: list[float], ids: list[int], delta: float) -> bool:
    """Try every set of two groups of four."""
    groups = [row[2 * g : 2 * g + 2] for g in range(4)]
    value = [sum(g) if rule.pairs else max(g) for g in groups]
    last, loose = sorted(value)[-2], delta * (2 if rule.pairs else 1)
    for kept in combinations(range(4), 2):
        if any(value[g] < last - loose if g in kept else value[g] > last + loose for g in range(4)):
            continue
        inside = [e for e in range(8) if e // 2 in kept]
        left = [row[e] for e in inside if e not in ids]
        if all(e in inside for e in ids) and min(row[e] for e in ids) >= max(left) - delta:
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(
    row=small,
    ids=st.sampled_from(list(combinations(range(8), 2))),
    delta=st.sampled_from((0.0, 0.25, 0.5)),
    pairs=st.booleans(),
)
def test_group_verdicts_equal_trying_every_choice(row: list[float], ids: tuple[int, int], delta: float, pairs: bool) -> None:
    rule = PAIRED if pairs else GROUPED
    assert verdict(rule, row, list(ids), delta) == brute_force(rule, row, list(ids), delta)


@settings(max_examples=100, deadline=None)
@given(row=small, noise=st.lists(st.floats(-0.25, 0.25), min_size=8, max_size=8), pairs=st.booleans())
def test_what_a_noisy_kernel_selects_is_legal(row: list[float], noise: list[float], pairs: bool) -> None:
    """Scores wrong by up to a quarter each: two may come out reversed from half apart, groups of two from one apart."""
    rule, exact = PAIRED if pairs else GROUPED, torch.tensor([row], dtype=torch.float64)
    ids = rule(exact + torch.tensor([noise], dtype=torch.float64), None, 2).ids
    assert legal(rule, exact, None, ids, 0.5).all()


def test_slack_adds_its_parts_and_vanishes_at_infinity() -> None:
    kth: Tensor = torch.tensor([2.0, -2.0, float("inf"), float("nan")], dtype=torch.float64)
    slack = Slack(absolute=0.5, relative=0.25, ulps=2.0).at(kth, torch.bfloat16)
    assert slack.tolist() == [0.5 + 0.5 + 2 * 2.0**-7 * 2, 0.5 + 0.5 + 2 * 2.0**-7 * 2, 0, 0]


def test_two_groups_are_groups_already() -> None:
    two = replace(RAW, groups=(2, 1), pairs=False)
    assert verdict(two, [0.9, 0.1, 0.8, 0.7], [0, 1], 0.0)
    assert not verdict(two, [0.9, 0.1, 0.8, 0.7], [0, 2], 0.0)
    assert verdict(two, [0.9, 0.1, 0.8, 0.7], [2, 3], 0.1)


@pytest.mark.parametrize(("delta", "right"), [(0.12, False), (0.13, True)])
def test_a_group_of_two_scores_may_be_off_by_twice_delta(delta: float, right: bool) -> None:
    """The third group lacks 0.25 to the second."""
    assert verdict(PAIRED, [0.9, 0.5, 0.5, 0.5, 0.5, 0.25, 0.0, 0.0], [0, 4], delta) is right


@pytest.mark.parametrize(("delta", "right"), [(0.24, False), (0.25, True)])
def test_a_group_of_one_score_may_be_off_by_delta(delta: float, right: bool) -> None:
    assert verdict(GROUPED, [1.0, 0.25, 0.5, 0.0, 0.25, 0.0, 0.0, 0.0], [0, 4], delta) is right
