"""The trust guard: a case that a wrong kernel would pass is untrusted, whichever wrong kernel it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.case import Case
from harness.checks import untrusted
from harness.compare import compare, z_limit
from harness.impostors import at, passing, unseen_tiles
from harness.inputs import make_inputs
from harness.mistakes import guarding
from harness.oracle import MAX_SAMPLED, Expected, expect
from reference.rounding import Rounding

KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
ALWAYS = {"zeros", "dropped_slot", "stale", "dropped_hidden_tail", "dropped_inter_tail"}
SCALES = {"scale_roll_w13", "scale_roll_w2", "next_expert_scales"}
APPLICABLE = {
    "moe.bf16.t9.h96.i64.e5.k2.renormalize.swiglu.standard.real.s0": ALWAYS | {"gate_up_swap", "expert_permutation"},
    "moe.bf16.t9.h96.i64.e1.k1.renormalize.swiglu.standard.real.s0": ALWAYS | {"gate_up_swap"},
    "moe.bf16.t9.h96.i64.e5.k2.renormalize.relu.standard.real.s0": ALWAYS | {"expert_permutation"},
    "moe.nvfp4.t9.h96.i64.e5.k2.renormalize.swiglu.standard.real.s0": ALWAYS | SCALES | {"gate_up_swap", "expert_permutation"},
    "moe.mxfp4.t9.h96.i32.e1.k1.renormalize.relu.standard.real.s0": ALWAYS | {"scale_roll_w13"},
    "moe.fp8_tensor.t9.h96.i64.e5.k2.renormalize.relu.standard.real.s0": ALWAYS | {"expert_permutation", "next_expert_scales"},
}


def question(case_id: str) -> tuple[Case, Expected]:
    case = Case.parse(case_id)
    return case, expect(case, make_inputs(case), KERNEL)


@pytest.mark.parametrize("case_id", APPLICABLE)
def test_every_wrong_kernel_that_is_wrong_here_is_tried(case_id: str) -> None:
    case, expected = question(case_id)
    assert set(expected.impostors) == APPLICABLE[case_id]
    assert untrusted(case, expected) is None


@pytest.mark.parametrize("name", sorted(ALWAYS | SCALES | {"gate_up_swap", "expert_permutation"}))
def test_a_case_that_an_impostor_would_pass_is_untrusted(name: str) -> None:
    """The impostor's output is made right: the guard must say that this case cannot see it."""
    case, expected = question("moe.nvfp4.t9.h96.i64.e5.k2.renormalize.swiglu.standard.real.s0")
    right = expected.value[expected.sampled].bfloat16().double()
    blind = replace(expected, impostors={**expected.impostors, name: right})
    assert untrusted(case, blind) == f"impostors pass: {name}"


def test_an_impostor_is_the_kernel_it_says() -> None:
    """Impostors come out of the oracle's own pass; here they are computed one by one."""
    case, expected = question("moe.nvfp4.t9.h96.i64.e5.k2.renormalize.swiglu.standard.exact.s0")
    cheap = {name: mistake for name, mistake in guarding(case).items() if not mistake.dear}
    alone = expected.layer.study(expected.sampled, list(cheap.values()))
    for index, name in enumerate(cheap):
        torch.testing.assert_close(expected.impostors[name], expected.value + alone.deltas[index, None])
    dear = {name: mistake for name, mistake in guarding(case).items() if mistake.dear}
    few = (0, 2, 4)  # every other expert of five
    some = expected.layer.study(expected.sampled, list(dear.values()), few)
    for index, name in enumerate(dear):
        wrong = sum((some.deltas[index, expert] for expert in few), start=expected.value)
        torch.testing.assert_close(expected.impostors[name], wrong)


def test_large_cases_are_tried_at_a_tile_of_tokens() -> None:
    case, expected = question("moe.bf16.t300.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")
    assert len(expected.sampled) == MAX_SAMPLED
    assert all(wrong.shape == (MAX_SAMPLED, 64) for wrong in expected.impostors.values())
    there = at(expected, expected.sampled)
    assert (len(there.value), len(there.routing.ids)) == (MAX_SAMPLED, MAX_SAMPLED)
    assert torch.equal(there.independent, expected.independent[expected.sampled])
    assert untrusted(case, expected) is None


def test_a_faint_impostor_must_beat_the_limit_of_the_whole_case() -> None:
    """64 rows have a lower limit on z than 300: between the two the whole case would accept."""
    _, expected = question("moe.bf16.t300.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")
    wrong = expected.value[expected.sampled].clone()
    z = (z_limit(wrong.numel()) + z_limit(expected.value.numel())) / 2
    wrong[0, 0] += z * expected.sigma[expected.sampled][0, 0]
    assert not compare(at(expected, expected.sampled), wrong).agrees
    found = passing(replace(expected, impostors={"faint": wrong}, independent=torch.ones(300) / 300), torch.float64)
    assert found == ["faint"]


def flat(expected: Expected, rows: slice, columns: slice, value: float | Tensor) -> Expected:
    """The same with the value of a region replaced."""
    made = expected.value.clone()
    made[rows, columns] = value
    return replace(expected, value=made)


def test_a_tile_that_could_be_anything_is_named() -> None:
    _, expected = question("moe.bf16.t70.h192.i64.e4.k2.renormalize.swiglu.standard.real.s0")
    assert unseen_tiles(expected, torch.bfloat16) == []
    zero = flat(expected, slice(64, 70), slice(128, 192), 0.0)
    assert unseen_tiles(zero, torch.bfloat16) == ["wrong_tile (rows 64.., columns 128.. hold zeros)"]
    copy = flat(expected, slice(0, 64), slice(64, 128), expected.value[:64, :64])
    assert unseen_tiles(copy, torch.bfloat16) == ["wrong_tile (rows 0.., columns 64.. hold the tile beside it)"]


@pytest.mark.parametrize("hidden", [1, 2, 65])
def test_narrow_outputs_have_tiles_too(hidden: int) -> None:
    _, expected = question(f"moe.bf16.t5.h{hidden}.i64.e4.k2.renormalize.swiglu.standard.real.s0")
    assert unseen_tiles(expected, torch.bfloat16) == []
