"""Every declared recipe: the layer runs as it says, and errs as its derived sigma says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.case import Case
from harness.inputs import make_inputs
from harness.oracle import expect, layer_experts
from reference.formats import all_formats
from reference.grid import FLOATS
from reference.moe import moe
from reference.recipes import RECIPES
from reference.rounding import IDEAL, Rounding

CASE = "moe.bf16.t48.h256.i256.e4.k2.renormalize.swiglu.standard.real.s2"
each = pytest.mark.parametrize("name", RECIPES)


def mean_z2(rounding: Rounding) -> float:
    """Mean of z**2 of a kernel that rounds exactly as declared; its input is already on the grid of x."""
    case = Case.parse(CASE)
    inputs = make_inputs(case)
    inputs = replace(inputs, x=rounding.at("x", inputs.x.double()).float())
    later = replace(rounding, x=None)
    expected = expect(case, inputs, later)
    got = moe(inputs.x, inputs.routing, layer_experts(inputs), later)
    return float(((got - expected.value) / expected.sigma).square().mean())


@each
def test_every_point_names_a_grid_or_a_format(name: str) -> None:
    rounding = RECIPES[name].rounding
    for point in POINTS:
        assert all(step in FLOATS or step in all_formats() for step in rounding.steps(point))
    assert RECIPES[name].source


@each
def test_a_kernel_with_exactly_these_roundings_errs_as_derived(name: str) -> None:
    """Two-sided: a lost rounding point would lower it, a doubled one raise it."""
    assert 0.9 < mean_z2(RECIPES[name].rounding) < 1.1


@pytest.mark.parametrize("point", ["gate_up", "middle", "row", "weighted", "partial", "out"])
def test_an_undeclared_rounding_shows_in_the_mean(point: str) -> None:
    """The kernel rounds once more than it says (E4M3 instead of nothing): the mean of z**2 leaves 1."""
    case = Case.parse(CASE)
    inputs = make_inputs(case)
    declared = RECIPES["flashinfer_trtllm_bf16"].rounding
    actual = replace(declared, **{point: "e4m3"})
    expected = expect(case, inputs, declared)
    got = moe(inputs.x, inputs.routing, layer_experts(inputs), actual)
    assert float(((got - expected.value) / expected.sigma).square().mean()) > 2


def test_a_format_at_a_point_quantises_and_reads_back() -> None:
    value = torch.tensor([[0.1 * i for i in range(-16, 16)]], dtype=torch.float64).bfloat16().double()
    fmt = all_formats()["mxfp4"]
    assert torch.equal(Rounding(middle="mxfp4").at("middle", value), fmt.decode(fmt.encode(value)))
    chained = Rounding(middle="bf16>mxfp4").at("middle", value * 1.001)
    assert torch.equal(chained, fmt.decode(fmt.encode((value * 1.001).bfloat16().double())))


def test_the_ideal_layer_rounds_nowhere() -> None:
    value = torch.rand(3, 32, dtype=torch.float64)
    assert all(torch.equal(IDEAL.at(point, value), value) for point in POINTS)


POINTS = ("x", "routing_weight", "gate_up", "activated", "middle", "row", "weighted", "partial", "out")
B, N, F, T, G = "bf16", "bf16>nvfp4", "fp8_tensor", "fp8_token", "fp8_group"
TABLE = {  # typed from the fact sheet's table, a column a point, - for no rounding; row, weighted, partial, out from section 6
    "flashinfer_cutlass_bf16": f"- - {B} - {B} {B} - - {B}",
    "flashinfer_cutlass_nvfp4": f"nvfp4 - {B} - {N} {B} - - {B}",
    "flashinfer_cutlass_mxfp8": f"mxfp8 - {B} - bf16>mxfp8 {B} - - {B}",
    "flashinfer_cutlass_fp8": f"{F} - {B} - {F} {B} - - {B}",
    "flashinfer_cutlass_mxfp4_bf16": f"- - {B} - {B} {B} - - {B}",
    "flashinfer_trtllm_fp4": f"nvfp4 {B} - - {N} {B} - - {B}",
    "flashinfer_trtllm_mxfp4_mxfp8": f"mxfp8 {B} - - mxfp8 {B} - - {B}",
    "flashinfer_trtllm_bf16": f"- {B} - - {B} {B} - - {B}",
    "flashinfer_trtllm_nvfp4_per_token": f"nvfp4_token {B} {B} - nvfp4_token {B} - - {B}",
    "flashinfer_trtllm_fp8_per_channel": f"{T} {B} {B} - {T} {B} - - {B}",
    "flashinfer_trtllm_deepseek_fp8": f"{G} {B} {G} - {G} {B} - - {B}",
    "flashinfer_act_and_quantize": f"- - {B} - {N} {B} - - {B}",
    "flashinfer_cute_dsl_nvfp4": f"nvfp4 - - - {N} {B} - - {B}",
    "flashinfer_b12x_mxfp4": f"mxfp4 - - - mxfp4 {B} - - {B}",
    "vllm_triton_bf16": f"- - {B} {B} {B} - {B} {B} {B}",
    "triton_kernels_bf16": f"- - - - {B} {B} - - {B}",
    "torch_eager_bf16": f"- - {B} - {B} {B} - - {B}",
}


def test_the_recipes_are_those_of_the_table() -> None:
    """A wrong format at a point errs consistently with its own sigma, so only a second copy of the table can tell."""
    got = {name: " ".join(getattr(recipe.rounding, point) or "-" for point in POINTS) for name, recipe in RECIPES.items()}
    assert got == TABLE
