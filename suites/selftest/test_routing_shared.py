"""Fused shared experts: one expert more that every token takes in a slot of its own, whatever the router says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.errors import CaseError
from harness.exact import ExactLayer
from harness.inputs import make_inputs
from harness.oracle import expect
from harness.pipeline import Options, run
from harness.variants import relabelled
from harness.verdict import Status
from harness.whatif import Loader, experts_of
from reference.moe import moe
from reference.rounding import Rounding
from reference.routing import RULES, Rule, legal, with_shared

SHARED = [rule for rule in RULES.values() if rule.shared]
each_rule = pytest.mark.parametrize("rule", SHARED, ids=lambda r: r.name)
BF16 = Rounding(gate_up="bf16", middle="bf16", row="bf16", routing_weight="bf16", out="bf16")


def drawn(rule: Rule, experts: int = 16) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, experts, generator=generator)
    return logits, torch.randn(experts, generator=generator) / 8 if rule.biased else None


def case_of(routing: str, fill: str = "real", top_k: int = 3, **axes: int | str) -> Case:
    experts = 17 if routing.startswith("deepseek") else 9
    text = f"moe.bf16.t33.h64.i96.e{experts}.k{top_k}.{routing}.swiglu.standard.{fill}.s0"
    return Case.parse(text).vary(**axes)


def test_a_shared_expert_takes_the_last_slot_with_weight_one() -> None:
    routing = RULES["renormalize_shared"](torch.tensor([[0.0, 1.0, 2.0]]), None, 3)
    assert routing.ids.tolist() == [[2, 1, 3]]
    assert routing.weights[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e), 1.0])
    assert routing.margin.tolist() == [1.0]


@each_rule
def test_the_other_slots_are_routed_as_without_it(rule: Rule) -> None:
    """Nothing competes with a shared expert, no sum counts it, no factor scales it."""
    logits, bias = drawn(rule)
    base = RULES[rule.name.removesuffix("_shared")](logits, bias, 4)
    fused, wanted = rule(logits, bias, 5), with_shared(base, 16, 1)
    assert torch.equal(fused.ids, wanted.ids)
    assert torch.equal(fused.weights, wanted.weights)
    assert torch.equal(fused.margin, wanted.margin)


@each_rule
def test_weights_of_any_experts_leave_the_shared_one_out_of_the_sum(rule: Rule) -> None:
    logits, bias = drawn(rule)
    routing = rule(logits, bias, 5)
    scores, order = rule.scores(logits, bias)[0], torch.tensor([4, 0, 3, 1, 2])
    assert torch.allclose(rule.weights(scores, routing.ids[:, order]), routing.weights[:, order], rtol=1e-14)
    routed = rule.weights(scores, routing.ids[:, :4])
    assert torch.allclose(routed, routing.weights[:, :4], rtol=1e-14)
    assert torch.equal(rule.weights(scores, routing.ids[:, 4:]), torch.ones(50, 1, dtype=torch.float64))


@each_rule
def test_a_selection_without_the_shared_expert_is_illegal(rule: Rule) -> None:
    logits, bias = drawn(rule)
    ids = rule(logits, bias, 5).ids
    assert legal(rule, logits, bias, ids).all()
    assert legal(rule, logits, bias, ids.flip(-1)).all()
    worse, without, twice = ids.clone(), ids.clone(), ids.clone()
    worse[:, 3] = rule.mask(rule.scores(logits, bias)[1])[0].nan_to_num(neginf=torch.inf).argmin(-1)
    without[:, 4], twice[:, 0] = rule(logits, bias, 6).ids[:, 4], 16
    assert not legal(rule, logits, bias, worse).any()
    assert not legal(rule, logits, bias, without).any()
    assert not legal(rule, logits, bias, twice).any()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("moe.bf16.t3.h64.i96.e9.k1.kimi_k2_shared.swiglu.standard.real.s0", "a slot for it beside 1 shared, got 9 and 1"),
        ("moe.bf16.t3.h64.i96.e1.k1.renormalize_shared.swiglu.standard.real.s0", "a routed expert"),
        ("moe.bf16.t3.h64.i96.e16.k3.deepseek_v3_shared.swiglu.standard.real.s0", "8 equal groups .* got 15 routed beside 1"),
        ("moe.bf16.t3.h64.i96.e17.k10.deepseek_v3_shared.swiglu.standard.real.s0", "too few for top_k 9"),
        ("moe.bf16.t3.h64.i96.e9.k4.renormalize_shared.swiglu.standard.exact.s0", "power of two .* got 3 routed"),
        ("moe.bf16.t3.h64.i96.e64.k17.deepseek_v3_shared.swiglu.standard.exact.s0", "equal groups"),
        ("moe.bf16.t3.h64.i96.e65.k17.deepseek_v3_shared.swiglu.standard.exact.s0", "no room for a shared slot"),
        ("moe.bf16.t3.h64.i96.e6.k4.renormalize_shared.swiglu.standard.real.half.s0", "routed experts"),
        ("moe.bf16.t3.h64.i96.e9.k2.kimi_k2_shared.swiglu.standard.real.oninput.s0", "lone expert"),
        ("route.fp32.t3.e9.k3.kimi_k2_shared.real.s0", "a router has no shared expert"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(case: str, words: str) -> None:
    with pytest.raises(CaseError, match=words):
        Case.parse(case)


@each_rule
def test_the_router_of_a_case_knows_routed_experts_only(rule: Rule) -> None:
    case = case_of(rule.name)
    inputs = make_inputs(case)
    routed = case.shape.experts - 1
    assert inputs.logits.shape == (33, routed)
    assert inputs.bias is None or inputs.bias.shape == (routed,)
    assert (inputs.topk_ids[:, -1] == routed).all()
    assert (inputs.topk_weights[:, -1] == 1).all()
    assert int(inputs.topk_ids[:, :-1].max()) < routed
    assert len(inputs.topk_ids[:, :-1].unique()) > 3


def test_half_leaves_the_upper_routed_experts_idle_and_not_the_shared_one() -> None:
    ids = make_inputs(case_of("renormalize_shared", skew="half")).topk_ids
    assert ids.unique().tolist() == [0, 1, 2, 3, 8]


@pytest.mark.parametrize("seed", [2, 8, 16])
def test_hot_is_a_routed_expert(seed: int) -> None:
    for routing, fill in (("kimi_k2_shared", "real"), ("renormalize_shared", "exact"), ("deepseek_v3_shared", "exact")):
        case = case_of(routing, fill, skew="hot", seed=seed)
        hot = seed % (case.shape.experts - 1)
        assert (make_inputs(case).topk_ids[:, :-1] == hot).any(-1).all()


@each_rule
def test_relabelled_experts_are_the_same_layer_and_the_shared_one_stays_last(rule: Rule) -> None:
    inputs = make_inputs(case_of(rule.name))
    other = relabelled(inputs)
    shared = inputs.case.shape.experts - 1
    assert other.order[-1] == shared
    assert sorted(other.order) == list(range(shared + 1))
    assert (other.topk_ids[:, -1] == shared).all()
    layers = [moe(i.x, i.routing, experts_of(i.case, Loader(i).weights)) for i in (inputs, other)]
    assert torch.allclose(*layers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("routing", "top_k"), [("renormalize_shared", 2), ("renormalize_shared", 9), ("deepseek_v3_shared", 9)]
)
def test_the_exact_fill_is_exact(routing: str, top_k: int) -> None:
    """A slot of weight 1 takes log2(top_k - 1) of the bits that are left."""
    for seed in range(3):
        case = Case.parse(f"moe.bf16.t150.h64.i96.e33.k{top_k}.{routing}.swiglu.standard.exact.s{seed}")
        expected = expect(case, make_inputs(case), BF16, guard=False)
        assert expected.exact, expected.reason
        assert float((expected.value == 0).double().mean()) < 0.3
        weight = make_inputs(case).topk_weights
        assert torch.equal(weight[:, :-1], torch.full_like(weight[:, :-1], RULES[routing].scale / (top_k - 1)))


def test_the_units_of_a_slot_are_its_weight_on_a_common_grid() -> None:
    """5/2 over 8 slots beside 1: 5/16 and 16/16; without a shared expert the grid is that of the routed slots."""
    assert RULES["deepseek_v3_shared"].units(9) == (5, 16)
    assert RULES["renormalize_shared"].units(5) == (1, 4)
    assert RULES["deepseek_v3"].units(8) == (5, 0)
    assert RULES["renormalize"].units(8) == (1, 0)


def test_a_shared_expert_is_as_loud_as_a_routed_slot() -> None:
    """In the real fill, so that the rounding of its rows hides no routed slot."""
    inputs = make_inputs(case_of("kimi_k2_shared", top_k=5, hidden=256))
    routed, shared = (inputs.down(e).codes.double().square().mean().sqrt() for e in (0, 8))
    assert shared / routed == pytest.approx(2.827 / 4, rel=0.5)
    assert ExactLayer(case_of("renormalize_shared", "exact"), "cpu").down([8])


@pytest.mark.parametrize("routing", ["renormalize_shared", "kimi_k2_shared"])
@pytest.mark.parametrize("name", ["torch_grouped_mm", "flashinfer_cutlass_bf16_twin", "flashinfer_trtllm_bf16_routed_twin"])
def test_who_is_handed_ids_and_weights_takes_it_as_it_is(name: str, routing: str) -> None:
    backend = discover()[name]
    case = case_of(routing, hidden=128, inter=128)
    verdict = run(case, backend, CPU, options=Options(checks=4))
    assert verdict.status is Status.PASSED, verdict.reason


def test_nobody_who_routes_claims_a_shared_expert_unasked() -> None:
    """Only what passes num_fused_shared_experts; a router returns no shared slot."""
    claim = {b.name for b in discover().values() if any(RULES[r].shared for r in b.routings)}
    forms = ("flashinfer_trtllm_fp8_block_shared", "flashinfer_trtllm_fp4_shared")
    assert claim == {name + twin for name in forms for twin in ("", "_twin")}
