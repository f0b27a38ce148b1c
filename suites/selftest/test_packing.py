"""Stacks of weights as libraries take them: one factor for both halves without a rounding, rows in the asked order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.backends._packing import factor, joint, pack
from harness.case import Case
from harness.inputs import make_inputs

RECIPES = ("nvfp4", "nvfp4_4over6", "fp8_tensor")


@pytest.mark.parametrize("fill", ["real", "exact"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_halves_get_one_factor_without_a_rounding(recipe: str, fill: str) -> None:
    inputs = make_inputs(Case.parse(f"moe.{recipe}.t2.h64.i32.e16.k2.renormalize.swiglu.standard.{fill}.s3"))
    different = 0
    for expert in range(16):
        halves = [q for q in inputs.gate_up(expert) if q is not None]
        common = joint(halves)
        assert factor(common[0]) == factor(common[1])
        different += int(factor(halves[0]) != factor(halves[1]))
        for before, after in zip(halves, common, strict=True):
            assert torch.equal(before.format.decode(before), after.format.decode(after))
    assert different >= 3, "a library that takes the gate's factor for both halves must be seen"


def test_factors_without_a_common_form_are_refused() -> None:
    inputs = make_inputs(Case.parse("moe.nvfp4.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"))
    gate, up = inputs.gate_up(0)
    assert up is not None
    assert up.global_scale is not None
    with pytest.raises(ValueError, match="no common form"):
        joint([gate, replace(up, global_scale=up.global_scale * 1.1)])


def test_up_first_swaps_the_halves_with_their_scales_and_factors() -> None:
    case = Case.parse("moe.nvfp4.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")
    inputs = make_inputs(case)
    plain, swapped = pack(case, inputs)[0], pack(case, inputs, up_first=True)[0]
    for name, tensor in plain.buffers("w13").items():
        other = swapped.buffers("w13")[name]
        assert torch.equal(tensor, other.roll(other.shape[1] // 2, 1)), name
