"""Kernels that declare no roundings: right ones of many kinds agree, wrong ones do not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.backends.base import CPU, Backend, Launch
from harness.case import Case, Recipe
from harness.checks import untrusted
from harness.compare import compare
from harness.diagnose import diagnose
from harness.emulate import emulate
from harness.faults.layer import layer_of
from harness.faults.wrong_layers import wrong_outputs
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect
from harness.pipeline import run
from harness.ratio import STRIPE, Baseline, assumed_rounding, ratios
from harness.report.text import statistics
from harness.verdict import Status
from reference.grid import FLOATS
from reference.recipes import RECIPES
from reference.rounding import Rounding

EVERYWHERE = Rounding(
    routing_weight="bf16",
    gate_up="bf16",
    activated="bf16",
    middle="bf16",
    row="bf16",
    weighted="bf16",
    partial="bf16",
    out="bf16",
)
BF16 = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
KERNELS = {
    **{r.name: r.rounding for r in RECIPES.values() if all(s in FLOATS for p in vars(r.rounding) for s in r.rounding.steps(p))},
    "fp32_inside": Rounding(out="bf16"),
    "bf16_combine": replace(BF16, weighted="bf16", partial="bf16"),
    "everywhere": EVERYWHERE,
}
SHAPES = (
    *(f"bf16.t{t}.h256.i128.e8.k2.renormalize.swiglu" for t in (1, 2, 3, 17, 64, 65, 257)),
    "bf16.t1.h64.i32.e1.k1.renormalize.geglu",
    "nvfp4.t33.h192.i96.e16.k8.renormalize.relu",
    "mxfp4.t5.h96.i32.e32.k16.renormalize.situ",
    "fp16.t9.h320.i64.e4.k4.renormalize.swiglu_oai",
    "fp32.t9.h320.i64.e4.k4.renormalize.swiglu",
)
WRONG = ("zeros", "stale", "gate_up_swap", "dropped_slot", "expert_scale", "tile", "k_tail", "inter_tail", "one_nan")


@cache
def question(text: str) -> tuple[Inputs, Expected]:
    inputs = make_inputs(Case.parse(f"moe.{text}.standard.real.s3"))
    return inputs, expect(inputs.case, inputs, None)


def typed(rounding: Rounding, recipe: Recipe) -> Rounding:
    """The same rounding points in the recipe's own output type."""
    return Rounding(**{p: recipe.out if v == "bf16" else v for p, v in vars(rounding).items()})


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_kernel_of_any_kind_agrees(kernel: str, text: str) -> None:
    """Other roundings, shuffled and split K: no false alarm."""
    inputs, expected = question(text)
    comparison = compare(expected, emulate(inputs, typed(KERNELS[kernel], inputs.case.recipe), seed=len(kernel)))
    assert comparison.lane == "ratio"
    assert comparison.agrees
    assert comparison.worst < comparison.limit == 2


@pytest.mark.parametrize("text", [s for s in SHAPES if ".k16." not in s])
def test_the_case_can_tell(text: str) -> None:
    """But for a dropped sixteenth slot of a layer of 32 neurons: such a case is untrusted."""
    inputs, expected = question(text)
    assert untrusted(inputs.case, expected) is None


def broken(kind: str, inputs: Inputs, expected: Expected) -> Tensor:
    """The output of a kernel with one defect, everything else right."""
    output = emulate(inputs, BF16)
    cut = inputs.x.clone()
    match kind:
        case "expert_scale":
            busiest = int(inputs.topk_ids.flatten().mode().values)
            return (output.double() + 0.5 * expected.contribution(busiest)).bfloat16()
        case "tile":
            output[:64, 64:128] = output[:64, :64].clone()
        case "k_tail":
            cut[:, -16:] = 0
            return emulate(replace(inputs, x=cut), BF16)
        case "inter_tail":
            return (output.double() - tail_of_inter(inputs, expected)).bfloat16()
        case "one_nan":
            output[0, 3] = torch.nan
        case _:
            return wrong_outputs(layer_of(inputs.case, BF16, inputs), (kind,))[kind]
    return output


def tail_of_inter(inputs: Inputs, expected: Expected) -> Tensor:
    """What the last 16 neurons of every expert add to the output."""
    total = torch.zeros_like(expected.value)
    for e in inputs.topk_ids.unique().tolist():
        gate, up = inputs.gate_up(e)
        assert up is not None
        g, u, down = (q.codes.double() for q in (gate, up, inputs.down(e)))
        middle = torch.nn.functional.silu(inputs.x.double() @ g.T) * (inputs.x.double() @ u.T)
        weight = torch.where(inputs.topk_ids == e, inputs.topk_weights, 0.0).sum(-1)
        total += weight[:, None] * (middle[:, -16:] @ down[:, -16:].T)
    return total


@pytest.mark.parametrize("text", SHAPES[:7])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_does_not(kind: str, text: str) -> None:
    inputs, expected = question(text)
    wrong = broken(kind, inputs, expected)
    comparison = compare(expected, wrong)
    assert not comparison.agrees
    assert comparison.beyond > 0
    if kind in ("zeros", "stale", "gate_up_swap"):
        assert diagnose(expected, wrong, comparison).kind == kind


def test_a_wrong_tile_is_where_the_bad_elements_are() -> None:
    inputs, expected = question(SHAPES[6])
    samples = compare(expected, broken("tile", inputs, expected)).samples
    assert samples
    assert all(s.token < 64 and 64 <= s.column < 128 for s in samples)


def test_the_exact_fill_is_judged_bitwise() -> None:
    case = Case.parse("moe.bf16.t9.h192.i128.e6.k2.renormalize.swiglu.standard.exact.s1")
    inputs = make_inputs(case)
    expected = expect(case, inputs, None)
    output = emulate(inputs, EVERYWHERE, seed=4)
    assert expected.baseline is None
    assert compare(expected, output).agrees
    assert compare(expected, output).lane == "exact"
    output[0, int(expected.value[0].abs().argmax())] *= 1 + 2**-7
    assert compare(expected, output).beyond == 1


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.PASSED), (1.5, Status.WRONG)])
def test_a_backend_may_declare_nothing(factor: float, status: Status) -> None:
    def prepare(case: Case, inputs: Inputs) -> Launch:
        output = emulate(inputs, EVERYWHERE) * factor
        return Launch(lambda: output)

    silent = Backend("silent", "torch", True, ("bf16",), ("swiglu",), prepare, lambda case: None)
    verdict = run(question(SHAPES[3])[0].case, silent, CPU)
    assert verdict.status is status
    assert verdict.comparison is not None
    assert "worst tile errs" in statistics(verdict.comparison)


def test_the_assumed_recipe_follows_the_formats() -> None:
    assert assumed_rounding(Recipe.parse("bf16")) == BF16
    assert assumed_rounding(Recipe.parse("nvfp4-fp16")) == Rounding(gate_up="fp16", middle="fp16", row="fp16", out="fp16")
    assert assumed_rounding(Recipe.parse("nvfp4-nvfp4")) == replace(BF16, middle="bf16>nvfp4")
    assert assumed_rounding(Recipe.parse("nvfp4-bf16-fp8_group")) == replace(BF16, middle="bf16>fp8_group")


def test_a_kernel_that_declares_nothing_may_quantise_what_a_library_does() -> None:
    """TensorRT-LLM's DeepSeek path quantises GEMM 1's output; held against an emulation that does not, it was refused."""
    assert assumed_rounding(Recipe.parse("fp8_block-fp8_group")) == replace(BF16, gate_up="fp8_group", middle="bf16>fp8_group")
    inputs, expected = question("nvfp4_4over6-fp8_group.t9.h256.i128.e2.k1.sigmoid_renorm.clamped_relu2")
    right = emulate(inputs, RECIPES["flashinfer_trtllm_deepseek_fp8"].rounding, seed=141)
    assert compare(expected, right).agrees
    assert compare(expected, emulate(inputs, BF16)).agrees
    assert not compare(expected, right * 1.25).agrees


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.rounding.steps("middle")[-1] == "nvfp4"])
def test_a_quantised_middle_is_part_of_the_baseline(name: str) -> None:
    """In the plain recipe's lane such a kernel is wrong; in that of its own recipe it is right."""
    inputs, plain = question(SHAPES[5])
    rounding = replace(RECIPES[name].rounding, x=None)
    output = emulate(inputs, rounding)
    assert not compare(plain, output).agrees
    quantised = replace(inputs.case, recipe=Recipe.parse("bf16-bf16-nvfp4"))
    assert compare(expect(quantised, inputs, None), output).agrees


def flat(tokens: int, hidden: int, neurons: float) -> tuple[Baseline, Tensor, Tensor, Tensor]:
    """A baseline that errs by exactly one sigma everywhere, with its value, sigma and routing."""
    value = torch.zeros(tokens, hidden, dtype=torch.float64)
    ids = torch.arange(tokens)[:, None] % 2
    return Baseline(value + 1, torch.zeros_like(value), neurons), value, torch.ones_like(value), ids


def test_a_ratio_is_the_error_less_the_floor() -> None:
    """4 rows of 128 columns, 64 neurons: 1 / (1/64 + 1/128) errors a row, 2 log(8 / 1e-6) of luck: 4 + 2 + 2 tiles."""
    baseline, value, sigma, ids = flat(4, 128, 64.0)
    got = value.clone()
    got[2] = 4.0
    result = ratios(baseline, value, sigma, got, ids)
    luck = (2 * torch.tensor(8e6, dtype=torch.float64).log() * (1 / 64 + 1 / 128)) ** 0.5
    torch.testing.assert_close(result.rows.double(), torch.tensor([0.0, 0.0, 4.0, 0.0]).double() - luck, rtol=1e-6, atol=0)
    stripe = (2 * torch.tensor(8e6).log() * (2 / 64) / 4) ** 0.5
    torch.testing.assert_close(result.stripes.float(), torch.full((2,), 2.0) - stripe, rtol=1e-6, atol=0)
    assert result.experts[0] > result.experts[1]
    assert torch.equal(result.failing(128).any(-1), torch.tensor([True, False, True, False]))


def test_the_floor_grants_the_roundings_of_the_combination_in_quadrature() -> None:
    baseline, value, sigma, ids = flat(64, 4096, 1e9)
    free = replace(baseline, freedom=torch.full_like(value, 3.0))
    at = {name: float(ratios(b, value, sigma, value + 2.5, ids).rows[0]) for name, b in (("own", baseline), ("free", free))}
    assert at["own"] - at["free"] == pytest.approx(7**0.5 - 2, rel=1e-5)


def test_the_baseline_is_not_asked_to_be_better_than_its_sigma() -> None:
    """An emulation that happens to be exact would forbid every error."""
    baseline, value, sigma, ids = flat(64, 4096, 1e9)
    perfect = replace(baseline, output=value)
    assert ratios(perfect, value, sigma, value + 1.5, ids).worst < 2
    assert ratios(replace(baseline, output=value + 3), value, sigma, value + 5.5, ids).worst < 2
    assert ratios(perfect, value, sigma, value + 2.5, ids).worst > 2


def test_a_narrow_last_stripe_is_a_tile_of_its_own() -> None:
    baseline, value, sigma, ids = flat(512, 2 * STRIPE + 2, 1e9)
    got = value.clone()
    got[:, -1] = 6.0
    result = ratios(baseline, value, sigma, got, ids)
    assert result.stripes.shape == (3,)
    assert torch.equal(result.failing(2 * STRIPE + 2)[0].nonzero().flatten(), torch.tensor([2 * STRIPE, 2 * STRIPE + 1]))
