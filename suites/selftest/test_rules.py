"""The acceptance rules in use, each on both sides of its threshold, worked out by hand on outputs of ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.faults.rules import RULES, verdicts

COUNT = 1000
ONES = torch.ones(COUNT, 1, dtype=torch.float64)


def output(value: float, bad: int = 0, wrong: float = 100.0) -> Tensor:
    """COUNT elements of `value`, the first `bad` of them `wrong`."""
    got = torch.full((COUNT, 1), value, dtype=torch.float64)
    got[:bad] = wrong
    return got


# rule: (what it still accepts, what it refuses), against a reference of ones. Uniform v: |v - 1| <= atol + rtol (of the
# reference) or atol + rtol * v (of the output: v <= (1 + atol) / (1 - rtol) for v > 1). Then the count of garbage elements.
SIDES: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    "flashinfer_fp4": ([output(7.3), output(1, 80)], [output(7.4), output(1, 81)]),
    "flashinfer_bf16": ([output(7.3), output(1, 75)], [output(7.4), output(1, 76)]),
    "flashinfer_fp8_block": ([output(7.3), output(1, 210)], [output(7.4), output(1, 211)]),
    "flashinfer_fp8_080": ([output(7.3), output(1, 200)], [output(7.4), output(1, 201)]),
    "flashinfer_dpsk": ([output(1.374), output(0.751), output(1, 150)], [output(1.376), output(0.749), output(1, 151)]),
    "flashinfer_unified_fp8": ([output(1.49), output(1, 10)], [output(1.51), output(1, 11)]),
    "flashinfer_fuzz_nvfp4": ([output(1.2509), output(0.7491)], [output(1.2511), output(0.7489), output(1, 1)]),
    "flashinfer_fuzz_fp8": ([output(0.0), output(2.0009)], [output(2.0011), output(1, 1)]),
    "flashinfer_fuzz_bf16": ([output(1.1009)], [output(1.1011), output(1, 1)]),
    "flashinfer_cutlass_bf16": ([output(1.0199)], [output(1.0201), output(1, 1)]),
    "flashinfer_cutlass_fp8": ([output(1.199)], [output(1.201), output(1, 1)]),
    "flashinfer_cutlass_nvfp4": ([output(1.399)], [output(1.401), output(1, 1)]),
    "flashinfer_replay": ([output(1.00199)], [output(1.00201), output(1, 1)]),
    "flashinfer_bench_moe": ([output(1.0099), output(1, 50)], [output(1.0101), output(1, 51), output(1, 1, torch.inf)]),
    # uniform v: 1 - 2 v / (1 + v^2) = (v - 1)^2 / (1 + v^2) = d at v = (1 + sqrt(1 - (1 - d)^2)) / (1 - d)
    "deepgemm_fp8": ([output(1.045)], [output(1.047), output(1, 1)]),
    "deepgemm_fp8_fp4": ([output(1.152)], [output(1.154), output(0.0)]),
    "deepgemm_fp4": ([output(1.223)], [output(1.224), output(0.0)]),
    "vllm_deepgemm_fp4": ([output(1.381)], [output(1.382), output(0.0)]),
    "torch_assert_close_bf16": ([output(1.016)], [output(1.0161), output(1, 1)]),
    # the largest of e <= maxtol; k elements of e make the rms e * sqrt(k / 1000)
    "triton_kernels": ([output(1.0039), output(1, 1, 1.0199), output(1, 40, 1.0199)], [output(1.0041), output(1, 1, 1.0201)]),
    "vllm_gpt_oss": ([output(1.0049), output(1, 1, 1.0249)], [output(1.0051), output(1, 1, 1.0251)]),
    "kernelbench": ([output(1.0199)], [output(1.0201), output(1, 1)]),
    "aiter_ratio": ([output(1.0199), output(1, 50), output(1, 50, torch.nan)], [output(1.0201), output(1, 51)]),
    "aiter_ratio_catastrophic": ([output(1, 50, 1.49)], [output(1, 1, 1.51), output(1, 1, torch.nan), output(1, 51, 1.49)]),
    "vllm_cutedsl_masked": ([output(1.399), output(0.601)], [output(1.401), output(0.599), output(1, 1)]),
    "vllm_nvfp4": ([output(1.222), output(0.819)], [output(1.223), output(0.818)]),
    # a uniform factor has cosine 1: only the tolerance decides, but for zeros, whose cosine is none
    "vllm_cutedsl_nvfp4": ([output(1.229)], [output(1.231), output(0.0), output(1, 1)]),
    "vllm_trtllm_nvfp4": ([output(1.399)], [output(1.401), output(0.0), output(1, 1)]),
    "vllm_b12x": ([output(1.399)], [output(1.401), output(0.0)]),
    "vllm_trtllm_bf16": ([output(1.299)], [output(1.301)]),
    "vllm_mxint4": ([output(0.0), output(2.299)], [output(2.301), output(-0.301)]),
    "vllm_mxint4_pair": ([output(0.0), output(-5.299), output(7.299)], [output(-5.301), output(7.301)]),
    "vllm_modular": ([output(1.0599)], [output(1.0601)]),
    "vllm_modular_fp4": ([output(1.299)], [output(1.301)]),
    "vllm_moe": ([output(1.0199)], [output(1.0201)]),
    "vllm_marlin": ([output(1.099)], [output(1.101)]),
    "vllm_batched": ([output(1.119)], [output(1.121)]),
    "vllm_block_fp8": ([output(1.0699)], [output(1.0701)]),
    "vllm_block_int8": ([output(1.1299)], [output(1.1301)]),
    "vllm_cutlass_fp8": ([output(1.0649)], [output(1.0651)]),
    "vllm_cutlass_w4a8": ([output(1.0999)], [output(1.1001)]),
    "vllm_layer_bf16": ([output(1.1109)], [output(1.1111)]),
    "vllm_layer_fp4": ([output(1.6095)], [output(1.6097)]),
    "vllm_ocp_mx": ([output(1.428), output(1, 200)], [output(1.429), output(1, 201), output(1, 1, torch.nan)]),
    "vllm_flashinfer": ([output(7.3), output(1, 75)], [output(7.4), output(1, 76), output(1, 1, torch.inf)]),
}
BASELINE = output(1.01)  # its rmse and its largest error are 0.01
WITH_BASELINE: dict[str, tuple[list[Tensor], list[Tensor]]] = {
    # 2 * 0.01 + 1e-4 / 10; k garbage elements of error e: e * sqrt(k / 1000)
    "torch_same": ([output(1.02), output(1, 1, 1.632)], [output(1.0201), output(1, 1, 1.634)]),
    "flash_attention": ([output(1.02), output(0.98)], [output(1.02002), output(1, 1, 1.0201)]),
}


@pytest.mark.parametrize("name", SIDES)
def test_each_side_of_the_threshold(name: str) -> None:
    accepted, refused = SIDES[name]
    assert [verdicts(got, ONES, rules=[RULES[name]])[name] for got in accepted] == [True] * len(accepted)
    assert [verdicts(got, ONES, rules=[RULES[name]])[name] for got in refused] == [False] * len(refused)


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_each_side_of_the_threshold_against_a_baseline(name: str) -> None:
    accepted, refused = WITH_BASELINE[name]
    assert [verdicts(got, ONES, BASELINE)[name] for got in accepted] == [True] * len(accepted)
    assert [verdicts(got, ONES, BASELINE)[name] for got in refused] == [False] * len(refused)


def test_no_rule_is_left_out_of_these_tables() -> None:
    assert SIDES.keys() | WITH_BASELINE.keys() == RULES.keys()


def test_every_rule_accepts_the_reference_and_names_its_source() -> None:
    assert all(verdicts(ONES, ONES, BASELINE).values())
    assert all(len(rule.source) > 8 for rule in RULES.values())


def test_rules_that_need_a_baseline_are_left_out_without_one() -> None:
    assert verdicts(ONES, ONES).keys() == RULES.keys() - WITH_BASELINE.keys()


def test_small_tensors_get_a_multiplier_of_three_from_torch_same() -> None:
    few, baseline = ONES[:999], BASELINE[:999]
    assert verdicts(output(1.03)[:999], few, baseline)["torch_same"]
    assert not verdicts(output(1.0301)[:999], few, baseline)["torch_same"]


def test_zeros_pass_where_the_reference_is_small() -> None:
    """At 0.03 even the strictest absolute tolerance of 0.1 is above everything there is."""
    small = 0.03 * ONES
    passing = {name for name, accepted in verdicts(torch.zeros_like(small), small).items() if accepted}
    assert {"flashinfer_fp4", "flashinfer_dpsk", "vllm_nvfp4", "vllm_cutedsl_masked", "vllm_marlin", "vllm_mxint4"} <= passing
    assert not passing & {"deepgemm_fp8", "deepgemm_fp4", "triton_kernels", "vllm_cutedsl_nvfp4", "torch_assert_close_bf16"}


def test_an_empty_or_misshapen_output_has_no_verdict() -> None:
    for got in (ONES[:0], ONES[:5]):
        with pytest.raises(ValueError, match="wanted equal ones"):
            verdicts(got, ONES[:0])


def test_a_cosine_refuses_what_the_tolerance_lets_pass() -> None:
    """On outputs of 0.1, 0.2 of tolerance accepts everything; half of the signs turned has cosine 0."""
    small = 0.1 * ONES
    turned = small.clone()
    turned[:500] *= -1
    assert verdicts(turned, small)["vllm_cutedsl_masked"]
    assert not verdicts(turned, small)["vllm_trtllm_nvfp4"]
    turned[: 500 - 4] *= -1  # four of a thousand left: cosine 0.992
    assert verdicts(turned, small)["vllm_trtllm_nvfp4"]
