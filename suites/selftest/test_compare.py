"""The judge: right outputs agree, planted errors are located, impostors are rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.case import Case
from harness.checks import untrusted
from harness.compare import compare, mean_z2_limit, z_limit
from harness.diagnose import diagnose
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect, layer_experts
from reference.moe import moe
from reference.rounding import Rounding

KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
IDS = {
    "real": "moe.bf16.t49.h192.i128.e6.k2.renormalize.swiglu.standard.real.s1",
    "exact": "moe.bf16.t49.h192.i128.e6.k2.renormalize.swiglu.standard.exact.s1",
    "nvfp4": "moe.nvfp4.t49.h192.i128.e6.k2.renormalize.swiglu.standard.real.s1",
}


def question(name: str) -> tuple[Case, Inputs, Expected]:
    case = Case.parse(IDS[name])
    inputs = make_inputs(case)
    return case, inputs, expect(case, inputs, KERNEL)


def right_output(case: Case, inputs: Inputs) -> Tensor:
    """What a kernel with exactly the declared rounding points writes."""
    return moe(inputs.x, inputs.routing, layer_experts(inputs), KERNEL).bfloat16()


@pytest.mark.parametrize("name", IDS)
def test_a_right_kernel_agrees(name: str) -> None:
    case, inputs, expected = question(name)
    comparison = compare(expected, right_output(case, inputs))
    assert comparison.agrees
    assert comparison.lane == ("exact" if name == "exact" else "real")


@pytest.mark.parametrize("name", IDS)
def test_every_impostor_is_rejected(name: str) -> None:
    case, _, expected = question(name)
    assert {"zeros", "stale", "gate_up_swap", "dropped_slot", "expert_permutation"} <= set(expected.impostors)
    assert untrusted(case, expected) is None


def test_a_case_that_zeros_would_pass_is_untrusted() -> None:
    """Audited upstream tests accept zeros in 48 of 88 rows."""
    case, _, expected = question("real")
    blind = replace(expected, sigma=torch.full_like(expected.sigma, 1e3))
    reason = untrusted(case, blind)
    assert reason is not None
    assert "zeros" in reason


def test_an_exact_case_that_is_not_exact_is_untrusted() -> None:
    case, inputs, _ = question("exact")
    coarse = expect(case, inputs, Rounding(row="e4m3", out="bf16"))
    assert not coarse.exact
    assert "row" in (untrusted(case, coarse) or "")


def test_one_ulp_in_one_element_breaks_the_exact_lane() -> None:
    case, inputs, expected = question("exact")
    output = right_output(case, inputs)
    place = int(expected.value[7].abs().argmax())
    output[7, place] *= 1 + 2**-7
    comparison = compare(expected, output)
    assert comparison.beyond == 1
    assert (comparison.samples[0].token, comparison.samples[0].column) == (7, place)


def test_three_percent_in_one_expert_breaks_the_real_lane() -> None:
    """Percent rules at atol = rtol = 0.1 see nothing of it."""
    case, inputs, expected = question("real")
    output = right_output(case, inputs).double() + 0.03 * expected.contribution(2)
    assert not compare(expected, output.bfloat16()).agrees
    assert torch.allclose(output, expected.value, atol=0.1, rtol=0.1)


def test_an_ambiguous_row_is_not_judged() -> None:
    case, inputs, expected = question("real")
    output = right_output(case, inputs)
    output[3] = 17
    only_row_3 = torch.arange(case.shape.tokens) == 3
    assert not compare(expected, output).agrees
    assert compare(replace(expected, ambiguous=only_row_3), output).agrees


def test_the_limit_grows_with_the_number_of_elements() -> None:
    assert 4.8 < z_limit(1) < z_limit(10**4) < z_limit(10**8) < 8


def broken(kind: str, output: Tensor, expected: Expected) -> Tensor:
    """The output of a kernel with one planted defect."""
    wrong = output.clone()
    match kind:
        case "zeros":
            wrong[:] = 0
        case "gate_up_swap" | "stale":
            wrong = expected.impostors[kind].bfloat16()
        case "row_permutation":
            wrong[8:24] = output[8:24].flip(0)
        case "missing_expert":
            wrong = (output.double() - expected.contribution(4)).bfloat16()
        case "constant_factor":
            wrong *= 0.25
        case "tail_tile":
            wrong[48:] += 1
        case "non_finite":
            wrong[5, 17] = torch.nan
        case "unexplained":
            wrong[::5, ::3] *= -1
    return wrong


KINDS = (
    "zeros",
    "gate_up_swap",
    "stale",
    "row_permutation",
    "missing_expert",
    "constant_factor",
    "tail_tile",
    "non_finite",
    "unexplained",
)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_defect_is_named(kind: str, name: str) -> None:
    case, inputs, expected = question(name)
    wrong = broken(kind, right_output(case, inputs), expected)
    comparison = compare(expected, wrong)
    assert not comparison.agrees
    assert diagnose(expected, wrong, comparison).kind == kind


def test_a_diagnosis_names_what_is_missing() -> None:
    case, inputs, expected = question("real")
    wrong = broken("missing_expert", right_output(case, inputs), expected)
    assert "expert 4" in diagnose(expected, wrong, compare(expected, wrong)).text
    wrong = broken("tail_tile", right_output(case, inputs), expected)
    assert "(48..48)" in diagnose(expected, wrong, compare(expected, wrong)).text
    wrong = broken("constant_factor", right_output(case, inputs), expected)
    assert "2**-2" in diagnose(expected, wrong, compare(expected, wrong)).text


@pytest.mark.parametrize("errors", [1, 8, 100, 10_000])
def test_the_limit_of_the_mean_holds_for_few_errors_too(errors: int) -> None:
    """Five standard deviations would not: of eight squares one mean in 4000 lies beyond them."""
    generator = torch.Generator().manual_seed(errors)
    means = torch.randn(2 * 10**6 // errors, errors, generator=generator).square().mean(-1)
    assert float(means.max()) < mean_z2_limit(errors) < 1.06 + 7.5 / errors**0.5 + 28 / errors
    assert errors != 8 or float(means.max()) > 1.05 + 5 * (2 / errors) ** 0.5
