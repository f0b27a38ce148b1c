"""`moecheck audit`: what a tolerance lets through, counted right and said plainly; and the published findings, asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.compare import compare
from harness.faults.audit import GUARD, MOECHECK, RIGHT, YOURS, Audit, Subject, Tally, audit
from harness.faults.input_models import INPUT_MODELS, expected_of, once
from harness.faults.rules import RULES, Rule, close, verdicts
from harness.report.audit import as_json, sentences
from reference.routing import Routing

CASES = (
    "moe.bf16.t17.h96.i96.e4.k2.renormalize.swiglu.standard.real.s0",
    "moe.bf16.t17.h96.i96.e4.k2.renormalize.swiglu.standard.exact.s0",
)
SELECT = ("--platform", "cpu", "--backend", "torch_grouped_mm", *(word for case in CASES for word in ("--case", case)))


def counted(*accepted: tuple[bool, bool]) -> Audit:
    """An audit of hand-made cases: (zeros accepted, stale accepted) by "yours"."""
    result = Audit((YOURS, MOECHECK))
    for number, (zeros, stale) in enumerate(accepted):
        said = {RIGHT: number != 0, "zeros": zeros, "stale": stale}
        result.seen[f"case {number}"] = {name: {YOURS: value, MOECHECK: name == RIGHT} for name, value in said.items()}
    return result


def test_counts_and_sentences() -> None:
    result = counted((False, True), (True, True), (False, False), (False, True))
    assert result.tally("zeros", YOURS) == Tally(1, 4)
    assert result.overall(YOURS) == Tally(4, 8)
    assert result.overall(MOECHECK) == Tally(0, 8)
    assert result.worst(YOURS) == "stale"
    assert result.worst(MOECHECK) is None
    assert result.untrusted(YOURS) == ["case 0", "case 1", "case 3"]
    text = sentences(result, Rule("yours", "atol 1", close(1, 0)))
    assert text[0] == "Your rule (atol 1) accepts an all-zero output in 1 of 4 cases."
    assert text[1] == "It accepts 4 of 8 wrong outputs; most often: the previous call's output, in 3 of 4 cases."
    assert "3 of 4 cases: UNTRUSTED" in text[2]
    assert "refuses a right kernel in 1 of 4 cases" in text[3]
    assert text[4] == "moecheck's own lanes accept 0 of 8 wrong outputs and refuse 0 of 4 right ones."


def test_a_wrong_layer_is_judged_only_where_it_occurs() -> None:
    result = counted((True, True), (True, True))
    del result.seen["case 0"]["stale"]
    assert result.tally("stale", YOURS) == Tally(1, 1)
    assert result.tally("nothing", YOURS).share == 0


def test_a_hopeless_rule_is_told_so(moecheck: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    code, out, _ = moecheck("audit", *SELECT, "--atol", "1000", "--rtol", "0", "--json", str(file))
    assert code == 0
    assert "accepts an all-zero output in 2 of 2 cases" in out
    assert "moecheck's own lanes accept 0 of " in out
    saved = json.loads(file.read_text())
    assert saved["accepted"]["zeros"][YOURS] == [2, 2]
    assert saved["accepted"][RIGHT][MOECHECK] == [2, 2]
    assert saved["untrusted"][MOECHECK] == 0
    assert set(saved["let_through"]) == set(CASES)
    assert {"zeros", "expert_x1.03", "wrong_row"} <= set(saved["let_through"][CASES[0]])


def test_a_strict_rule_refuses_right_kernels(moecheck: Callable[..., tuple[int, str, str]]) -> None:
    """At atol = rtol = 1e-3 an output rounded to bf16 (half an ulp: 2**-9 relative) is wrong; in the exact fill it is not."""
    _, out, _ = moecheck("audit", *SELECT, "--rule", "flashinfer_replay", "--wrong", "zeros")
    assert "It refuses all 2 wrong outputs." in out
    assert "refuses a right kernel in 1 of 2 cases" in out


def test_half_of_the_elements_may_be_anything(moecheck: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = moecheck("audit", *SELECT, "--atol", "0.05", "--rtol", "0.05", "--percent", "0.5", "--wrong", "wrong_row")
    assert "most often: one row wrong, in 2 of 2 cases" in out


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ((), ("--atol A --rtol R", "--rule NAME")),
        (("--atol", "0.1"), ("--atol A --rtol R",)),
        (("--rule", "vllm_moe", "--atol", "1", "--rtol", "1"), ("not both",)),
        (("--rule", "vllm_mo"), ("vllm_moe",)),
        (("--inputs", "vllm_cutedsl"), ("vllm_cutedsl_masked",)),
        (("--inputs", "vllm_cutedsl_masked", "--tier", "ci"), ("brings its own cases",)),
        (("--rule", "vllm_moe", "--wrong", "zero"), ("zeros",)),
        (("--rule", "vllm_moe", "--platform", "cpu", "--tier", "cii"), ("ci",)),
        (("--rule", "vllm_moe", "--platform", "cpu", "--case", "moe.bf16"), ("does not parse",)),
        (("--atol", "0.1", "--rtol", "0.1", "--percent", "92"), ("--percent",)),
        (("--effects", "--rule", "vllm_moe"), ("nothing else",)),
        (("--effects", "--platform", "cpu", "--case", CASES[1]), ("real fill",)),
    ],
)
def test_a_fault_of_the_user_is_answered(
    moecheck: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], hints: tuple[str, ...]
) -> None:
    code, _, err = moecheck("audit", *arguments)
    assert code == 3
    assert all(hint in err for hint in hints), err


def test_effects_are_printed_recipe_by_recipe(moecheck: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = moecheck("audit", "--effects", *SELECT)
    assert code == 0
    assert "bf16: this green means a scale error of one expert above" in out
    assert "in all 1 cases" in out


@pytest.fixture(scope="module")
def masked() -> list[Subject]:
    return list(INPUT_MODELS["vllm_cutedsl_masked"].subjects())


@pytest.fixture(scope="module")
def found(masked: list[Subject]) -> Audit:
    return audit(masked, RULES["vllm_cutedsl_masked"], ("zeros", "stale", "gate_up_swap", "dropped_slot", "expert_x2"))


def test_the_masked_cutedsl_inputs_accept_zeros_at_02(found: Audit) -> None:
    """vLLM tests/kernels/moe/test_cutedsl_moe.py: |0 - y| <= 0.2 + 0.2 |y| wherever |y| <= 0.25: everywhere in
    these draws, in 116 of 120 over twenty draws of each row (docs/audit.md)."""
    assert found.tally("zeros", YOURS) == Tally(6, 6)
    assert found.tally("expert_x2", YOURS) == Tally(6, 6)
    assert found.tally("gate_up_swap", YOURS) == Tally(6, 6)
    assert found.tally(RIGHT, YOURS) == Tally(6, 6)


def test_no_such_row_is_trusted_under_that_rule_and_moecheck_sees_through_them(found: Audit) -> None:
    assert len(found.untrusted(YOURS)) == 6
    assert found.untrusted(MOECHECK) == []
    assert found.tally(RIGHT, MOECHECK) == Tally(6, 6)
    assert [found.tally(name, MOECHECK).accepted for name in (*GUARD, "expert_x2")] == [0] * 5


def test_the_magnitudes_are_those_of_the_source(masked: list[Subject]) -> None:
    """x of deviation 1/5 and weights of 1/10: pre-activations sqrt(hidden) / 50 = 0.226, through silu(g) u ~ g u / 2."""
    for subject in masked:
        layer = subject.layer
        assert layer.x.std().item() == pytest.approx(0.2, rel=0.15)
        weights = layer.experts.weights(layer.active[0])
        assert weights.gate.std().item() == pytest.approx(0.1, rel=0.05)
        assert weights.down.std().item() == pytest.approx(0.1, rel=0.05)
        assert weights.up is not None
        pre = layer.x @ weights.gate.T
        assert pre.std().item() == pytest.approx(128**0.5 / 50, rel=0.25)
        torch.testing.assert_close(layer.routing.weights.sum(-1), torch.ones(len(layer.x), dtype=torch.float64))


def test_inputs_of_a_model_are_the_same_on_every_call() -> None:
    model = INPUT_MODELS["vllm_cutedsl_masked"]
    one, again, other = (model.layer(model.rows[0], draw) for draw in (0, 0, 1))
    assert torch.equal(one.x, again.x)
    assert torch.equal(one.right, again.right)
    assert not torch.equal(one.x, other.x)


def test_every_model_names_a_rule_and_its_source() -> None:
    assert all(model.rule in RULES and "tests/kernels/moe" in model.source for model in INPUT_MODELS.values())


@pytest.mark.parametrize("name", ["vllm_mxint4", "vllm_mxint4_pair", "flashinfer_fuzz_fp8"])
def test_these_rules_accept_zeros_whatever_the_reference(name: str) -> None:
    """rtol >= 1, or atol = 0.15 max|y| with rtol = 0.85: |y| <= 0.15 max|y| + 0.85 |y| holds for every y."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        y = torch.randn(33, 128, generator=generator).double() * scale
        assert verdicts(torch.zeros_like(y), y, None, [RULES[name]])[name]


def test_the_json_is_plain_data(masked: list[Subject], found: Audit) -> None:
    saved = json.loads(json.dumps(as_json(found, RULES["vllm_cutedsl_masked"], "vLLM")))
    assert saved["cases"] == len(masked) == 6
    assert saved["accepted"]["zeros"]["deepgemm_fp8"] == [0, 6]


def test_a_repeated_expert_has_one_error_not_two() -> None:
    ids = torch.tensor([[3, 5, 3, 3], [1, 2, 3, 4]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    merged = once(Routing(ids, weights, torch.zeros(2)))
    torch.testing.assert_close(merged, torch.tensor([[0.8, 0.2, 0, 0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))


def test_the_real_lane_of_a_model_row_knows_its_sigma() -> None:
    """Right kernels with a quantised middle, experts repeated in a token's top 4: mean z^2 within 10 % of 1, no alarm."""
    model = INPUT_MODELS["vllm_cutedsl_masked"]
    layers = [model.layer(model.rows[-1], draw) for draw in range(4)]
    found = [compare(expected_of(layer, model.kernel), layer.right) for layer in layers]
    assert all(comparison.agrees for comparison in found)
    assert sum(comparison.mean_z2 for comparison in found) / len(found) == pytest.approx(1.0, abs=0.1)
