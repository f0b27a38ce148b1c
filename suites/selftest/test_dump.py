"""FlashInfer's flight recorder -> a judged case. The recorder is the library's own; the calls are our adapters' to the twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.case import Case
from harness.dump.layer import Layer
from harness.dump.read import DumpError, _parameters, folders, read
from harness.dump.readers import call_of
from harness.inputs import make_inputs

api_logging = pytest.importorskip("flashinfer.api_logging", reason="the recorder is FlashInfer's")
CASES = {
    "bf16": "moe.bf16.t5.h64.i32.e6.k2.renormalize.swiglu.standard.real.s0",
    "fp8": "moe.fp8_tensor-fp8_tensor.t5.h64.i64.e4.k2.renormalize.geglu.standard.real.s0",
    "fp8_block": "moe.fp8_block-fp8_group.t5.h128.i128.e4.k2.renormalize.silu.standard.real.s0",
    "w4a16": "moe.mxfp4.t5.h128.i128.e4.k2.renormalize.swiglu_oai.standard.real.s0",
    "w4a8": "moe.int4_g128-fp8_tensor.t5.h128.i128.e4.k2.renormalize.swiglu.standard.real.s0",
    "mxfp8": "moe.mxfp8-mxfp8.t5.h128.i128.e4.k2.renormalize.relu2.standard.real.s0",
    "mxfp8_mxfp4": "moe.mxfp4-mxfp8.t5.h128.i128.e4.k2.renormalize.swiglu.standard.real.s0",
    "nvfp4": "moe.nvfp4-nvfp4.t5.h128.i128.e4.k2.renormalize.swiglu.standard.real.s0",
}


@pytest.fixture
def record(recorder: Callable[..., Any]) -> Any:
    """Of a mode; users pass the first three by position."""
    positional = ("input", "token_selected_experts", "token_final_scales")
    return recorder("flashinfer_cutlass_{}_twin", CASES, *positional, use_fused_finalize=False)


@pytest.mark.parametrize("mode", CASES)
def test_the_logical_layer_comes_back_from_the_physical_buffers(record: Any, mode: str) -> None:
    """What the adapter packed: the same weights times the same factors, in the reference's order of halves."""
    case = Case.parse(CASES[mode])
    inputs, layer = make_inputs(case), call_of(read(record(mode)))
    assert isinstance(layer, Layer)
    assert layer.activation == case.activation
    assert torch.equal(layer.routed.routing.ids, inputs.topk_ids)
    for expert in range(case.shape.experts):
        want = [q.format.decode(q) if q is not None else None for q in (*inputs.gate_up(expert), inputs.down(expert))]
        gate, up, down = layer.matrices(expert)
        x = layer.x.double() @ (up if gate is None else gate).T.double()
        torch.testing.assert_close(x, inputs.x.double() @ want[0].T, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
        assert down.shape == want[2].shape  # type: ignore[union-attr]
        ratio = (down.double() / want[2]).nan_to_num(1.0)  # type: ignore[operator]
        assert float(ratio.max() - ratio.min()) < 1e-5
    if layer.middle_scale not in (None, 1.0):
        assert layer.middle_scale == inputs.middle_scale


@pytest.mark.parametrize("mode", ["bf16", "nvfp4"])
def test_a_right_call_passes_and_what_it_returned_then_agrees(
    record: Any, moecheck: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    record(mode)
    answer = moecheck("import-dump", str(record.folder), "--platform", "cpu", "--out", str(tmp_path / "run"))
    assert answer.code == 0, answer.out
    assert "what it returned then agrees" in answer.out
    assert "PASSED dump_0" in answer.out
    assert "1 recorded calls: 1 judged, 0 not" in answer.out
    rerun = next(line for line in answer.out.splitlines() if "rerun: " in line).split()[2:]
    assert moecheck(*rerun).code == 0


def test_a_wrong_recorded_output_is_named(record: Any, moecheck: Callable[..., Any], tmp_path: Path) -> None:
    place = record("bf16")
    result = torch.load(place / "outputs.pt")
    result["result__0"][3] *= 1.5
    torch.save(result, place / "outputs.pt")
    answer = moecheck("import-dump", str(place), "--platform", "cpu", "--out", str(tmp_path / "run"))
    assert "what it returned then is WRONG: " in answer.out
    assert "looks like constant_factor" in answer.out
    assert answer.code == 0, "the installed library (here its twin) gets it right"


def test_a_library_that_gets_it_wrong_now_is_judged_wrong(
    record: Any, moecheck: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's rows read as the up rows': the installed library (here the twin that children import) errs."""
    record("bf16")
    plugin = tmp_path / "planted.py"
    plugin.write_text(PLANTED)
    monkeypatch.setattr("harness.cli_dump.PLUGIN", PLANTED)
    answer = moecheck("import-dump", str(record.folder), "--platform", "cpu", "--out", str(tmp_path / "run"))
    assert answer.code == 1, answer.out
    assert "WRONG dump_0" in answer.out
    assert "gate_up_swap" in answer.out


PLANTED = """\
from harness.dump.subject import subject_of
from harness.entry import planted, twins

ENTRY = "flashinfer.fused_moe.cutlass_fused_moe"


def swapped(*, fc1_expert_weights, **given):
    up, gate = fc1_expert_weights.chunk(2, 1)
    import torch

    return twins()[ENTRY](fc1_expert_weights=torch.cat((gate, up), 1), **given)


BACKENDS = (planted(subject_of({folder!r}, {name!r}), {name!r}, {{ENTRY: swapped}}),)
"""


def test_broken_arguments_are_named_before_the_call(record: Any, moecheck: Callable[..., Any], tmp_path: Path) -> None:
    """The library looks at no stride: the twin, like the kernel, would read other values."""

    def transposed(given: dict[str, Any]) -> None:
        ids = given["token_selected_experts"]
        given["token_selected_experts"] = ids.T.contiguous().T

    record("bf16", transposed)
    answer = moecheck("import-dump", str(record.folder), "--platform", "cpu", "--out", str(tmp_path / "run"))
    assert answer.code == 1
    assert "CONTRACT dump_0" in answer.out
    assert "token_selected_experts is not contiguous" in answer.out


def test_weak_data_is_judged_and_called_weak(record: Any, moecheck: Callable[..., Any], tmp_path: Path) -> None:
    def tiny(given: dict[str, Any]) -> None:
        given["input"] = given["input"] * 2.0**-20

    record("bf16", tiny)
    answer = moecheck("import-dump", str(record.folder), "--platform", "cpu", "--out", str(tmp_path / "run"))
    assert answer.code == 0
    assert "PASSED" in answer.out
    journal = json.loads((tmp_path / "run" / "journal.jsonl").read_text())
    assert "cannot tell everything: impostors pass: gate_up_swap" in journal["notes"][0]["text"]


def test_strides_survive_in_both_tensor_formats(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def strided(given: dict[str, Any]) -> None:
        wide = torch.zeros(5, 80, dtype=torch.bfloat16)
        wide[:, :64] = given["input"]
        given["input"] = wide[:, :64]

    first = read(record("bf16", strided))
    monkeypatch.setattr(api_logging, "_DUMP_SAFETENSORS", True)
    second = read(record("bf16", strided))
    for dump in (first, second):
        assert dump.arguments["input"].stride() == (80, 1)
    assert torch.equal(first.arguments["input"], second.arguments["input"])
    assert second.notes == ("inputs.safetensors has no strides: arg_0 are laid out again as the record says",)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda r: r.update(function_name="trtllm_fp4_block_scale_moe_v9"), "read are: cutlass_fused_moe"),
        (lambda r: r.update(function_name="x" * 10_000), r"a call of x{200}; read are: "),
        (lambda r: r.pop("tensor_details"), "KeyError: 'tensor_details'"),
        (
            lambda r: r["input_metadata"].update(kwarg_output_dtype={"type": "torch.dtype", "value": "torch.load"}),
            "is no dtype",
        ),
        (lambda r: r["input_metadata"].update(kwarg_x={"type": "Plan", "repr": "<object>"}), "keeps as text only"),
        (lambda r: r["input_metadata"].update(kwarg_input=1), "input is given twice"),
    ],
)
def test_a_damaged_record_is_one_clear_error(record: Any, edit: Callable[[dict[str, Any]], object], says: str) -> None:
    place = record("bf16")
    entry = json.loads((place / "metadata.jsonl").read_text().splitlines()[-1])
    edit(entry)
    (place / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(DumpError, match=says):
        call_of(read(place))


def test_a_pickle_runs_no_code(record: Any, tmp_path: Path) -> None:
    place = record("bf16")
    (place / "inputs.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    with pytest.raises(DumpError, match=r"inputs\.pt: cannot be read"):
        read(place)
    assert not (tmp_path / "owned").exists()


def test_no_dump_is_said(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="no dump of FlashInfer"):
        folders(tmp_path)


def test_names_are_read_out_of_any_signature() -> None:
    text = "(a: 'Tensor | None', b: Callable[[int, str], <class 'x'>] = <function f at 0x7>, *, c=(1, 2), **kw) -> List[Tensor]"
    assert _parameters(text)[:3] == ["a", "b", "c"]
