"""The twins of FlashInfer's CUTLASS and SM90 CuTe-DSL fused MoE, and the adapters that call them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import with_twins
from harness.backends._flashinfer import MEMBERS, Placement
from harness.backends.base import CPU, Backend, Device
from harness.backends.flashinfer_cute_sm90 import BACKENDS as CUTE
from harness.backends.flashinfer_cutlass import BACKENDS as CUTLASS
from harness.backends.flashinfer_cutlass import ENTRY, SCALES, WEIGHTS
from harness.case import Case
from harness.entry import planting, twins
from harness.inputs import make_inputs
from harness.pipeline import Options, run
from harness.variants import shards
from harness.verdict import Status
from reference.activation import ACTIVATIONS

SUBJECTS = {b.name: b for b in with_twins((*CUTLASS, *CUTE)) if b.name.endswith("_twin")}
MODES = ("bf16", "fp8", "fp8_block", "w4a16", "w4a8", "mxfp8", "mxfp8_mxfp4", "nvfp4")
SHAPE = "t5.h256.i128.e4.k2.renormalize"
MOE, CUTE_MOE = twins()[ENTRY], twins()["flashinfer.fused_moe.cute_dsl_fused_moe_bf16"]
TWINNED = (ENTRY, WEIGHTS, SCALES, *(e for e in CUTE[0].entries if e not in CUTLASS[0].entries))
Arguments = dict[str, Any]


def subject(mode: str) -> Backend:
    return SUBJECTS[f"flashinfer_cutlass_{mode}_twin"]


def case_of(mode: str, fill: str = "real", activation: str = "swiglu", recipe: int = 0) -> Case:
    return Case.parse(f"moe.{subject(mode).recipes[recipe]}.{SHAPE}.{activation}.standard.{fill}.s0")


def handed(mode: str, activation: str = "swiglu") -> Arguments:
    """The arguments with which the mode's adapter calls the library."""
    seen: Arguments = {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return MOE(**given)

    case = case_of(mode, activation=activation)
    with planting({ENTRY: spy}):
        subject(mode).prepare(case, make_inputs(case)).call()
    return seen


@pytest.mark.parametrize("recipe", [0, -1])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_passes(mode: str, recipe: int) -> None:
    case = case_of(mode, recipe=recipe)
    for one in (case, case.vary(fill="exact")):
        verdict = run(one, subject(mode), CPU, options=Options(checks=0))
        assert verdict.status is Status.PASSED, verdict.reason
    verdict = run(case.vary(tokens=0), subject(mode), CPU, options=Options(checks=0))
    assert (verdict.status, "input_activations" in verdict.reason) == (Status.UNSUPPORTED, True)


@pytest.mark.parametrize("backend", ["flashinfer_cutlass_bf16", "flashinfer_cute_sm90", "flashinfer_cute_sm90_fused"])
def test_every_activation_passes(backend: str) -> None:
    """Gated or not, with constants handed over or the kernel's own."""
    chosen = SUBJECTS[f"{backend}_twin"]
    for activation in chosen.activations:
        case = Case.parse(f"moe.bf16.{SHAPE}.{activation}.standard.real.s0")
        verdict = run(case, chosen, CPU, options=Options(checks=0))
        assert verdict.status is Status.PASSED, f"{activation}: {verdict.reason}"


def test_a_gated_activation_is_one_to_the_library_too() -> None:
    from harness.twins.libs._flashinfer_layer import GATED, PLAIN
    from harness.twins.libs.flashinfer_enums import ActivationType

    for name, member in MEMBERS.items():
        assert (ActivationType[member] in GATED) == ACTIVATIONS[name].gated
        assert (ActivationType[member] in PLAIN) != ACTIVATIONS[name].gated


def parameters_in(wheel: Path, name: str) -> list[tuple[str, str]]:
    """(name, default) of every parameter of the function, as its source has them; "" without a default."""
    for path in sorted(wheel.glob("fused_moe/**/*.py")):
        if f"def {name}(" in (text := path.read_text()):
            functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name]
            for function in functions:
                a = function.args
                first = [""] * (len(a.args) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
                last = ["" if d is None else ast.unparse(d) for d in a.kw_defaults]
                return [(p.arg, d) for p, d in zip((*a.args, *a.kwonlyargs), (*first, *last), strict=True)]
    raise AssertionError(f"{name} is not in {wheel}")


@pytest.mark.parametrize("entry", TWINNED)
def test_a_twin_has_the_signature_of_the_wheel(entry: str) -> None:
    found = importlib.util.find_spec("flashinfer")
    if found is None or found.origin is None:
        pytest.skip("the signatures of FlashInfer: needs its wheel")
    wanted = parameters_in(Path(found.origin).parent, entry.rpartition(".")[2])
    given = inspect.signature(twins()[entry]).parameters
    assert list(given) == [name for name, _ in wanted]
    for name, text in wanted:
        default = given[name].default
        assert (default is inspect.Parameter.empty) == (text == ""), name
        if text and not text.startswith(("ActivationType", "DEFAULT")):
            assert default == ast.literal_eval(text), name


def test_a_module_that_is_not_compiled_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer compiles at the first call."""
    functions = {"cutlass_fused_moe": MOE, "ActivationType": object}
    env = {"FLASHINFER_AOT_DIR": tmp_path / "aot", "FLASHINFER_JIT_DIR": tmp_path / "jit"}
    for name, members in (
        ("flashinfer", {}),
        ("flashinfer.jit", {}),
        ("flashinfer.fused_moe", functions),
        ("flashinfer.jit.env", env),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    hopper = Device("cuda", "sm90")
    answer = CUTLASS[0].probe(hopper)
    assert answer.kind == "library"
    assert "fused_moe_90 is not compiled" in answer.reason
    (tmp_path / "jit" / "fused_moe_90").mkdir(parents=True)
    (tmp_path / "jit" / "fused_moe_90" / "fused_moe_90.so").touch()
    assert CUTLASS[0].probe(hopper).ok
    assert not CUTLASS[0].probe(Device("cuda", "sm100")).ok
    assert "has no flashinfer.fused_moe.interleave_moe" in CUTLASS[3].probe(hopper).reason


def test_the_result_is_a_list_whose_first_is_the_callers_output() -> None:
    given = handed("bf16")
    output = torch.full((5, 256), torch.nan, dtype=torch.bfloat16)
    result = MOE(**{**given, "output": output})
    assert isinstance(result, list)
    assert result[0] is output
    assert [tuple(t.shape) for t in result[1:]] == [(1,), (4, 5), (4,)]
    assert torch.equal(output, MOE(**given)[0])


@pytest.mark.parametrize("output", [torch.empty(5, 128, dtype=torch.bfloat16), torch.empty(5, 256)])
def test_another_output_is_refused(output: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Invalid (shape|dtype) of output"):
        MOE(**{**handed("bf16"), "output": output})


def test_an_adapter_that_gets_no_list_says_so() -> None:
    case = case_of("bf16")
    with planting({ENTRY: lambda **given: MOE(**given)[0]}):
        launch = subject("bf16").prepare(case, make_inputs(case))
    with pytest.raises(TypeError, match="returned Tensor, wanted a list of four"):
        launch.call()


def scale(index: int, make: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    """The same arguments with another scale number `index`."""

    def change(a: Arguments) -> Arguments:
        scales = list(a["quant_scales"])
        scales[index] = make(scales[index])
        return {**a, "quant_scales": scales}

    return change


BROKEN: tuple[tuple[str, str, Callable[[Arguments], Arguments]], ...] = (
    ("fp8", "Expecting 4 quant scales for fp8", lambda a: {**a, "quant_scales": a["quant_scales"][:3]}),
    ("fp8", r"fc1 dequant size must be \(num_experts_on_rank,\)", scale(0, lambda t: t[:1])),
    ("fp8", "fc2 quant must be scalar or", scale(1, lambda t: t.expand(3))),
    ("fp8", "fc1_input_dequant must be a 0D tensor", scale(3, lambda t: t[None])),
    ("nvfp4", "Expecting 6 quant scales for nvfp4", lambda a: {**a, "quant_scales": a["quant_scales"][1:]}),
    ("nvfp4", "Inconsistency of Tensor type: fc1_weight_block", scale(1, lambda t: t.view(torch.uint8))),
    ("nvfp4", "fc2 weight block size must be", scale(4, lambda t: t[:, :128])),
    ("nvfp4", "fc1 act global must be scalar or", scale(0, lambda t: t.expand(5))),
    ("mxfp8", "input_sf must be provided", lambda a: {**a, "input_sf": None}),
    ("mxfp8", "fc1 global size must be", scale(1, lambda t: t[:3])),
    ("mxfp8_mxfp4", "Expecting 4 quant scales for W4A8_MXFP4_MXFP8", lambda a: {**a, "quant_scales": []}),
    ("w4a16", "Expecting 2 quant scales for W4A16", lambda a: {**a, "quant_scales": []}),
    ("w4a16", "supports BF16 activations only", lambda a: {**a, "input": a["input"].half()}),
    ("w4a16", "Could not construct fused moe op", lambda a: {**a, "use_w4_group_scaling": False}),
    ("w4a8", "prequant scale must be shared across experts", scale(2, lambda t: t.repeat(4))),
    ("bf16", "Could not construct fused moe op", lambda a: {**a, "input": a["input"].float()}),
    (
        "bf16",
        "Tensor type: token_selected_experts",
        lambda a: {**a, "token_selected_experts": a["token_selected_experts"].long()},
    ),
    ("bf16", "same number of experts per token", lambda a: {**a, "token_final_scales": a["token_final_scales"][:, :1]}),
    ("bf16", "inter size must be equal to fc2", lambda a: {**a, "activation_type": 1}),
    ("bf16", "illegal memory access", lambda a: {**a, "token_selected_experts": a["token_selected_experts"] - 4}),
    ("bf16", r"alpha must have 4 element\(s\)", lambda a: {**a, "swiglu_alpha": torch.ones(1)}),
)


@pytest.mark.parametrize(("mode", "says", "change"), BROKEN)
def test_a_broken_contract_is_refused_as_the_binding_does(
    mode: str, says: str, change: Callable[[Arguments], Arguments]
) -> None:
    with pytest.raises(RuntimeError, match=says):
        MOE(**change(handed(mode)))


def test_the_kernel_looks_at_no_strides() -> None:
    """A transposed view of the same values is other memory: silent in the library, named by the guard before the call."""
    given = handed("bf16")
    turned = given["fc2_expert_weights"].mT.contiguous().mT
    assert torch.equal(turned, given["fc2_expert_weights"])
    assert not torch.equal(MOE(**{**given, "fc2_expert_weights": turned})[0], MOE(**given)[0])


def test_a_rank_is_one_of_equal_shards() -> None:
    whole = make_inputs(case_of("bf16"))
    assert Placement.of(whole) == Placement(1, 0, 0)
    first, rest = shards(whole)[:2]
    assert Placement.of(first) == Placement(4, 0, 0)
    assert Placement.of(rest) == Placement(2, 1, 2)  # ids 1..3 become 3..5
    assert Placement.of(replace(rest, local=range(2, 4))) == Placement(2, 1, 0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["flashinfer_cutlass_nvfp4_twin", "flashinfer_cute_sm90_twin"])
def test_the_ranks_add_up_to_the_layer(name: str) -> None:
    chosen = SUBJECTS[name]
    case = Case.parse(f"moe.{chosen.recipes[0]}.{SHAPE}.swiglu.standard.exact.s0")
    inputs = make_inputs(case)
    ranks = shards(inputs)[:2]
    parts = [chosen.prepare(case, part).call() for part in ranks]
    assert torch.equal(sum(parts, torch.zeros_like(parts[0])), chosen.prepare(case, inputs).call())
    assert all(part.any() for part in parts)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((4, 16), "weight must be 3D"), ((1, 8, 32), "divisible by 16"), ((1, 16, 16), "divisible by 64")],
)
def test_the_weight_interleave_refuses_what_the_library_refuses(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=says):
        twins()[WEIGHTS](torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("shape", "group", "says"),
    [
        ((64, 4), 32, "must be 3D"),
        ((1, 32, 4), 32, "divisible by 64"),
        ((1, 64, 3), 32, "scale groups"),
        ((1, 64, 4), 48, "divide 128"),
    ],
)
def test_the_scale_fold_refuses_what_the_library_refuses(shape: tuple[int, ...], group: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        twins()[SCALES](torch.zeros(shape, dtype=torch.uint8), group)


CUTE_BROKEN: tuple[tuple[str, Arguments], ...] = (
    ("Unsupported activation_type", {"activation_type": 4}),
    ("swiglu_limit must be positive and finite", {"swiglu_limit": float("inf")}),
    ("situ_linear_beta requires situ_beta", {"situ_linear_beta": 1.0}),
    ("must be a contiguous 2D", {"x": torch.zeros(64, 3, dtype=torch.bfloat16).T}),
    ("mismatched dtypes", {"x": torch.zeros(3, 64, dtype=torch.float16)}),
    ("does not match w1_weight", {"w2_weight": torch.zeros(2, 64, 64, dtype=torch.bfloat16)}),
    ("k mismatch", {"x": torch.zeros(3, 32, dtype=torch.bfloat16)}),
)


@pytest.mark.parametrize(("says", "other"), CUTE_BROKEN)
def test_cute_refuses_what_the_library_refuses(says: str, other: Arguments) -> None:
    given: Arguments = {
        "x": torch.zeros(3, 64, dtype=torch.bfloat16),
        "token_selected_experts": torch.zeros(3, 1, dtype=torch.int32),
        "token_final_scales": torch.ones(3, 1),
        "w1_weight": torch.zeros(2, 64, 64, dtype=torch.bfloat16),
        "w2_weight": torch.zeros(2, 64, 32, dtype=torch.bfloat16),
        "num_experts": 2,
        "top_k": 1,
    }
    assert CUTE_MOE(**given).shape == (3, 64)
    with pytest.raises(ValueError, match=says):
        CUTE_MOE(**{**given, **other})


def test_the_fused_finalize_rounds_every_partial_sum() -> None:
    """1 + 2**-8 + 2**-8: each addend is lost in bf16, both together are kept in fp32."""
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    w1 = torch.zeros(3, 32, 32, dtype=torch.bfloat16)
    w1[:, :, 0] = 1
    w2 = torch.zeros(3, 32, 32, dtype=torch.bfloat16)
    w2[:, :, 0] = 1
    scales = torch.tensor([[1.0, 2.0**-8, 2.0**-8]])
    ids = torch.arange(3, dtype=torch.int32)[None]
    for fused, wanted in ((True, 1.0), (False, 1.0078125)):
        out = CUTE_MOE(x, ids, scales, w1, w2, 3, 3, use_fused_finalize=fused, activation_type=6)
        assert torch.equal(out, torch.full_like(out, wanted))
