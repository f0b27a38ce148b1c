"""Every recorded entry point: prepare -> the call, recorded -> read -> the same layer, judged; a defect in it is named.

The recorder is the library's own; the calls are our adapters' to the twins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.dump.layer import Layer
from harness.dump.read import DumpError, read
from harness.dump.readers import READERS, call_of
from harness.dump.subject import judge_recorded, opened, subject_of
from harness.inputs import Inputs, make_inputs
from harness.pipeline import run
from harness.verdict import Status

TAIL = "renormalize.swiglu.standard.real.s0"
LAYERS = {
    "flashinfer_cutlass_bf16": "moe.bf16.t5.h64.i32.e6.k2.renormalize.swiglu.standard.real.bias.s0",
    "flashinfer_trtllm_bf16": "moe.bf16.t5.h128.i128.e4.k2.renormalize.relu2.standard.real.s0",
    "flashinfer_trtllm_bf16_routed": "moe.bf16.t5.h128.i128.e4.k2.renormalize.swiglu_oai.standard.real.s0",
    "flashinfer_trtllm_fp8_tensor": "moe.fp8_tensor-fp8_tensor.t5.h128.i128.e4.k1.llama4.swiglu.standard.real.oninput.s0",
    "flashinfer_trtllm_fp8_tensor_routed": "moe.fp8_tensor-fp8_tensor.t5.h128.i128.e4.k2.topk.swiglu_step.standard.real.s0",
    "flashinfer_trtllm_fp8_block": "moe.fp8_block-fp8_group.t5.h128.i128.e16.k2.deepseek_v3.swiglu.standard.exact.s0",
    "flashinfer_trtllm_fp8_block_routed": "moe.mxfp8-mxfp8.t5.h128.i128.e4.k2.renormalize.geglu.standard.real.s0",
    "flashinfer_trtllm_fp4": "moe.nvfp4-nvfp4.t5.h128.i128.e4.k2.kimi_k2.situ.standard.real.s0",
    "flashinfer_trtllm_fp4_routed": "moe.mxfp4-mxfp8.t5.h128.i128.e4.k2.renormalize.swiglu_oai.standard.real.bias.s0",
    "flashinfer_trtllm_mxint4": "moe.mxint4.t5.h256.i256.e4.k2.minimax2.swiglu.standard.real.s0",
    "flashinfer_trtllm_mxint4_routed": f"moe.mxint4.t5.h256.i256.e4.k2.{TAIL}",
    "flashinfer_cutedsl": "moe.nvfp4-nvfp4.t5.h128.i128.e4.k2.renormalize.situ.standard.real.s0",
    "flashinfer_cutedsl_two_stage": f"moe.nvfp4-nvfp4.t5.h128.i128.e4.k2.{TAIL}",
    "flashinfer_cutedsl_w4a8": "moe.mxfp4-mxfp8.t5.h128.i128.e4.k2.renormalize.swiglu_oai.standard.real.s0",
    "flashinfer_cute_sm90": "moe.fp16.t5.h64.i64.e4.k2.renormalize.situ.standard.real.s0",
    "flashinfer_cute_sm90_fused": "moe.bf16.t5.h64.i64.e4.k2.renormalize.geglu_tanh.standard.real.s0",
    "flashinfer_b12x": "moe.nvfp4-nvfp4.t5.h128.i128.e4.k2.renormalize.swiglu_oai.standard.real.s0",
}
OPS = {
    "flashinfer_fp4_quantize_128x4": "quantize.nvfp4.t5.h128.real.s0",
    "flashinfer_fp4_quantize_8x4": "quantize.mxfp4-fp16.t5.h128.real.s0",
    "flashinfer_nvfp4_quantize_128x4": "quantize.nvfp4-fp16.t5.h128.real.s0",
    "flashinfer_mxfp4_quantize_128x4": "quantize.mxfp4.t5.h128.real.s0",
    "flashinfer_mxfp8_quantize_linear": "quantize.mxfp8.t5.h128.real.s0",
    "flashinfer_mxfp8_quantize_128x4": "quantize.mxfp8-fp16.t5.h128.real.s0",
    "flashinfer_silu_and_mul": "activate.bf16.t5.i64.swiglu.real.s0",
    "flashinfer_gelu_and_mul": "activate.fp16.t5.i64.geglu.real.s0",
    "flashinfer_gelu_tanh_and_mul": "activate.bf16.t5.i64.geglu_tanh.real.s0",
    "flashinfer_fused_topk_deepseek": "route.fp32.t5.e32.k4.deepseek_v3.real.s0",
}
CASES = {**LAYERS, **OPS}
Damage = Callable[[dict[str, Any]], None]


@pytest.fixture
def record(recorder: Callable[..., Any]) -> Any:
    return recorder("{}_twin", CASES)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_comes_back_and_is_judged_right(record: Any, name: str) -> None:
    case, place = Case.parse(LAYERS[name]), record(name)
    inputs, layer = make_inputs(case), opened(str(place))[1]
    assert isinstance(layer, Layer)
    assert (layer.activation, layer.case.bias, layer.case.weighting) == (case.activation, case.bias, case.weighting)
    assert (layer.case.shape, layer.middle_scale in (None, 1.0, inputs.middle_scale)) == (case.shape, True)
    same_routing(layer, inputs)
    same_weights(layer, inputs)
    verdict = run(layer.case, subject_of(str(place), "dump"), CPU)
    assert verdict.status is Status.PASSED, verdict.reason
    said, found, _ = judge_recorded(str(place))
    assert found is not None, said
    assert found.agrees, said


def same_routing(layer: Layer, inputs: Inputs) -> None:
    """The reference's, in any order of a token's slots; weights as far as the adapter rounded them."""
    mine, theirs = layer.routed.routing, inputs.routing
    places = [r.ids.argsort(-1) for r in (mine, theirs)]
    assert torch.equal(*(r.ids.gather(1, p) for r, p in zip((mine, theirs), places, strict=True)))
    given = [r.weights.double().gather(1, p) for r, p in zip((mine, theirs), places, strict=True)]
    torch.testing.assert_close(*given, rtol=2.0**-8, atol=0)


def same_weights(layer: Layer, inputs: Inputs) -> None:
    """The products with x, and the down projection up to the factor of its input's scale."""
    for expert in range(inputs.case.shape.experts):
        gate, up = inputs.gate_up(expert)
        want = [q.format.decode(q).float() for q in (gate, up, inputs.down(expert)) if q is not None]
        got = [m for m in layer.matrices(expert) if m is not None]
        for w, m in zip(want[:-1], got[:-1], strict=True):
            torch.testing.assert_close(layer.x @ m.T, inputs.x.float() @ w.T, rtol=1e-5, atol=1e-5)
        ratio = (got[-1] / want[-1])[want[-1] != 0]
        assert float(ratio.max() - ratio.min()) < 1e-5
        if layer.biases is not None:
            given = (*inputs.gate_up_bias(expert), inputs.down_bias(expert))
            for b, w in zip(
                [b for b in layer.biases(expert) if b is not None], [b for b in given if b is not None], strict=True
            ):
                assert torch.equal(b, w.float())


@pytest.mark.parametrize("name", OPS)
def test_a_step_comes_back_and_is_judged_right(record: Any, name: str) -> None:
    case, place = Case.parse(OPS[name]), record(name)
    _, step = opened(str(place))
    assert step.case == case
    want, got = make_inputs(case), step.inputs("cpu")
    assert torch.equal(got.x, want.x) or case.op == "route"
    assert torch.equal(got.logits, want.logits) or case.op != "route"
    assert got.x_scale == want.x_scale
    verdict = run(case, subject_of(str(place), "dump"), CPU)
    assert verdict.status is Status.PASSED, verdict.reason
    said, found, _ = judge_recorded(str(place))
    if case.op == "route":
        assert "no tensor, and the recorder keeps no buffer" in said
    else:
        assert found is not None, said
        assert found.agrees, said


def damaged(place: Path, change: Callable[[dict[str, Tensor]], None]) -> tuple[str, str]:
    """What is said of the recorded output after `change`, and what it looks like."""
    result = torch.load(place / "outputs.pt")
    change(result)
    torch.save(result, place / "outputs.pt")
    opened.cache_clear()
    said, _, looks = judge_recorded(str(place))
    return said, "" if looks is None else looks.kind


@pytest.mark.parametrize("name", LAYERS)
def test_a_defect_in_what_a_layer_returned_is_named(record: Any, name: str) -> None:
    def shifted(result: dict[str, Tensor]) -> None:
        (key,) = [k for k, t in result.items() if t.shape == (5, Case.parse(LAYERS[name]).shape.hidden)]
        result[key] = result[key].roll(1, 0)

    said, kind = damaged(record(name), shifted)
    assert "is WRONG" in said
    assert kind == "row_permutation"


@pytest.mark.parametrize(
    ("name", "kind"), [("flashinfer_fp4_quantize_128x4", "rolled_scales"), ("flashinfer_mxfp8_quantize_linear", "zeros")]
)
def test_a_defect_in_what_a_quantiser_returned_is_named(record: Any, name: str, kind: str) -> None:
    def spoilt(result: dict[str, Tensor]) -> None:
        if kind == "zeros":
            result |= {key: torch.zeros_like(t) for key, t in result.items()}
        else:  # each token has 8 scales, in two tiles of four
            scales = result["result_1"].view(torch.uint8).flatten()
            tiles = scales.view(2, 32, 4, 4).permute(2, 1, 0, 3).reshape(128, 8).roll(1, 1)
            result["result_1"] = tiles.view(4, 32, 2, 4).permute(2, 1, 0, 3).reshape(result["result_1"].shape)

    said, found = damaged(record(name), spoilt)
    assert "is WRONG" in said
    assert found == kind


def test_rows_that_the_caller_was_to_sum_are_summed(record: Any) -> None:
    """do_finalize=False: rows, weights and the index."""
    place = record("flashinfer_trtllm_bf16_routed", lambda given: given.update(do_finalize=False))
    assert run(opened(str(place))[1].case, subject_of(str(place), "dump"), CPU).status is Status.PASSED
    assert "then agrees" in judge_recorded(str(place))[0]


def test_groups_of_another_model_route_as_the_kernel_does(record: Any) -> None:
    """n_group, topk_group and the scale are the record's: another model's choose other experts."""
    other = {"n_group": 4, "topk_group": 1, "routed_scaling_factor": 1.5}
    place = record("flashinfer_trtllm_fp8_block", lambda given: given.update(other))
    layer = opened(str(place))[1]
    assert isinstance(layer, Layer)
    assert (layer.routed.routing.ids // 4 == layer.routed.routing.ids[:, :1] // 4).all()
    assert layer.routed.rule == "renormalize", "a rule that the reference does not name"
    assert run(layer.case, subject_of(str(place), "dump"), CPU).status is Status.PASSED


def spoil(**values: object) -> Damage:
    return lambda given: given.update({n: v(given[n]) if callable(v) else v for n, v in values.items()})


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (
            "flashinfer_trtllm_fp8_tensor",
            spoil(output1_scales_scalar=lambda t: t[:1]),
            "output1_scales_scalar has incorrect dim 0",
        ),
        (
            "flashinfer_trtllm_fp4",
            spoil(output1_scale_scalar=lambda t: t * torch.arange(1, 5)),
            "the scale of GEMM 2's input.* differs from expert to expert",
        ),
        ("flashinfer_trtllm_fp4", spoil(hidden_states_scale_layout=0), "hidden_states_scale_layout=0 is not supported"),
        (
            "flashinfer_trtllm_bf16_routed",
            spoil(gemm1_alpha=lambda t: 2 * t),
            "activation Swiglu with .* is none of the reference's",
        ),
        ("flashinfer_trtllm_bf16_routed", spoil(topk_ids=lambda t: t + (9 << 16)), "names expert .* of 4"),
        ("flashinfer_trtllm_bf16_routed", spoil(intermediate_size=64), "the gate projection is .* wanted .64, 128. by x"),
        ("flashinfer_cute_sm90", spoil(num_local_experts=0), "the rank holds no expert"),
        ("flashinfer_cutedsl", spoil(w1_weight=lambda t: t[:2]), "index 3 is out of bounds"),
        ("flashinfer_cutedsl", spoil(w1_weight_sf=lambda t: t.flip(0)[:16]), "are not the MMA layout"),
        ("flashinfer_b12x", spoil(fc2_input_scale=None), "fc2_input_scale is required"),
        ("flashinfer_fp4_quantize_128x4", spoil(is_sf_8x4_layout=True, backend="cute-dsl"), "backend='cute-dsl'"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(record: Any, name: str, damage: Damage, says: str) -> None:
    with pytest.raises(DumpError, match=says):
        call_of(read(record(name, damage)))


def test_a_scale_for_every_expert_where_the_kernel_reads_one_breaks_the_contract(record: Any) -> None:
    place = record("flashinfer_cutedsl", spoil(fc2_input_scale=lambda t: t.expand(4).contiguous()))
    verdict = run(opened(str(place))[1].case, subject_of(str(place), "dump"), CPU)
    assert verdict.status is Status.CONTRACT
    assert "fc2_input_scale has shape (4,), wanted (1)" in verdict.reason


def test_an_activations_strides_are_no_matter_to_the_kernel(record: Any) -> None:
    """It would read other values than the caller meant."""
    place = record("flashinfer_silu_and_mul")
    inputs = torch.load(place / "inputs.pt")
    torch.save({name: t.T.contiguous().T for name, t in inputs.items()}, place / "inputs.pt")
    verdict = run(opened(str(place))[1].case, subject_of(str(place), "dump"), CPU)
    assert verdict.status is Status.CONTRACT
    assert "input is not contiguous" in verdict.reason


def test_a_recorded_output_that_fits_no_call_is_said(record: Any) -> None:
    said, _ = damaged(record("flashinfer_fp4_quantize_8x4"), lambda result: result.update(result_1=torch.zeros(3)))
    assert "what it returned then does not fit the call" in said


def edited(place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    entry = json.loads((place / "metadata.jsonl").read_text().splitlines()[-1])
    change(entry)
    (place / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    return place


def test_a_number_that_has_moved_between_releases_is_not_guessed(record: Any) -> None:
    place = record("flashinfer_trtllm_fp8_tensor_routed")  # SwigluStep, 7; Identity's number before 0.6.13
    assert isinstance(call_of(read(place)), Layer), "the release that the twins follow"
    edited(place, lambda entry: entry["versions"].update(flashinfer="0.6.11"))
    with pytest.raises(DumpError, match=r"activation_type=7, recorded as a number under flashinfer 0\.6\.11: numbers above 6"):
        call_of(read(place))


def test_a_buffer_that_was_on_another_device_is_told(record: Any) -> None:
    """vllm#38169: out= on the CPU. Here all of them will be on one device."""

    def elsewhere(entry: Mapping[str, Any]) -> None:
        for key, detail in entry["tensor_details"].items():
            detail["device"] = "cpu" if key == "kwarg_topk_ids" else "cuda:0"

    place = edited(record("flashinfer_trtllm_bf16_routed"), elsewhere)
    assert read(place).notes == ("the arguments were on several devices: kwarg_topk_ids on cpu, the others on cuda:0",)


def test_every_entry_that_is_read_is_recorded_here() -> None:
    """A reader without a round trip would be a guess."""
    backends = discover()
    entries = {e.rpartition(".")[2] for name in CASES for e in backends[f"{name}_twin"].entries}
    assert READERS.keys() <= entries
