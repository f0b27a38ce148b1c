"""Ops beside the layer: their ids, their inputs, and that a wrong quantiser, activation or router is named."""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU, Backend
from harness.case import NEUTRAL, OPS, Case
from harness.entry import planted, twins
from harness.errors import CaseError, UnknownName
from harness.inputs import make_inputs
from harness.op_answers import promised
from harness.oracle import expect
from harness.pipeline import run
from harness.select import plan_backend
from harness.shrink import Search
from harness.space import below
from harness.steady import signature
from harness.verdict import Status, Verdict
from reference.formats import get
from reference.layouts.linear import pack_nibbles
from reference.routing import RULES

FP4 = "flashinfer.quantization.fp4_quantize"
SITE = Path(sysconfig.get_path("purelib"))
IDS = (
    "quantize.nvfp4.t33.h256.real.s0",
    "quantize.mxfp4-fp16.t9.h64.edges.s3",
    "activate.bf16.t5.i33.swiglu.exact.s0",
    "route.fp32.t33.e256.k8.deepseek_v3.real.s0",
    "route.bf16.t3.e8.k2.default.real.hot.s0",
)


def judged(backend: Backend, name: str, functions: dict[str, Callable[..., Any]], case: str) -> Verdict:
    return run(Case.parse(case), planted(backend, name, functions), CPU)


@pytest.mark.parametrize("text", IDS)
def test_an_id_names_the_axes_of_its_op_and_the_rest_is_neutral(text: str) -> None:
    case = Case.parse(text)
    assert case.id == text
    assert case.vary(**case.axes) == case
    assert all(
        case.axes[axis] == value
        for axis, value in NEUTRAL.items()
        if axis in case.axes and axis not in (*OPS[case.op].axes, "seed")
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("quantize.bf16.t3.h64.real.s0", "wanted a format with scales"),
        ("quantize.nvfp4.t3.h60.real.s0", "not a multiple of 16"),
        ("quantize.nvfp4.t3.h64.exact.s0", "no fill exact"),
        ("quantize.nvfp4-fp8_token.t3.h64.real.s0", "reads one plain type"),
        ("quantize.fp8_block.t3.h128.real.s0", "per tensor, token or group of a row"),
        ("activate.nvfp4.t3.i64.swiglu.real.s0", "one plain type"),
        ("activate.bf16.t3.i64.relu2.exact.s0", "no exact fill"),
        ("route.fp32.t3.e8.k9.default.real.s0", "exceeds experts"),
        ("moe.bf16.t4.h64.i32.e16.k2.renormalize.swiglu.standard.edges.s0", "no fill edges"),
    ],
)
def test_an_impossible_case_of_an_op_says_why(text: str, why: str) -> None:
    with pytest.raises(CaseError, match=why):
        Case.parse(text)


def test_an_op_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnknownName, match="op 'mole'"):
        Case.parse("mole.bf16.t4.h64.i32.e16.k2.renormalize.swiglu.standard.exact.s0")


def test_the_edges_fill_holds_ties_zeros_subnormals_and_the_largest_numbers() -> None:
    for recipe in ("nvfp4", "mxfp4-fp16", "mxfp8", "fp8_token"):
        case = Case.parse(f"quantize.{recipe}.t8.h64.edges.s0")
        inputs, fmt = make_inputs(case), get(case.recipe.weights)
        x, info = inputs.x, torch.finfo(inputs.x.dtype)
        scale = None if inputs.x_scale is None else torch.tensor(inputs.x_scale)
        below = fmt.decode(fmt.encode(x[:1], scale))
        above = 2 * x[:1].double() - below  # as far on the other side: a code as well where x is a tie
        assert ((fmt.decode(fmt.encode(above, scale)) == above) & (above != below)).sum() > 32, recipe
        assert not x[7].any()
        assert ((x[1].abs() > 0) & (x[1].abs() < info.smallest_normal)).any()
        assert x[2].abs().max() == info.max
        assert x.isfinite().all()


def test_every_planned_op_case_of_every_subject_here_is_one_it_takes() -> None:
    for backend in discover().values():
        if backend.op != "moe" and "cpu" in (backend.archs or ("cpu",)):
            axes: dict[str, list[int | str]] = {"tokens": [0, 3], "hidden": [128], "inter": [8], "experts": [64], "top_k": [1]}
            axes |= {
                "recipe": list(backend.recipes),
                "fill": ["real"],
                "skew": ["uniform"],
                "activation": ["swiglu", "geglu", "geglu_tanh"],
            }
            cases = plan_backend({**axes, "routing": list(RULES)}, backend, CPU, 1)
            assert cases, backend.name
            assert {case.op for case in cases} == {backend.op}


def test_a_quantiser_that_writes_nothing_is_named() -> None:
    """flashinfer's fp4_quantize on SM90: outputs of torch.empty, no exception. A round trip of zeros would look like noise."""

    def fp4_quantize(input: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        rows, columns = input.shape
        return torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // 16, dtype=torch.uint8)

    linear = discover()["flashinfer_fp4_quantize_linear_twin"]
    verdict = judged(linear, "nothing", {FP4: fp4_quantize}, "quantize.nvfp4.t33.h256.real.s0")
    assert verdict.status is Status.WRONG
    assert verdict.findings[0].check == "never_written"
    assert "4752 of 4752" in verdict.findings[0].text


def half_rounded(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """Another rule for the same format: OCP's floor of the exponent."""
    q = get("mxfp4:ocp").encode(x)
    assert q.scales is not None
    return pack_nibbles(q.codes), q.scales


def swapped(x: Tensor, scale: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    q = get("nvfp4:fast").encode(x, scale)
    assert q.scales is not None
    packed = pack_nibbles(q.codes)
    return packed >> 4 | packed << 4, q.scales


def rolled(x: Tensor, scale: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    q = get("nvfp4:fast").encode(x, scale)
    assert q.scales is not None
    return pack_nibbles(q.codes), q.scales.roll(1, 1)


@pytest.mark.parametrize(
    ("function", "recipe", "says"),
    [
        (half_rounded, "mxfp4", "of scales differ"),
        (swapped, "nvfp4", "and 0 of scales differ"),
        (rolled, "nvfp4", "scales are those of the neighbouring groups"),
    ],
)
def test_a_wrong_quantiser_is_told_by_its_bytes(function: Callable[..., Any], recipe: str, says: str) -> None:
    linear = discover()["flashinfer_fp4_quantize_linear_twin"]
    verdict = judged(linear, "wrong", {FP4: function}, f"quantize.{recipe}.t9.h128.real.s0")
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert says in verdict.reason


def test_ties_rounded_away_show_in_the_edges_fill_alone() -> None:
    """Random values hardly ever lie in the middle: a quantiser that rounds halves up passes them."""

    def function(x: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        q = get("mxfp4").encode(x)
        assert q.scales is not None
        scaled = x.float() / torch.exp2(q.scales.float() - 127).repeat_interleave(32, 1)
        away = get("mxfp4").element.encode(torch.where(scaled.isfinite(), scaled * (1 + 2.0**-20), scaled))
        return pack_nibbles(away.to(torch.uint8)), q.scales

    linear = discover()["flashinfer_fp4_quantize_linear_twin"]
    assert judged(linear, "away", {FP4: function}, "quantize.mxfp4-fp16.t1.h64.edges.s0").status is Status.WRONG


def test_the_wrong_halves_of_an_activation_are_named() -> None:
    name = "flashinfer.activation.silu_and_mul"

    def silu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
        up, gate = input.float().chunk(2, -1)
        result = (torch.nn.functional.silu(gate) * up).to(input.dtype)
        return result if out is None else out.copy_(result)

    backend = discover()["flashinfer_silu_and_mul_twin"]
    verdict = judged(backend, "swapped", {name: silu_and_mul}, "activate.bf16.t5.i64.swiglu.real.s0")
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.kind == "gate_up_swap"
    exact = judged(backend, "swapped_exact", {name: silu_and_mul}, "activate.bf16.t5.i64.swiglu.exact.s0")
    assert exact.status is Status.WRONG


def deepseek(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Callable[..., Any]]:
    """fused_topk_deepseek's twin with (weights, ids) changed on their way out."""
    name = "flashinfer.fused_moe.fused_topk_deepseek"
    right = twins()[name]

    def fused_topk_deepseek(*args: Any) -> None:
        right(*args)
        weights, ids = change(args[6].clone(), args[7].clone())
        args[6].copy_(weights)
        args[7].copy_(ids)

    return {name: fused_topk_deepseek}


def scores_off_by(error: float, weights: Tensor) -> Tensor:
    """Scores alternately too large and too small, then normalised: the sum of a token's weights stays."""
    off = weights * (1 + error * torch.tensor([1.0, -1.0]).repeat(weights.shape[1] // 2))
    return off * (weights.sum(1, keepdim=True) / off.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda w, i: (w.flip(1), i.flip(1)), True),  # the order within a token is free
        (lambda w, i: (w.flip(1), i), False),
        (lambda w, i: (w, (i + 1) % 64), False),
        (lambda w, i: (w / 2.5, i), False),  # the routed scaling factor left out
        (lambda w, i: (w * (1 + 2.0**-12), i), False),  # 0.02 %: a tolerance of 1e-3 passes it
        (lambda w, i: (scores_off_by(2.0**-13, w), i), True),  # tanh.approx.f32 gives no more than that
        (lambda w, i: (scores_off_by(2.0**-9, w), i), False),
    ],
)
def test_a_router_may_order_its_experts_and_nothing_else(change: Callable[..., Any], passes: bool) -> None:
    backend = discover()["flashinfer_fused_topk_deepseek_twin"]
    verdict = judged(backend, "router", deepseek(change), "route.fp32.t9.e64.k4.deepseek_v3.real.s0")
    assert (verdict.status is Status.PASSED) is passes, verdict.reason


def test_another_choice_among_equal_logits_is_as_right() -> None:
    """Lower or higher index: a comparison with one reference's ids would fail a right kernel."""
    name = "vllm._custom_ops.topk_softmax"
    right = twins()[name]

    def topk_softmax(weights: Tensor, ids: Tensor, indices: Tensor, logits: Tensor, renormalize: bool = False) -> None:
        right(weights, ids, indices, logits.flip(1), renormalize)
        ids.copy_(logits.shape[1] - 1 - ids)

    backend = discover()["vllm_topk_softmax_twin"]
    case = "route.fp32.t9.e8.k3.default.edges.s0"
    assert judged(backend, "last", {name: topk_softmax}, case).status is Status.PASSED
    expected, inputs = expect(Case.parse(case), make_inputs(Case.parse(case)), None), make_inputs(Case.parse(case))
    wrong = expected.read(torch.zeros(promised(Case.parse(case))[0], dtype=torch.int32))
    assert wrong.isnan().any(-1).all()
    assert inputs.logits.unique().numel() < inputs.logits.numel()


def test_a_scale_of_another_shape_is_refused_as_the_library_refuses_it() -> None:
    with pytest.raises(RuntimeError, match=r"globalScale should have shape \[1\] or \[num_tokens\]"):
        twins()[FP4](torch.ones(5, 64).bfloat16(), torch.ones(3))


def test_a_failing_op_case_shrinks_along_its_own_axes() -> None:
    linear = discover()["flashinfer_fp4_quantize_linear_twin"]
    backend, case = planted(linear, "rolled", {FP4: rolled}), Case.parse("quantize.nvfp4.t9.h128.real.s0")
    wanted = signature(run(case, backend, CPU))
    search = Search(lambda c: run(c, backend, CPU), below(case, backend), wanted)
    smallest = search.shrink(case)
    assert (smallest.shape.tokens, smallest.shape.hidden) == (1, 32)


def parameters(source: str, function: str) -> list[tuple[str, str]]:
    """(name, default as written) of a function of a source file."""
    tree = ast.parse(source)
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    spec = found.args
    defaults = [""] * (len(spec.args) - len(spec.defaults)) + [ast.unparse(d) for d in spec.defaults]
    named = [ast.unparse(d) if d is not None else "" for d in spec.kw_defaults]
    return [*zip((a.arg for a in spec.args), defaults, strict=True), *zip((a.arg for a in spec.kwonlyargs), named, strict=True)]


@pytest.mark.parametrize(
    ("file", "function"),
    [
        ("quantization/fp4_quantization.py", "fp4_quantize"),
        ("quantization/fp4_quantization.py", "nvfp4_quantize"),
        ("quantization/fp4_quantization.py", "mxfp4_quantize"),
        ("quantization/fp8_quantization.py", "mxfp8_quantize"),
        ("activation.py", "silu_and_mul"),
        ("activation.py", "gelu_and_mul"),
        ("activation.py", "gelu_tanh_and_mul"),
        ("fused_moe/fused_routing_dsv3.py", "fused_topk_deepseek"),
    ],
)
def test_a_twin_is_called_as_the_wheel_is(file: str, function: str) -> None:
    wheel = SITE / "flashinfer" / file
    if not wheel.is_file():
        pytest.skip("wants the flashinfer wheel: make witnesses")
    twin = next(f for name, f in twins().items() if name.startswith("flashinfer.") and name.endswith(f".{function}"))
    mine = parameters(Path(inspect.getfile(twin)).read_text(), function)
    assert mine == parameters(wheel.read_text(), function)
