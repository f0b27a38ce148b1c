"""Expert biases and routing weights on the input: ids, bytes, exactness, wrong kernels seen, whole adapters against twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU, Backend, Launch
from harness.case import Case
from harness.checks import untrusted
from harness.compare import compare
from harness.emulate import emulate
from harness.entry import planted, planting, twins
from harness.errors import CaseError
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect, layer_experts
from harness.pipeline import run
from harness.ratio import assumed_rounding
from harness.select import plan_backend
from harness.space import below
from harness.variants import relabelled
from harness.verdict import Status, Verdict
from reference.experts import linear
from reference.moe import moe
from reference.rounding import Rounding

BIASED = "moe.bf16.t17.h128.i64.e5.k2.renormalize.swiglu.standard.{}.bias.s1"
ON_INPUT = "moe.bf16.t33.h128.i64.e5.k1.default.swiglu.standard.real.oninput.s1"
BACKENDS = discover()
KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
CUTLASS = Rounding(product="bf16", middle="bf16", out="bf16")  # biases join what the GEMMs wrote


def expected(text: str, rounding: Rounding = KERNEL) -> tuple[Inputs, Expected]:
    case = Case.parse(text)
    inputs = make_inputs(case)
    return inputs, expect(case, inputs, rounding)


def judged(backend: Backend, text: str) -> Verdict:
    return run(Case.parse(text), backend, CPU)


# -- ids and bytes


@pytest.mark.parametrize("text", [BIASED.format("real"), ON_INPUT, BIASED.format("real.hot"), BIASED.format("exact.half")])
def test_ids_with_options_are_read_back(text: str) -> None:
    case = Case.parse(text)
    assert case.id == text
    assert replace(case, bias="nobias", weighting="onoutput").id == text.replace(".bias", "").replace(".oninput", "")
    assert {case.axes["bias"], case.axes["weighting"]} & {"bias", "oninput"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fill": "onehot"}, "a probe's output"),
        ({"fill": "idcode"}, "a probe's output"),
        ({"weighting": "oninput"}, "no model has both"),
        ({"bias": "nobias", "weighting": "oninput", "fill": "exact"}, "where silu rounds"),
        ({"bias": "nobias", "weighting": "oninput", "top_k": 1}, "one weight for every token"),
        (
            {"bias": "nobias", "weighting": "oninput", "experts": 1, "top_k": 1, "routing": "default"},
            "one weight for every token",
        ),
        ({"bias": "nobias", "weighting": "oninput", "activation": "relu"}, "relu passes a factor on"),
        ({"bias": "nobias", "weighting": "oninput", "activation": "identity"}, "identity passes a factor on"),
    ],
)
def test_combinations_that_say_nothing_are_impossible(change: dict[str, int | str], reason: str) -> None:
    case = Case.parse(BIASED.format("real")).vary(**change)
    assert reason in str(case.problem())
    with pytest.raises(CaseError, match="impossible"):
        Case.parse(case.id)


def test_an_id_does_not_name_what_is_usual() -> None:
    with pytest.raises(CaseError, match="not canonical"):
        Case.parse(BIASED.format("real").replace(".bias", ".nobias"))


def test_a_real_bias_is_added_to_an_unchanged_layer() -> None:
    biased, plain = (make_inputs(Case.parse(BIASED.format("real").replace(".bias", tail))) for tail in (".bias", ""))
    assert torch.equal(biased.x, plain.x)
    assert torch.equal(biased.down(3).codes, plain.down(3).codes)
    assert plain.gate_up_bias(3) == (None, None)
    assert plain.down_bias(3) is None
    for bias, rms in zip((*biased.gate_up_bias(3), biased.down_bias(3)), (0.58, 0.58, 2.3), strict=True):
        assert bias is not None
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(bias.to(dtype).float(), bias)
        assert 0.8 * rms < float(bias.square().mean().sqrt()) < 1.2 * rms


def test_every_expert_has_biases_of_its_own_and_keeps_them_under_another_number() -> None:
    inputs = make_inputs(Case.parse(BIASED.format("exact")))
    seen = [tuple(t.tolist()) for e in range(5) for t in (*inputs.gate_up_bias(e), inputs.down_bias(e)) if t is not None]
    assert len(set(seen)) == len(seen) == 15
    other = relabelled(inputs)
    assert torch.equal(other.down_bias(0), inputs.down_bias(4))  # type: ignore[arg-type]
    assert torch.equal(other.gate_up_bias(1)[0], inputs.gate_up_bias(3)[0])  # type: ignore[arg-type]


# -- the exact fill


@pytest.mark.parametrize(
    "recipe", ["bf16", "fp16", "mxfp4", "fp8_tensor-fp8_tensor", "mxfp4-mxfp8", "nvfp4-nvfp4", "fp8_block-fp8_group"]
)
@pytest.mark.parametrize("tail", ["k2.renormalize.swiglu", "k4.deepseek_v3.geglu", "k1.default.silu"])
def test_the_exact_fill_stays_exact_with_biases(recipe: str, tail: str) -> None:
    case = Case.parse(f"moe.{recipe}.t5.h128.i128.e16.{tail}.standard.exact.bias.s0")
    inputs = make_inputs(case)
    found = expect(case, inputs, assumed_rounding(case.recipe))
    assert found.exact, found.reason
    assert untrusted(case, found) is None


# -- values


def by_hand(inputs: Inputs, token: int) -> Tensor:
    """One token of a swiglu layer, formula by formula."""
    total = torch.zeros(inputs.case.shape.hidden, dtype=torch.float64)
    x = inputs.x[token].double()
    for expert, weight in zip(inputs.topk_ids[token].tolist(), inputs.routing.weights[token].tolist(), strict=True):
        on_input = inputs.case.weighting == "oninput"
        gate, up = (w.codes.double() @ (x * weight if on_input else x) for w in inputs.gate_up(expert) if w is not None)
        biases = inputs.gate_up_bias(expert)
        if biases[0] is not None and biases[1] is not None:
            gate, up = gate + biases[0], up + biases[1]
        row = inputs.down(expert).codes.double() @ (gate * torch.sigmoid(gate) * up)
        bias = inputs.down_bias(expert)
        total += (1.0 if on_input else weight) * (row if bias is None else row + bias)
    return total


@pytest.mark.parametrize("text", [BIASED.format("real"), ON_INPUT, ON_INPUT.replace("k1", "k3")])
def test_the_oracle_is_the_formula(text: str) -> None:
    inputs, found = expected(text)
    for token in (0, 7, 16):
        assert torch.allclose(found.value[token], by_hand(inputs, token), rtol=1e-10, atol=1e-12)
    assert torch.equal(moe(inputs.x, inputs.routing, layer_experts(inputs)), found.value)


@pytest.mark.parametrize(
    ("text", "rounding"),
    [
        (BIASED.format("real"), KERNEL),
        (BIASED.format("real"), CUTLASS),
        (BIASED.format("real").replace("swiglu", "swiglu_oai"), CUTLASS),
        (ON_INPUT, KERNEL),
        (ON_INPUT.replace("k1", "k3"), replace(KERNEL, routing_weight="bf16")),
        (ON_INPUT.replace("k1", "k3"), replace(KERNEL, weighted_x="bf16")),
    ],
)
def test_right_kernels_pass_and_the_bound_is_tight(text: str, rounding: Rounding) -> None:
    inputs, found = expected(text, rounding)
    assert untrusted(inputs.case, found) is None
    for seed in range(3):
        judged = compare(found, emulate(inputs, rounding, seed))
        assert judged.agrees
        assert 0.8 < judged.mean_z2 < 1.2


def test_a_bias_after_the_rounding_is_told_from_one_before() -> None:
    """In the exact fill the point changes nothing; of numbers it is known."""
    x, w, bias = torch.tensor([[1.0]]), torch.tensor([[1.01]]), torch.tensor([0.01])
    after = linear(x.double(), w.double(), bias.double(), Rounding(product="bf16"))
    assert float(after) == float(torch.tensor(1.01).bfloat16()) + float(bias.double())


# -- wrong kernels


def impostors(text: str) -> set[str]:
    return set(expected(text)[1].impostors)


def test_the_guard_makes_the_mistakes_of_biases_and_of_weights_on_the_input() -> None:
    wrong = {"lost_bias_w13", "lost_bias_w2", "next_expert_bias_w13", "next_expert_bias_w2"}
    assert wrong <= impostors(BIASED.format("exact"))
    assert wrong <= impostors(BIASED.format("real"))
    assert {"weight_on_output", "weight_twice"} <= impostors(ON_INPUT)
    assert not wrong & impostors(ON_INPUT)


def _edited(backend: Backend, name: str, edit: Callable[[Tensor], Tensor]) -> Backend:
    """The backend, its kernel reading a buffer that was edited after packing."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        launch = backend.prepare(case, inputs)
        launch.buffers[name].copy_(edit(launch.buffers[name]))
        return launch

    return replace(backend, prepare=prepare, script=None)


def _of_the_next(bias: Tensor) -> Tensor:
    return bias.roll(-1, 0)


@pytest.mark.parametrize("fill", ["exact", "real"])
@pytest.mark.parametrize(("edit", "kind"), [(torch.zeros_like, "missing_bias"), (_of_the_next, "wrong_expert")])
@pytest.mark.parametrize("name", ["w13_bias", "w2_bias"])
@pytest.mark.parametrize("subject", ["torch_grouped_mm", "flashinfer_cutlass_bf16_twin"])
def test_wrong_biases_are_seen_and_named(
    subject: str, name: str, edit: Callable[[Tensor], Tensor], kind: str, fill: str
) -> None:
    verdict = judged(_edited(BACKENDS[subject], name, edit), BIASED.format(fill))
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert (verdict.diagnosis.kind, name[:3].rstrip("_") in verdict.diagnosis.text) == (kind, True), verdict.reason


# -- adapters, plans, shrinking


SUBJECTS = [
    ("torch_grouped_mm", "moe.bf16.t17.h64.i32.e5.k2.default.silu.standard.real.bias.s0"),
    ("flashinfer_cutlass_bf16_twin", "moe.fp16.t17.h64.i32.e5.k2.default.swiglu_oai.standard.real.bias.s0"),
    ("flashinfer_cutlass_w4a16_twin", "moe.mxfp4.t9.h128.i128.e5.k2.renormalize.swiglu.standard.exact.bias.s0"),
    ("flashinfer_cutlass_mxfp8_mxfp4_twin", "moe.mxfp4-mxfp8.t17.h128.i128.e4.k2.default.swiglu_oai.standard.real.bias.s0"),
    ("flashinfer_trtllm_fp4_twin", "moe.mxfp4.t8.h128.i128.e5.k2.renormalize.swiglu_oai.standard.real.bias.s0"),
    ("flashinfer_trtllm_fp4_twin", "moe.mxfp4-mxfp8.t8.h128.i128.e5.k2.renormalize.swiglu.standard.exact.bias.s0"),
    ("flashinfer_trtllm_fp4_routed_twin", "moe.mxfp4.t8.h128.i128.e5.k2.renormalize.identity.standard.exact.bias.s0"),
    ("flashinfer_trtllm_fp4_twin", "moe.nvfp4-nvfp4.t8.h128.i128.e5.k2.renormalize.swiglu_step.standard.real.bias.s0"),
    ("flashinfer_trtllm_fp4_twin", "moe.nvfp4-nvfp4.t8.h128.i128.e5.k2.renormalize.situ.standard.real.bias.s0"),
    ("flashinfer_trtllm_fp4_routed_twin", "moe.nvfp4-nvfp4.t8.h128.i128.e5.k2.renormalize.swiglu.standard.exact.bias.s0"),
    (
        "flashinfer_trtllm_fp8_tensor_twin",
        "moe.fp8_tensor-fp8_tensor.t33.h128.i128.e5.k1.llama4.swiglu.standard.real.oninput.s0",
    ),
    ("torch_grouped_mm", "moe.bf16.t17.h64.i32.e6.k3.sigmoid.gelu.standard.real.half.oninput.s0"),
]


@pytest.mark.parametrize(("subject", "text"), SUBJECTS)
def test_whole_adapters_pass_with_every_relation(subject: str, text: str) -> None:
    verdict = judged(BACKENDS[subject], text)
    assert verdict.status is Status.PASSED, verdict.reason


FP4 = "flashinfer.fused_moe.trtllm_fp4_block_scale_moe"


@pytest.mark.parametrize(
    ("bias", "number"), [("gemm1_bias", "output1_scale_gate_scalar"), ("gemm2_bias", "output2_scale_scalar")]
)
def test_biases_of_nvfp4_are_in_units_of_accumulators(bias: str, number: str) -> None:
    """They are added before the three numbers dequantise; in units of values they are seen to be wrong."""

    def of_values(**given: Any) -> object:
        return twins()[FP4](**{**given, bias: given[bias] * given[number][:, None]})

    subject = planted(BACKENDS["flashinfer_trtllm_fp4_twin"], "wrong", {FP4: of_values})
    for fill in ("real", "exact"):
        verdict = judged(subject, f"moe.nvfp4-nvfp4.t8.h128.i128.e5.k2.renormalize.swiglu.standard.{fill}.bias.s0")
        assert verdict.status is Status.WRONG, verdict.reason


def test_a_backend_that_does_not_say_so_is_not_asked() -> None:
    support = BACKENDS["torch_compile"].supports(Case.parse(BIASED.format("real")), CPU)
    assert not support.ok
    assert support.reason == "bias bias: takes nobias"


def test_plans_pair_the_options_with_everything_and_only_where_they_are_taken() -> None:
    axes = {
        **{"tokens": [1, 17], "hidden": [128], "inter": [128], "experts": [5], "top_k": [1, 2], "fill": ["exact", "real"]},
        **{"recipe": ["bf16"], "routing": ["default", "renormalize"], "activation": ["swiglu", "silu"], "skew": ["uniform"]},
        **{"bias": ["nobias", "bias"], "weighting": ["onoutput", "oninput"]},
    }
    planned = plan_backend(axes, BACKENDS["torch_grouped_mm"], CPU, 2)
    assert {(c.bias, c.fill) for c in planned} == {(b, f) for b in axes["bias"] for f in axes["fill"]}
    assert {(c.bias, c.fill, c.activation) for c in planned if c.weighting == "oninput"} == {
        ("nobias", "real", activation) for activation in axes["activation"]
    }
    assert {(c.bias, c.weighting) for c in plan_backend(axes, BACKENDS["torch_compile"], CPU, 2)} == {("nobias", "onoutput")}


def test_shrinking_drops_the_options_first() -> None:
    case = Case.parse(BIASED.format("real"))
    space = below(case, BACKENDS["torch_grouped_mm"])
    assert space.choices(case, "bias") == ["nobias", "bias"]
    assert space.plainest(case).bias == "nobias"


# -- vLLM's Triton experts, which nothing here runs: what they are handed

LAYERS = "vllm.model_executor.layers.fused_moe"


def _described(*scales: Tensor, **named: object) -> SimpleNamespace:
    return SimpleNamespace(scales=scales, **named)


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("vllm_triton", "moe.bf16.t5.h64.i32.e4.k2.default.swiglu_oai.standard.real.bias.s0"),
        ("vllm_triton_fp8", "moe.fp8_channel-fp8_token.t5.h64.i32.e4.k2.default.swiglu.standard.real.bias.s0"),
        ("vllm_triton_int8", "moe.int8_channel.t5.h64.i32.e4.k2.renormalize.silu.standard.exact.bias.s0"),
        ("vllm_triton", "moe.bf16.t5.h64.i32.e4.k1.default.swiglu.standard.real.oninput.s0"),
    ],
)
def test_vllm_is_handed_biases_in_the_order_of_its_rows_and_asked_for_weights_on_the_input(subject: str, text: str) -> None:
    asked: dict[str, Any] = {}
    case = Case.parse(text)
    inputs = make_inputs(case)

    def experts(x: Tensor, *tensors: Tensor, **options: object) -> Tensor:
        asked.update(options)
        return torch.zeros_like(x)

    configs = ("biased_moe_quant_config", "fp8_w8a8_moe_quant_config", "int8_w8a16_moe_quant_config")
    functions: dict[str, Callable[..., Any]] = {f"{LAYERS}.config.{name}": _described for name in configs}
    members = SimpleNamespace(SILU=0, SWIGLUOAI=1, SILU_NO_MUL=2)
    with planting({**functions, f"{LAYERS}.fused_moe.fused_experts": experts, f"{LAYERS}.activation.MoEActivation": members}):  # type: ignore[dict-item]
        BACKENDS[subject].prepare(case, inputs).call()
    assert asked["apply_router_weight_on_input"] is (case.weighting == "oninput")
    if case.bias == "nobias":
        return
    quant = asked["quant_config"]
    gate, up = inputs.gate_up_bias(1)
    parts = [gate] if up is None else [gate, up]
    wanted = torch.stack(parts, dim=1).flatten() if case.activation == "swiglu_oai" else torch.cat(parts)  # type: ignore[arg-type]
    assert torch.equal(quant.w1_bias[1].float(), wanted)
    assert torch.equal(quant.w2_bias[1].float(), inputs.down_bias(1))  # type: ignore[arg-type]
