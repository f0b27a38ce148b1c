"""What is drawn, decoded and passed for several experts at once is what one expert at a time gives."""

from __future__ import annotations

import pytest
import torch

from harness import batched, fills
from harness import inputs as inputs_module
from harness.case import Case
from harness.hashing import Stream, Streams
from harness.inputs import make_inputs
from harness.mistakes import guarding
from harness.oracle import Expected, expect
from harness.whatif import Layer, experts_of
from reference.format import WHOLE, Format
from reference.formats import all_formats, get
from reference.rounding import Rounding

DECLARED = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
SCALED = [  # what weights are drawn in: no global scale per row
    name for name, fmt in all_formats().items() if fmt.scaling is not None and fmt.scaling.global_group[0] == WHOLE
]
CASES = (
    "moe.bf16.t9.h64.i32.e6.k3.kimi_k2.swiglu.standard.real.hot.bias.s0",
    "moe.nvfp4.t9.h64.i48.e6.k2.renormalize.swiglu.standard.real.s0",
    "moe.fp8_block.t70.h128.i96.e5.k2.renormalize.geglu.standard.real.s1",
    "moe.bf16.t70.h64.i32.e7.k2.renormalize.swiglu.standard.real.half.oninput.s0",
    "moe.mxfp4.t9.h64.i32.e6.k2.renormalize.swiglu.standard.exact.bias.s0",
)


def drawn(fmt: Format, shape: tuple[int, int]) -> list[fills.Quantized]:
    own = Streams(3, ("a", "b", "c"))
    return fills.real_all(fmt, shape, own, 1.0, own)


@pytest.mark.parametrize("rows", [128, 40])
@pytest.mark.parametrize("name", SCALED)
def test_matrices_decoded_together_are_those_decoded_alone(name: str, rows: int) -> None:
    fmt = get(name)
    matrices = drawn(fmt, (rows, 96))
    assert torch.equal(fmt.decode_all(matrices), torch.stack([fmt.decode(q) for q in matrices]))


@pytest.mark.parametrize("name", SCALED)
def test_a_matrix_drawn_with_others_is_the_one_drawn_alone(name: str) -> None:
    fmt = get(name)
    for stream, together in zip("abc", drawn(fmt, (40, 96)), strict=True):
        alone = fills.real(fmt, (40, 96), Stream(3, stream), 1.0)
        for part in ("codes", "scales", "global_scale", "zeros"):
            one, other = getattr(alone, part), getattr(together, part)
            assert (one is None) == (other is None)
            assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), part


def expected(case_id: str, monkeypatch: pytest.MonkeyPatch, most: int) -> Expected:
    """With at most `most` weights drawn and passed at once."""
    monkeypatch.setitem(batched.WEIGHTS, "cpu", most)
    monkeypatch.setitem(inputs_module.TOGETHER, "cpu", most)
    case = Case.parse(case_id)
    return expect(case, make_inputs(case), DECLARED)


@pytest.mark.parametrize("case_id", CASES)
def test_experts_passed_together_expect_what_they_expect_alone(case_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = expected(case_id, monkeypatch, 1), expected(case_id, monkeypatch, 1 << 24)
    assert alone.exact == together.exact
    assert alone.impostors.keys() == together.impostors.keys()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(alone.value, together.value, **close)
    torch.testing.assert_close(alone.sigma, together.sigma, rtol=1e-6, atol=0.0)  # float32 inside
    for name, wrong in alone.impostors.items():
        torch.testing.assert_close(wrong, together.impostors[name], **close, msg=name)


@pytest.mark.parametrize("case_id", CASES)
def test_mistakes_made_in_several_experts_at_once_are_those_of_a_study(case_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The diagnosis asks the same mistakes one expert after another."""
    case, found = Case.parse(case_id), expected(case_id, monkeypatch, 1 << 24)
    cheap = {name: mistake for name, mistake in guarding(case).items() if not mistake.dear}
    study = Layer(case, "cpu").study(found.sampled, list(cheap.values()))
    assert len(cheap) >= 3
    for i, name in enumerate(cheap):
        delta = found.impostors[name] - found.value[found.sampled]
        torch.testing.assert_close(delta, study.deltas[i, None], rtol=1e-9, atol=1e-9, msg=name)
        assert float(delta.abs().max()) > 0, f"{name} changes nothing here"


def test_padding_is_no_row() -> None:
    """`spread` fills the rows that pad with 0, and `only` keeps each slot with its own expert."""
    case = Case.parse("moe.fp32.t9.h16.i16.e4.k2.renormalize.swiglu.standard.real.hot.s0")
    inputs = make_inputs(case)
    layer = Layer(case, "cpu")
    experts = experts_of(case, layer.loader.weights)
    (group,) = batched.groups(inputs.x, inputs.routing, experts, layer.loader.stacked, (Rounding(),))
    assert len(set(group.counts)) > 1, "no padding here"
    slots = group.slots.double()
    assert torch.equal(group.rows(group.spread(slots)), slots)
    assert float(group.spread(slots + 1).sum()) == float((slots + 1).sum())
    kept = group.slots % 3 == 0
    fewer = group.only(kept)
    assert fewer is not None
    assert torch.equal(fewer.rows(fewer.done.row), group.rows(group.done.row)[kept])
    assert group.only(torch.zeros_like(kept)) is None
    for one in group.alone({2}):
        assert one.experts == (2,)
        torch.testing.assert_close(one.weights.down, layer.loader.weights(2).down)
        mine = (inputs.routing.ids.flatten() == 2).nonzero().flatten()
        assert one.slots.tolist() == mine.tolist()


def test_nobody_writes_to_what_is_read_by_all() -> None:
    """`stored` is the memory that the next reader gets; gate_up and down are copies."""
    inputs = make_inputs(Case.parse(CASES[1]))
    inputs.gate_up(0)[0].codes.zero_()
    assert bool(inputs.stored(0)[0].codes.any())
    assert inputs.stored(0)[0].codes.data_ptr() == inputs.stored(0)[0].codes.data_ptr()
