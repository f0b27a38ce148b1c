"""Wrong layers: each is what it says it is, differs where it should, and is refused by moecheck's own lanes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from harness.case import Case
from harness.compare import compare
from harness.faults import wrong_layers
from harness.faults.audit import Subject, subject_of
from harness.faults.wrong_layers import WRONG_LAYERS, wrong_outputs
from reference.format import Quantized
from reference.formats import get
from reference.rounding import Rounding

KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
IDS = {
    "real": "moe.bf16.t70.h160.i96.e6.k2.renormalize.swiglu.standard.real.s1",
    "exact": "moe.bf16.t70.h160.i96.e6.k2.renormalize.swiglu.standard.exact.s1",
    "nvfp4": "moe.nvfp4.t70.h160.i96.e6.k2.renormalize.swiglu.standard.real.s1",
}
BLIND_IN_EXACT = {"bf16_accumulation", "relu_for_activation", "not_renormalised"}  # the exact fill makes them no defects


@cache
def subject(name: str) -> Subject:
    return subject_of(Case.parse(IDS[name]), KERNEL)


@cache
def outputs(name: str) -> dict[str, torch.Tensor]:
    return wrong_outputs(subject(name).layer)


def moved(name: str, wrong: str) -> torch.Tensor:
    """bool [tokens, hidden]: where the wrong output differs from the right one."""
    return outputs(name)[wrong] != subject(name).layer.right


def off(value: torch.Tensor, name: str, wrong: str) -> float:
    """How far the wrong output is from this float64 value, relative to it; its roundings are 0.4 %."""
    return float((outputs(name)[wrong].double() - value).norm() / value.norm())


@pytest.mark.parametrize("name", IDS)
def test_moecheck_refuses_them_all_and_accepts_the_right_one(name: str) -> None:
    expected = subject(name).expected
    assert compare(expected, subject(name).layer.right).agrees
    assert not [wrong for wrong, got in outputs(name).items() if compare(expected, got).agrees]


def test_which_occur() -> None:
    everything = {wrong.name for wrong in WRONG_LAYERS}
    assert outputs("nvfp4").keys() == everything
    assert outputs("real").keys() == everything - {"scale_roll"}
    assert outputs("exact").keys() == everything - {"scale_roll"} - BLIND_IN_EXACT
    lonely = subject_of(Case.parse("moe.bf16.t1.h64.i32.e1.k1.default.relu.standard.real.s0"), KERNEL)
    absent = everything - wrong_outputs(lonely.layer).keys()
    assert absent == {"gate_up_swap", "expert_permutation", "scale_roll", "relu_for_activation", "not_renormalised"}


def test_they_are_in_the_kernels_dtype_and_finite() -> None:
    for got in outputs("real").values():
        assert got.dtype == torch.bfloat16
        assert got.isfinite().all()


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("wrong", ["stale", "gate_up_swap", "dropped_slot"])
def test_they_agree_with_the_oracles_impostors(name: str, wrong: str) -> None:
    expected = subject(name).expected
    value = expected.impostors[wrong]
    assert float((outputs(name)[wrong][expected.sampled].double() - value).norm() / value.norm()) < 0.008


@pytest.mark.parametrize(("wrong", "factor"), [("dropped_expert", -1.0), ("expert_x1.03", 0.03), ("expert_x2", 1.0)])
def test_one_expert_off_is_a_multiple_of_its_contribution(wrong: str, factor: float) -> None:
    expected, layer = subject("real").expected, subject("real").layer
    assert off(expected.value + factor * expected.contribution(layer.chosen), "real", wrong) < 0.008
    hit = (layer.routing.ids == layer.chosen).any(-1)
    assert torch.equal(moved("real", wrong).any(-1), hit)


def test_places() -> None:
    tile = torch.zeros(70, 160, dtype=torch.bool)
    tile[64:, 128:] = True
    assert not (moved("real", "wrong_tile") & ~tile).any()
    assert moved("real", "wrong_tile")[tile].double().mean() > 0.9
    assert moved("real", "wrong_row").any(-1).sum() == 1
    assert moved("real", "tail_garbage").any(0).nonzero().flatten().tolist() == list(range(152, 160))


def test_a_tile_without_neighbour_and_a_lone_row_are_zeros() -> None:
    lonely = subject_of(Case.parse("moe.bf16.t1.h64.i32.e1.k1.default.swiglu.standard.real.s0"), KERNEL).layer
    assert not wrong_layers.wrong_tile(lonely).any()
    assert not wrong_layers.wrong_row(lonely).any()


def test_next_experts_weights_keep_what_next_but_one_would_change() -> None:
    """With two experts and both chosen, equal routing weights make the permutation invisible: not a wrong layer there."""
    case = Case.parse("moe.bf16.t5.h64.i32.e2.k2.renormalize.swiglu.standard.exact.s0")
    assert "expert_permutation" not in wrong_outputs(subject_of(case, KERNEL).layer)


def test_rolled_scales_by_hand() -> None:
    """MXFP4, 64 columns, two blocks of scale 1 and 2 (codes 127, 128), all codes 1.0 (code 2): the scales change places."""
    fmt = get("mxfp4")
    q = Quantized(fmt, torch.full((1, 64), 2, dtype=torch.uint8), torch.tensor([[127, 128]], dtype=torch.uint8))
    assert fmt.decode(q)[0, [0, 63]].tolist() == [1.0, 2.0]
    assert wrong_layers._decode_rolled(q, q)[0, [0, 63]].tolist() == [2.0, 1.0]


def test_a_bf16_sum_stalls() -> None:
    """1 + 300 * 2**-9: each term is a quarter of bf16's spacing at 1, so the sum never moves; in fp32 it is 1.586."""
    terms = torch.cat((torch.ones(1, 1), torch.full((1, 300), 2.0**-9)), dim=1).double()
    assert wrong_layers._stepwise(terms, torch.ones(1, 301).double()).item() == 1.0


def test_unnormalised_weights_are_the_softmax_over_all() -> None:
    layer = subject("real").layer
    assert layer.unnormalised is not None
    ratio = layer.unnormalised / layer.routing.weights
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    assert (ratio < 1).all()
    default = subject_of(Case.parse(IDS["real"].replace("renormalize", "default")), KERNEL).layer
    assert default.unnormalised is None


def test_the_eager_baseline_rounds_everywhere_but_keeps_a_quantised_middle() -> None:
    """Coarser than the declared kernel, which rounds four times; a format at a point is not a rounding to be replaced."""
    subject_ = subject("real")
    off_by = [(got.double() - subject_.expected.value).norm() for got in (subject_.layer.right, subject_.layer.eager)]
    assert off_by[0] < off_by[1] < 3 * off_by[0]
    quantised = replace(subject_.layer, rounding=replace(subject_.layer.rounding, middle="mxfp4"))
    assert (quantised.eager.double() - subject_.expected.value).norm() > 10 * off_by[1]
