"""Twins and adapters of FlashInfer's trtllm_*_moe: signatures, what comes back, what is refused, and defects that show."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import with_twins
from harness.backends._trtllm import METHODS, finalized, packed_topk
from harness.backends.base import CPU, Backend
from harness.backends.flashinfer_trtllm import BACKENDS
from harness.case import Case
from harness.entry import planted, planting, twins
from harness.guard import Violation
from harness.inputs import make_inputs
from harness.pipeline import Options, run
from harness.twins.libs import _trtllm_layer, _trtllm_routing
from harness.twins.libs._trtllm_signatures import SIGNATURES
from harness.twins.libs.flashinfer_enums import ENUMS, RoutingMethodType, SfLayout
from harness.variants import shards
from harness.verdict import Status
from reference import packed_topk as reference_topk
from reference.routing import RULES

SUBJECTS = {b.name: b for b in with_twins(BACKENDS) if b.name.endswith("_twin")}
CASES = {  # by backend, the smallest of each recipe
    "flashinfer_trtllm_bf16": ("bf16",),
    "flashinfer_trtllm_fp8_tensor": ("fp8_tensor-fp8_tensor",),
    "flashinfer_trtllm_fp8_block": ("fp8_block-fp8_group", "mxfp8-mxfp8"),
    "flashinfer_trtllm_fp4": ("nvfp4-nvfp4", "mxfp4-mxfp8", "mxfp4"),
    "flashinfer_trtllm_mxint4": ("mxint4",),
}
RECIPES = [(name, recipe) for name, recipes in CASES.items() for recipe in recipes]
FORMS = [(f"{name}{form}_twin", recipe) for name, recipe in RECIPES for form in ("", "_routed")]
BARE = ("bf16", "fp8")  # entry points whose finalized layer is a tensor: core.py, `return result[0]`


def case_of(recipe: str, tokens: int = 3, **axes: int | str) -> Case:
    size = 256 if recipe == "mxint4" else 128
    case = Case.parse(f"moe.{recipe}.t{tokens}.h{size}.i{size}.e8.k2.renormalize.swiglu.standard.real.s0")
    return case.vary(**axes)


def recorded(backend: Backend, case: Case) -> tuple[Callable[..., Any], dict[str, Any], Tensor]:
    """(the twin, the arguments of one call of the adapter, what the adapter made of it)."""
    name = next(e for e in backend.entries if e.endswith("_moe"))
    calls: list[dict[str, Any]] = []

    def spy(**named: Any) -> Any:
        calls.append(named)
        return twins()[name](**named)

    with planting({name: spy}):
        output = backend.prepare(case, make_inputs(case)).call()
    return twins()[name], calls[0], output


@pytest.fixture(scope="module")
def wheel() -> Path:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs flashinfer-python==0.7.2.post1 to read")
    return Path(spec.submodule_search_locations[0])


def signature_in(path: Path, name: str) -> inspect.Signature:
    tree = ast.parse(path.read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    for argument in (*function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    return inspect.signature(eval(f"(lambda {ast.unparse(function.args)}: None)", dict(ENUMS)))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_twin_has_the_signature_of_the_wheel(wheel: Path, name: str) -> None:
    assert inspect.signature(twins()[f"flashinfer.fused_moe.{name}"]) == signature_in(wheel / "fused_moe/core.py", name)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("reorder_rows_for_gated_act_gemm", "fused_moe/core.py"),
        ("fused_moe.convert_to_block_layout", "fused_moe/core.py"),
        ("shuffle_matrix_a", "quantization/fp4_quantization.py"),
        ("shuffle_matrix_sf_a", "quantization/fp4_quantization.py"),
    ],
)
def test_a_helper_has_the_parameters_of_the_wheel(wheel: Path, name: str, file: str) -> None:
    ours = inspect.signature(twins()[f"flashinfer.{name}"]).parameters.values()
    theirs = signature_in(wheel / file, name.split(".")[-1]).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("name", ENUMS)
def test_an_enum_has_the_members_of_the_wheel(wheel: Path, name: str) -> None:
    tree = ast.parse((wheel / "tllm_enums.py").read_text())
    (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    members = {n.targets[0].id: ast.literal_eval(n.value) for n in body if isinstance(n, ast.Assign)}  # type: ignore[attr-defined]
    assert {m.name: m.value for m in ENUMS[name]} == {n: v[0] if isinstance(v, tuple) else v for n, v in members.items()}


@pytest.mark.parametrize(("name", "recipe"), FORMS)
def test_every_recipe_passes_in_both_forms(name: str, recipe: str) -> None:
    for fill in ("real", "exact"):
        verdict = run(case_of(recipe, fill=fill), SUBJECTS[name], CPU, options=Options(checks=0))
        assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize(("name", "recipe"), FORMS)
def test_what_comes_back(name: str, recipe: str) -> None:
    case = case_of(recipe)
    function, named, output = recorded(SUBJECTS[name], case)
    result = function(**named)
    if any(kind in name for kind in BARE):
        assert torch.equal(result, output)
    else:
        assert isinstance(result, list)
        assert len(result) == 1
    rows, weights, index = function(**{**named, "do_finalize": False})
    assert rows.dtype == weights.dtype == torch.bfloat16
    assert tuple(weights.shape) == (3, 2)
    assert index.dtype == torch.int32
    assert index.tolist() == list(dict.fromkeys(index.tolist())), "two slots share a row"
    assert torch.equal(finalized(rows, weights, index), output)


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_output_is_written_in_place_row_after_row(name: str, recipe: str) -> None:
    function, named, output = recorded(SUBJECTS[f"{name}_twin"], case_of(recipe))
    given = torch.full_like(output, torch.nan)
    result = function(**named, output=given)
    result = result[0] if isinstance(result, list) else result
    assert result.data_ptr() == given.data_ptr()
    assert torch.equal(given, output)
    with pytest.raises(ValueError, match="output"):
        function(**named, output=given[:, :64])


def test_another_ranks_slots_have_no_row() -> None:
    case = case_of("bf16", tokens=5)
    inputs = shards(make_inputs(case))[1]  # every expert but the first
    _, named, _ = recorded(SUBJECTS["flashinfer_trtllm_bf16_routed_twin"], case)
    launch = SUBJECTS["flashinfer_trtllm_bf16_routed_twin"].prepare(case, inputs)
    assert launch.buffers["gemm1_weights"].shape[0] == named["gemm1_weights"].shape[0] - 1
    named |= {"local_expert_offset": 1, "local_num_experts": 7, "do_finalize": False}
    named |= {key: launch.buffers[key] for key in ("gemm1_weights", "gemm2_weights")}
    _, _, index = twins()["flashinfer.fused_moe.trtllm_bf16_routed_moe"](**named)
    assert torch.equal(index.view(5, 2) == -1, make_inputs(case).topk_ids == 0)


def test_rows_that_no_slot_maps_to_stay_as_they_were() -> None:
    """The buffer is torch.empty: nothing may be promised there, and nothing read from it."""
    function, named, output = recorded(SUBJECTS["flashinfer_trtllm_bf16_twin"], case_of("bf16"))
    rows, weights, index = function(**{**named, "do_finalize": False})
    assert rows.shape[0] > len(index)
    live = torch.zeros(rows.shape[0], dtype=torch.bool)
    live[index.long()] = True
    rows[~live] = torch.nan
    assert torch.equal(finalized(rows, weights, index), output)


@pytest.mark.parametrize(
    ("name", "recipe", "change", "says"),
    [
        ("fp8_block", "fp8_block-fp8_group", {"hidden_states_scale": lambda s: s.T}, "hidden_states_scale has incorrect shape"),
        ("fp8_block", "fp8_block-fp8_group", {"gemm1_weights_scale": lambda s: s[:, :1]}, "gemm1_weights_scale has incorrect"),
        ("fp8_block", "mxfp8-mxfp8", {"use_shuffled_weight": lambda s: False}, "must be true for MxFp8"),
        ("fp8_block", "mxfp8-mxfp8", {"gemm1_weights_scale": lambda s: s.view(torch.int8)}, "must be uint8"),
        ("fp8_tensor", "fp8_tensor-fp8_tensor", {"output1_scales_scalar": lambda s: s[:1]}, "incorrect dim 0"),
        ("fp8_tensor", "fp8_tensor-fp8_tensor", {"output2_scales_scalar": lambda s: None}, "is required"),
        ("fp4", "nvfp4-nvfp4", {"hidden_states_scale": lambda s: s[:, :4]}, "Only E2m1 weights"),
        ("fp4", "nvfp4-nvfp4", {"gemm1_weights_scale": lambda s: s.view(torch.uint8)}, "must be fp8"),
        ("mxint4", "mxint4", {"gemm1_weights_scale": lambda s: s[:, :, ::2]}, "unsupported weight_scale_vec_size"),
        ("bf16", "bf16", {"weight_layout": lambda s: 0}, "weight_layout must be BlockMajorK"),
        ("bf16", "bf16", {"gemm1_weights": lambda s: s[:, :1]}, "K dimension"),
        ("bf16", "bf16", {"local_expert_offset": lambda s: 1}, "expert offset and count"),
        ("bf16", "bf16", {"routing_method_type": lambda s: RoutingMethodType.Unspecified}, "Unimplemented routing method"),
        ("bf16", "bf16", {"routing_logits": lambda s: s.half()}, "routing_logits must be float or bfloat16"),
    ],
)
def test_a_broken_contract_is_refused(name: str, recipe: str, change: dict[str, Callable[..., Any]], says: str) -> None:
    function, named, _ = recorded(SUBJECTS[f"flashinfer_trtllm_{name}_twin"], case_of(recipe))
    with pytest.raises(RuntimeError, match=says):
        function(**{**named, **{key: make(named[key]) for key, make in change.items()}})


def test_scales_of_activations_are_linear_and_said_to_be() -> None:
    function, named, _ = recorded(SUBJECTS["flashinfer_trtllm_fp4_twin"], case_of("nvfp4-nvfp4"))
    with pytest.raises(NotImplementedError, match="layout_128x4"):
        function(**{**named, "hidden_states_scale_layout": SfLayout.layout_128x4})
    with pytest.warns(DeprecationWarning, match="hidden_states_scale_layout"):
        function(**{**named, "hidden_states_scale_layout": None})


def test_the_guard_names_a_scale_of_the_wrong_shape_before_the_call() -> None:
    """[experts, hidden / 128, rows / 128] has as many elements, and the kernel would read them."""
    case = case_of("fp8_block-fp8_group")
    subject = SUBJECTS["flashinfer_trtllm_fp8_block_twin"]
    launch = subject.prepare(case, make_inputs(case))
    scales = launch.buffers["gemm1_weights_scale"]
    launch.buffers["gemm1_weights_scale"] = scales.transpose(1, 2).contiguous()  # type: ignore[index]
    with pytest.raises(Violation, match=r"gemm1_weights_scale has shape \(8, 1, 2\), wanted \(8, 2, 1\)"):
        launch.call()


@pytest.mark.parametrize("name", METHODS)
def test_the_twin_routes_as_the_definition(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 32, generator=generator)
    rule, method, top_k = RULES[name], METHODS[name], 1 if name == "llama4" else 4
    bias = (torch.randn(32, generator=generator) / 8).bfloat16().float() if rule.biased else None
    groups = method.groups or (None, None)
    arguments = SimpleNamespace(
        routing_logits=logits,
        routing_bias=bias,
        num_experts=32,
        top_k=top_k,
        n_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=method.scale,
        routing_method_type=RoutingMethodType[method.member],
    )
    ids, weights = _trtllm_routing.route(arguments)
    wanted = rule(logits, bias, top_k)
    clear = wanted.margin > 1e-6
    assert clear.sum() > 60
    assert torch.equal(ids[clear], wanted.ids[clear])
    assert torch.equal(weights[clear], wanted.weights[clear].float().bfloat16())


def test_grouped_routing_rounds_the_bias_and_the_rest_does_not() -> None:
    """Why deepseek_v3 with a bias of 16 bits is refused in the real fill: another expert wins."""
    bias = torch.full((16,), -1.0)
    bias[0] += 2.0**-9  # rounds away in bf16: expert 1 has the higher sigmoid
    logits = torch.zeros(1, 16)
    logits[0, 1] = 2.0**-8
    a = SimpleNamespace(routing_logits=logits, routing_bias=bias, num_experts=16, top_k=1, routed_scaling_factor=1.0)
    a.routing_method_type, (a.n_group, a.topk_group) = RoutingMethodType.DeepSeekV3, (8, 4)
    assert _trtllm_routing.route(a)[0].tolist() == [[1]]
    a.n_group = a.topk_group = 1
    assert _trtllm_routing.route(a)[0].tolist() == [[0]]


def test_a_negative_weight_leaves_the_packed_expert_alone() -> None:
    ids, weights = torch.tensor([[5, 2047], [0, 7]]), torch.tensor([[-0.75, 0.5], [1.0, -2.0]])
    packed = packed_topk(ids, weights)
    assert torch.equal(packed, reference_topk.encode(ids, weights))
    unpacked = _trtllm_routing.unpack(SimpleNamespace(topk_ids=packed))
    assert torch.equal(unpacked[0], ids)
    assert torch.equal(unpacked[1], weights.bfloat16())


def test_float32_weights_of_a_pair_are_used_as_they_are() -> None:
    case = case_of("bf16")
    function, named, _ = recorded(SUBJECTS["flashinfer_trtllm_bf16_routed_twin"], case)
    ids, weights = make_inputs(case).topk_ids.int(), torch.full((3, 2), 1 / 3)
    narrow, wide = (function(**{**named, "topk_ids": (ids, w)}) for w in (weights.bfloat16(), weights))
    assert not torch.equal(narrow, wide)
    assert torch.equal(narrow, function(**{**named, "topk_ids": packed_topk(ids, weights)}))


def test_the_experts_chosen_can_be_replayed() -> None:
    case = case_of("bf16")
    function, named, _ = recorded(SUBJECTS["flashinfer_trtllm_bf16_twin"], case)
    replay = torch.full((5, 2), -7, dtype=torch.int16)
    function(**named, routing_replay_out=replay)
    assert torch.equal(replay[:3].long(), make_inputs(case).topk_ids)
    assert bool((replay[3:] == -7).all())
    with pytest.raises(ValueError, match="int16"):
        function(**named, routing_replay_out=replay.int())


def test_the_rows_of_gemm_2_have_room_for_any_routing() -> None:
    assert _trtllm_layer.padded_rows(1, 1, 8) == 8
    assert _trtllm_layer.padded_rows(33, 2, 8) == (8 + (66 - 8) // 8) * 8


def identity(x: Tensor, *unused: object) -> Tensor:
    return x


def interleaved_only(x: Tensor, *unused: object) -> Tensor:
    return twins()["flashinfer.shuffle_matrix_sf_a"](twins()["flashinfer.shuffle_matrix_a"](x.clone(), 64), 128)


@pytest.mark.parametrize(
    ("name", "recipe", "helper", "defect"),
    [
        ("bf16", "bf16", "reorder_rows_for_gated_act_gemm", identity),
        ("bf16", "bf16", "shuffle_matrix_a", identity),
        ("fp4", "nvfp4-nvfp4", "reorder_rows_for_gated_act_gemm", identity),
        ("fp4", "nvfp4-nvfp4", "shuffle_matrix_a", identity),
        ("fp4", "mxfp4", "shuffle_matrix_sf_a", identity),
        ("fp4", "mxfp4", "shuffle_matrix_sf_a", interleaved_only),
        ("mxint4", "mxint4", "shuffle_matrix_sf_a", identity),
        ("fp8_tensor", "fp8_tensor-fp8_tensor", "shuffle_matrix_a", identity),
    ],
)
def test_a_forgotten_layout_is_wrong(name: str, recipe: str, helper: str, defect: Callable[..., Tensor]) -> None:
    """Every byte is there and every shape is right: a comparison of kernel with kernel cannot see it."""
    subject = planted(SUBJECTS[f"flashinfer_trtllm_{name}_twin"], "defect", {f"flashinfer.{helper}": defect})
    verdict = run(case_of(recipe), subject, CPU, options=Options(checks=0))
    assert verdict.status is Status.WRONG


@pytest.mark.parametrize(
    ("name", "case", "says"),
    [
        ("bf16", "moe.bf16.t3.h192.i128.e8.k2.renormalize.swiglu.standard.real.s0", "hidden 192 is not a multiple of 128"),
        ("mxint4", "moe.mxint4.t3.h256.i128.e8.k2.renormalize.swiglu.standard.real.s0", "inter 128 is not a multiple of 256"),
        ("fp4", "moe.nvfp4-nvfp4.t3.h128.i64.e8.k2.renormalize.identity.standard.real.s0", "64 rows of w13"),
        ("fp4", "moe.mxfp4.t3.h128.i128.e8.k2.renormalize.swiglu_step.standard.real.s0", "mxfp4 takes"),
        ("bf16", "moe.bf16.t3.h128.i128.e16.k2.deepseek_v3.swiglu.standard.real.s0", "rounds the bias to bf16"),
        ("bf16", "moe.bf16.t3.h128.i128.e384.k8.deepseek_v3.swiglu.standard.exact.s0", "at most 32 a group"),
        ("bf16", "moe.bf16.t3.h128.i128.e16.k2.llama4.swiglu.standard.real.s0", "llama4 routes up to 128 experts, top 1"),
        ("fp8_block", "moe.mxfp8-mxfp8.t3.h128.i128.e4.k4.renormalize.swiglu.standard.real.s0", "more than top_k"),
        ("fp8_block", "moe.mxfp8-mxfp8.t3.h128.i128.e16.k8.deepseek_v3.swiglu.standard.exact.s0", "selected groups"),
        ("fp8_block_routed", "moe.mxfp8-mxfp8.t0.h128.i128.e16.k8.default.swiglu.standard.exact.s0", "no tokens"),
    ],
)
def test_a_refusal_names_the_constraint(name: str, case: str, says: str) -> None:
    subject = SUBJECTS[f"flashinfer_trtllm_{name}_twin"]
    assert says in subject.supports(Case.parse(case), CPU).reason


def test_natively_they_want_blackwell() -> None:
    for backend in BACKENDS:
        assert backend.archs == ("sm100", "sm103")
        assert not backend.supports(case_of("bf16"), CPU).ok
