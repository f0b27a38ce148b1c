"""Quantised activations: fixed points of the quantiser, judged in both fills with emulated kernels."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from harness.anchors import Products
from harness.case import Case, Recipe
from harness.checks import untrusted
from harness.compare import compare
from harness.fills import peak, significant_bits
from harness.inputs import Inputs, make_inputs
from harness.oracle import expect, handed, layer_experts
from harness.verdict import Comparison
from reference.format import Format
from reference.formats import all_formats, get
from reference.moe import moe, passes
from reference.recipes import RECIPES
from reference.rounding import Rounding, requantized

RECIPE_TEXTS = (
    "nvfp4-nvfp4",
    "nvfp4-nvfp4_token",
    "nvfp4-bf16-nvfp4",
    "mxfp4-mxfp4",
    "mxfp4-mxfp8",
    "mxfp4-mxfp8-mxfp8-fp16",
    "mxfp8_e5m2-mxfp8_e5m2",
    "mxint4-mxint4",
    "fp8_tensor-fp8_tensor",
    "fp8_channel-fp8_token",
    "fp8_block-fp8_group",
    "fp8_fnuz_channel-fp8_fnuz_tensor",
    "int8_channel-int8_token",
    "int4_g128-fp8_tensor",
)
LIBRARY = {  # a recipe each library's rounding points go with
    "flashinfer_cutlass_nvfp4": "nvfp4-nvfp4",
    "flashinfer_cutlass_mxfp8": "mxfp4-mxfp8",
    "flashinfer_cutlass_fp8": "fp8_tensor-fp8_tensor",
    "flashinfer_trtllm_fp4": "nvfp4-nvfp4",
    "flashinfer_trtllm_mxfp4_mxfp8": "mxfp4-mxfp8",
    "flashinfer_trtllm_nvfp4_per_token": "nvfp4-nvfp4_token",
    "flashinfer_trtllm_fp8_per_channel": "fp8_channel-fp8_token",
    "flashinfer_trtllm_deepseek_fp8": "fp8_block-fp8_group",
    "flashinfer_act_and_quantize": "nvfp4-bf16-nvfp4",
    "flashinfer_cute_dsl_nvfp4": "nvfp4-nvfp4",
    "flashinfer_b12x_mxfp4": "mxfp4-mxfp4",
}
ACTS = [
    f.name for f in all_formats().values() if f.scaling and f.scaling.group[0] != 128 and not f.scaling.zero_points
]  # a row of 256 holds whole groups of them all
each_recipe = pytest.mark.parametrize("recipe", RECIPE_TEXTS)
each_fill = pytest.mark.parametrize("fill", ["real", "exact"])


@cache
def inputs_of(text: str) -> Inputs:
    return make_inputs(Case.parse(text))


def acts(name: str, fill: str, out: str = "bf16") -> tuple[Format, Inputs]:
    recipe = Recipe.parse(f"bf16-{name}-{out}-{out}")
    return get(name), inputs_of(f"moe.{recipe}.t9.h256.i128.e4.k2.renormalize.swiglu.standard.{fill}.s1")


def declared(recipe: Recipe) -> Rounding:
    """A kernel that quantises both inputs and rounds everything else to its output type."""
    out = recipe.out
    middle = recipe.middle if get(recipe.middle).scaling is None else f"{out}>{recipe.middle}"
    return Rounding(recipe.acts if get(recipe.acts).scaling else None, None, out, None, middle, out, out=out)


def judged(case: Case, rounding: Rounding) -> tuple[str | None, Comparison, float]:
    """(why untrusted, verdict, independent errors) of a kernel with exactly these rounding points."""
    inputs = make_inputs(case)
    expected = expect(case, inputs, rounding)
    kernel = moe(inputs.x, inputs.routing, layer_experts(inputs), handed(rounding, inputs))
    return (
        untrusted(case, expected),
        compare(expected, kernel.to(get(case.recipe.out).torch_dtype)),
        float(expected.independent.sum()),
    )


def least(recipe: Recipe) -> tuple[int, int]:
    """(hidden, inter) of one scale group each."""
    groups = [f.scaling.group[1] if f.scaling else 0 for f in (get(recipe.acts), get(recipe.middle))]
    return groups[0] or 16, groups[1] or 16


@pytest.mark.parametrize("out", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ACTS)
@each_fill
def test_x_is_its_own_quantisation(name: str, fill: str, out: str) -> None:
    fmt, inputs = acts(name, fill, out)
    quantised = inputs.x_quantized
    assert quantised is not None
    value = fmt.decode(quantised)
    assert inputs.x.dtype == get(out).torch_dtype
    assert torch.equal(value, inputs.x.double())
    again = fmt.encode(value.float(), quantised.global_scale)
    assert torch.equal(again.codes, quantised.codes)
    assert torch.equal(again.scales, quantised.scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ACTS)
@each_fill
def test_every_scale_group_reaches_its_peak(name: str, fill: str) -> None:
    """Otherwise a dynamic quantiser would choose another scale."""
    fmt, inputs = acts(name, fill)
    assert inputs.x_quantized is not None
    codes = fmt.element.decode(inputs.x_quantized.codes).abs()
    assert (codes.unflatten(1, (-1, fmt.scaling.group[1] or 256)).amax(-1) == peak(fmt)).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [n for n in ACTS if get(n).scaling.static])  # type: ignore[union-attr]
@each_fill
def test_a_static_scale_is_a_power_of_two_and_what_a_fit_would_give(name: str, fill: str) -> None:
    fmt, inputs = acts(name, fill)
    assert math.frexp(inputs.x_scale or 0)[0] == 0.5
    assert torch.equal(requantized(fmt, inputs.x.double()), inputs.x.double())
    assert torch.equal(requantized(fmt, inputs.x.double(), inputs.x_scale), inputs.x.double())


@pytest.mark.parametrize("name", ACTS)
def test_real_acts_are_dense_and_of_magnitude_one(name: str) -> None:
    _, inputs = acts(name, "real")
    assert 0.7 < float(inputs.x.double().square().mean().sqrt()) < 1.5
    assert float((inputs.x == 0).double().mean()) < 0.2
    assert abs(float(inputs.x.double().mean())) < 0.15


@pytest.mark.parametrize("name", [n for n in ACTS if get(n).scaling.static])  # type: ignore[union-attr]
def test_the_middle_neither_saturates_nor_underflows(name: str) -> None:
    case = Case.parse(f"moe.bf16-bf16-{name}.t65.h256.i256.e4.k2.renormalize.swiglu.standard.real.s1")
    inputs = make_inputs(case)
    fmt, scale = get(name), inputs.middle_scale
    assert scale is not None
    middle = torch.cat([done.middle for _, _, done, _ in passes(inputs.x, inputs.routing, layer_experts(inputs))])
    room = fmt.scaling.global_range if fmt.scaling.global_scale else fmt.element.max  # type: ignore[union-attr]
    assert float(middle.abs().max()) < room / scale
    handed_over, fitted = (float((requantized(fmt, middle, s) - middle).square().mean()) for s in (scale, None))
    assert handed_over < 16 * fitted  # room for larger peaks costs an integer grid two bits, a floating one next to nothing
    assert (inputs.middle_global_scale is None) == (not fmt.scaling.global_scale)  # type: ignore[union-attr]


@each_recipe
def test_predicted_variance_is_the_measured_one(recipe: str) -> None:
    """Mean z**2 over shapes, weighted by how much each tells; and no alarm anywhere, one token included."""
    parsed = Recipe.parse(recipe)
    hidden, inter = least(parsed)
    total = weight = 0.0
    for shape in (f"t1.h{hidden}.i{inter * 3}", f"t33.h{hidden * 3}.i{inter}", "t33.h256.i128"):
        for seed in (0, 1) if "h256" not in shape else (0,):
            case = Case.parse(f"moe.{parsed}.{shape}.e4.k2.renormalize.swiglu.standard.real.s{seed}")
            reason, comparison, independent = judged(case, declared(parsed))
            assert reason is None or (shape.startswith("t1.") and "impostors" in reason)  # 4-bit noise in few outputs
            assert comparison.agrees
            total, weight = total + independent * comparison.mean_z2, weight + independent
    assert 0.9 < total / weight < 1.06


@each_recipe
def test_the_exact_fill_is_exact(recipe: str) -> None:
    """Bitwise, down to one scale group, gated or not, whatever the seed."""
    parsed = Recipe.parse(recipe)
    hidden, inter = least(parsed)
    for shape, routing in (
        (f"t1.h{hidden}.i{inter}.e1.k1", "renormalize"),
        (f"t5.h{hidden * 3}.i{inter * 5}.e3.k2", "default"),
        ("t9.h256.i128.e16.k8", "deepseek_v3"),
    ):
        for activation, seed in (("swiglu", 0), ("relu", 1)) if "e16" not in shape else (("swiglu", 2),):
            case = Case.parse(f"moe.{parsed}.{shape}.{routing}.{activation}.standard.exact.s{seed}")
            reason, comparison, _ = judged(case, declared(parsed))
            assert reason is None, case.id
            assert (comparison.lane, comparison.beyond) == ("exact", 0)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_libraries_rounding_points_are_judged(name: str) -> None:
    """Also those that quantise the output of GEMM 1."""
    for fill in ("real", "exact"):
        case = Case.parse(f"moe.{LIBRARY[name]}.t17.h256.i128.e4.k2.renormalize.swiglu.standard.{fill}.s0")
        reason, comparison, _ = judged(case, RECIPES[name].rounding)
        assert reason is None
        assert comparison.agrees


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_the_exact_fill_is_exact_by_every_rule_of_a_format(name: str) -> None:
    """One library's choice of a scale is as right as another's; but CEIL's, a binade too large, leaves E2M1 too few steps."""
    recipe = Recipe.parse(f"mxfp8-{name}")
    for rule in (r for r in get(name).rules() if r.name != "mxfp4:torchao_ceil"):
        rounding = Rounding(x=rule.name, gate_up="bf16", middle=rule.name, row="bf16", out="bf16")
        case = Case.parse(f"moe.{recipe}.t5.h64.i96.e4.k2.renormalize.swiglu.standard.exact.s0")
        reason, comparison, _ = judged(case, rounding)
        assert reason is None, rule.name
        assert comparison.agrees


def test_a_middle_off_the_grid_is_untrusted() -> None:
    """The guard: without it the exact lane would be an alarm for right kernels."""
    case = Case.parse("moe.nvfp4.t33.h256.i128.e4.k2.renormalize.swiglu.standard.exact.s0")
    reason, _, _ = judged(case, Rounding(middle="nvfp4", out="bf16"))
    assert reason == "the exact fill is not exact here: rounding changes middle"
    reason, _, _ = judged(case, Rounding(x="int4_channel", out="bf16"))
    assert "rounding changes x" in str(reason)


@pytest.mark.parametrize("weights", [f.name for f in all_formats().values()])
def test_anchors_are_stored_exactly(weights: str) -> None:
    """Whatever shares a scale with them: 28 and 1 in a block of int4."""
    for middle in ("nvfp4", "mxfp8", "mxfp8_e5m2", "fp8_tensor", "fp8_fnuz_tensor", "int8_token", "mxint4"):
        recipe = Recipe.parse(f"{weights}-bf16-{middle}-bf16")
        case = Case.parse("moe.bf16.t1.h256.i128.e2.k1.renormalize.swiglu.standard.exact.s0").vary(recipe=str(recipe))
        if case.problem() is not None:
            assert "add up to" in str(case.problem())
            continue
        gate, up = make_inputs(case).gate_up(1)
        products = Products.of(weights, middle, gated=True, scaled=False)
        allowed = {part << lift for part in products.parts for lift in range(products.most_lift + 1)}
        assert up is not None
        assert set((get(weights).decode(gate) / 32).unique().tolist()) <= {0, 1} | allowed
        assert set(get(weights).decode(up).unique().tolist()) <= {-1, 0, 1} | set(products.parts)
        assert float(get(weights).decode(gate).max()) in {32 * part for part in allowed}


def test_significant_bits_of_grids() -> None:
    assert [significant_bits(get(n).element) for n in ("nvfp4", "fp8_token", "int8_token", "bf16")] == [2, 4, 7, 8]
