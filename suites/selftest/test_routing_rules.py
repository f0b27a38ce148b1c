"""Every routing rule at worked values, and what its groups, scale and weights are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference.routing import RULES, Rule, Slack, hash_topk

LOGITS = torch.tensor([[1, 2, 0.5, 2]])
WORKED = {  # on LOGITS with top-2: ids, weights
    "default": ([1, 3], [0.38595, 0.38595]),
    "renormalize": ([1, 3], [0.5, 0.5]),
    "renormalize_naive": ([1, 3], [0.5, 0.5]),
    "topk": ([1, 3], [2, 2]),
    "topk_sigmoid": ([1, 3], [0.880797, 0.880797]),
    "llama4": ([1, 3], [0.880797, 0.880797]),
    "sigmoid": ([1, 3], [0.880797, 0.880797]),
    "sigmoid_renorm": ([1, 3], [0.5, 0.5]),
}
UNEQUAL = {  # on logits [0, ln 3, -ln 3] with top-2: sigmoids 1/2, 3/4, 1/4; softmax 3/13, 9/13, 1/13
    "default": [9 / 13, 3 / 13],
    "renormalize": [0.75, 0.25],
    "renormalize_naive": [0.75, 0.25],
    "topk": [1.0986123, 0],
    "topk_sigmoid": [0.75, 0.5],
    "llama4": [0.75, 0.5],
    "sigmoid": [0.75, 0.5],
    "sigmoid_renorm": [0.6, 0.4],
    "minimax2": [0.6, 0.4],
    "kimi_k2": [0.6 * 2.827, 0.4 * 2.827],
}


@pytest.mark.parametrize("name", WORKED)
def test_flat_rules_route_the_worked_example(name: str) -> None:
    routing = RULES[name](LOGITS, None, 2)
    ids, weights = WORKED[name]
    assert routing.ids.tolist() == [ids]
    assert routing.weights[0].tolist() == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_weights_come_in_their_proportions(name: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 1 / 3]], dtype=torch.float64).log()
    routing = RULES[name](logits, torch.zeros(3) if RULES[name].biased else None, 2)
    assert routing.ids.tolist() == [[1, 0]]
    assert routing.weights[0].tolist() == pytest.approx(UNEQUAL[name], abs=1e-6)


def test_minimax2_routes_the_worked_example() -> None:
    """The bias lifts expert 0 to the top; its weight stays its own sigmoid's share."""
    routing = RULES["minimax2"](LOGITS, torch.tensor([0.5, 0, 0, 0]), 2)
    assert routing.ids.tolist() == [[0, 1]]
    assert routing.weights[0].tolist() == pytest.approx([0.45355, 0.54645], abs=1e-5)


def test_llama4_takes_the_first_of_two_equal_logits() -> None:
    """1.7 as bf16 logits, 1.703125: as fp32 its sigmoid would round down to 0.84375."""
    routing = RULES["llama4"](torch.tensor([[0.3, 1.7, 1.7, -2]]).bfloat16(), None, 1)
    assert routing.ids.tolist() == [[1]]
    assert routing.weights.bfloat16().item() == 0.84765625


def test_deepseek_v4_routes_the_worked_example() -> None:
    rule = replace(RULES["deepseek_v4"], scale=2.5)
    scores = rule.scores(LOGITS, torch.zeros(4))[0][0]
    assert scores.tolist() == pytest.approx([1.1460, 1.4584, 0.9870, 1.4584], abs=5e-5)
    routing = rule(LOGITS, torch.zeros(4), 2)
    assert routing.ids.tolist() == [[1, 3]]
    assert routing.weights.tolist() == [[1.25, 1.25]]


def test_deepseek_v4_scores_keep_their_order_at_both_ends() -> None:
    """Far left softplus is exp(x), far right x; a NaN never wins, and weighs nothing where it has to be taken."""
    logits = torch.tensor([[-40.0, 400.0, 20.5, float("nan"), float("-inf")]], dtype=torch.float64)
    rule = RULES["deepseek_v4"]
    scores = rule.scores(logits, torch.zeros(5))[0][0]
    assert scores[:3].tolist() == pytest.approx([2.061153622438558e-09, 20.0, 20.5**0.5], rel=1e-9)
    assert rule(logits, torch.zeros(5), 5).ids.tolist() == [[1, 2, 0, 4, 3]]
    assert rule(logits, torch.zeros(5), 5).weights[0, 3:].tolist() == [0, 0]


def test_a_token_without_any_score_weighs_nothing() -> None:
    """A denominator of 0 becomes 1 in deepseek_v4; 1e-20 keeps deepseek_v3 and sigmoid_renorm from 0 / 0, vLLM's
    grouped_topk has no such guard."""
    nothing = torch.full((1, 16), float("-inf"))
    for name in ("deepseek_v4", "deepseek_v3", "sigmoid_renorm", "minimax2"):
        bias = torch.zeros(16) if RULES[name].biased else None
        assert RULES[name](nothing, bias, 2).weights.tolist() == [[0, 0]]
    assert RULES["grouped_sigmoid_renorm"](nothing, None, 2).weights.isnan().all()


def test_the_guard_shows_in_tiny_sums_only() -> None:
    logits = torch.full((1, 16), -46.0, dtype=torch.float64)  # sigmoid 1.05e-20: the sum of two is twice the guard
    guarded = RULES["minimax2"](logits, torch.zeros(16), 2).weights.sum().item()
    assert guarded == pytest.approx(2.1060e-20 / 3.1060e-20, rel=1e-4)
    assert RULES["sigmoid_renorm"](logits, None, 2).weights.sum().item() == pytest.approx(1, rel=1e-12)


def test_hash_routing_looks_experts_up_and_weighs_them_by_score() -> None:
    table = torch.tensor([[0, 1], [3, 2], [1, 3]])
    routing = hash_topk(LOGITS.expand(3, 4), torch.tensor([2, 0, 1]), table)
    assert routing.ids.tolist() == [[1, 3], [0, 1], [3, 2]]
    first, second = 1.1460 / (1.1460 + 1.4584), 1.4584 / (1.4584 + 0.9870)
    assert routing.weights.flatten().tolist() == pytest.approx([0.5, 0.5, first, 1 - first, second, 1 - second], abs=5e-5)
    assert routing.margin.isinf().all()
    assert torch.equal(hash_topk(LOGITS, torch.tensor([0]), table, 2.5).weights, 2.5 * routing.weights[1:2])


GROUP_SOURCES = {
    "grouped_softmax": (torch.softmax, False, False),
    "grouped_softmax_renorm": (torch.softmax, False, True),
    "grouped_softmax_bias": (torch.softmax, True, False),
    "grouped_softmax_bias_renorm": (torch.softmax, True, True),
    "grouped_sigmoid": (torch.sigmoid, False, False),
    "grouped_sigmoid_renorm": (torch.sigmoid, False, True),
    "grouped_sigmoid_bias": (torch.sigmoid, True, False),
    "grouped_sigmoid_bias_renorm": (torch.sigmoid, True, True),
}


@pytest.mark.parametrize("name", GROUP_SOURCES)
def test_grouped_variants_equal_a_loop(name: str) -> None:
    """One token at a time, in lists."""
    scoring, biased, renormalize = GROUP_SOURCES[name]
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(30, 16, generator=generator).double()
    bias = torch.randn(16, generator=generator) / 8 if biased else None
    routing = RULES[name](logits, bias, 3)
    for t in range(30):
        scores = (scoring(logits[t], -1) if scoring is torch.softmax else scoring(logits[t])).tolist()
        ids, weights = by_hand(scores, [0.0] * 16 if bias is None else bias.double().tolist(), biased)
        assert routing.ids[t].tolist() == ids
        wanted = [w / sum(weights) for w in weights] if renormalize else weights
        assert routing.weights[t].tolist() == pytest.approx(wanted, rel=1e-12)


def by_hand(scores: list[float], bias: list[float], pairs: bool) -> tuple[list[int], list[float]]:
    """Eight groups of two, four kept, top-3: (ids, their scores)."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    groups = [sorted(choice[2 * g : 2 * g + 2], reverse=True) for g in range(8)]
    value = [sum(g) if pairs else g[0] for g in groups]
    kept = sorted(range(8), key=lambda g: -value[g])[:4]
    ids = sorted((e for e in range(16) if e // 2 in kept), key=lambda e: -choice[e])[:3]
    return ids, [scores[e] for e in ids]


def test_without_a_bias_a_group_scores_its_best_expert() -> None:
    """The same logits keep another group with a bias of zero, where the sum of two decides."""
    logits = torch.tensor([[0.95, 0.01, 0.6, 0.61]]).logit()
    best = replace(RULES["grouped_sigmoid"], groups=(2, 1))
    assert best(logits, None, 1).ids.tolist() == [[0]]
    assert replace(RULES["grouped_sigmoid_bias"], groups=(2, 1))(logits, torch.zeros(4), 1).ids.tolist() == [[3]]


def test_deepseek_v2_scales_probabilities() -> None:
    rule = RULES["deepseek_v2"]
    assert (rule.groups, rule.scale, rule.pairs) == ((8, 3), 16.0, False)
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(12))
    plain = replace(RULES["grouped_softmax"], groups=(8, 3))(logits, None, 3)
    assert torch.equal(rule(logits, None, 3).weights, 16 * plain.weights)


def test_every_rule_says_where_it_comes_from() -> None:
    assert all(len(rule.source) > 20 and rule.name == name for name, rule in RULES.items())


@pytest.mark.parametrize("name", ["default", "renormalize", "deepseek_v3", "deepseek_v4", "minimax2"])
def test_every_flashinfer_and_vllm_method_has_a_rule(name: str) -> None:
    rule: Rule = RULES[name]
    assert rule.problem(16, 2) is None


SIGMOID_SLACK, SOFTMAX_SLACK = Slack(absolute=1 / 2048), Slack(relative=1 / 262144)
DATA = {  # bias, (groups, kept), two best per group, scale, slack; a rule not listed is (False, (1, 1), True, 1, one spacing)
    "default": (False, (1, 1), True, 1, SOFTMAX_SLACK),
    "sigmoid": (False, (1, 1), True, 1, SIGMOID_SLACK),
    "sigmoid_renorm": (False, (1, 1), True, 1, SIGMOID_SLACK),
    "minimax2": (True, (1, 1), True, 1, SIGMOID_SLACK),
    "deepseek_v3": (True, (8, 4), True, 2.5, SIGMOID_SLACK),
    "kimi_k2": (True, (1, 1), True, 2.827, SIGMOID_SLACK),
    "deepseek_v3_shared": (True, (8, 4), True, 2.5, SIGMOID_SLACK),
    "kimi_k2_shared": (True, (1, 1), True, 2.827, SIGMOID_SLACK),
    "deepseek_v2": (False, (8, 3), False, 16, SOFTMAX_SLACK),
    "deepseek_v4": (True, (1, 1), True, 1.5, Slack(absolute=1 / 2048, relative=1 / 262144)),
    **{
        name: (biased, (8, 4), biased, 1, SIGMOID_SLACK if scoring is torch.sigmoid else SOFTMAX_SLACK)
        for name, (scoring, biased, _) in GROUP_SOURCES.items()
    },
    **dict.fromkeys(
        ("grouped_softmax_bias", "grouped_softmax_bias_renorm"),
        (True, (8, 4), True, 1, Slack(absolute=1 / 1048576, relative=1 / 262144)),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_numbers_of_a_rule_are_those_of_its_source(name: str) -> None:
    """A slack only forgives: one twice too wide fails no right kernel, so its number is written here a second time."""
    rule = RULES[name]
    got = (rule.biased, rule.groups, rule.pairs, rule.scale, rule.slack)
    assert got == DATA.get(name, (False, (1, 1), True, 1, Slack(ulps=1)))
    assert rule.bias_dtype is None
    assert rule.shared == int(name.endswith("_shared"))


def test_small_scores_are_normalised_too() -> None:
    routing = RULES["deepseek_v4"](torch.full((1, 16), -20.0), torch.zeros(16), 2)
    assert routing.weights.tolist() == [pytest.approx([0.75, 0.75])]
