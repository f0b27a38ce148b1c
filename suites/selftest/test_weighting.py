"""Routing weights on the input: what is multiplied, what is rounded, layers that multiply elsewhere; what our Triton kernels
compile to without them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends.base import CPU, Backend, Launch
from harness.backends.torch_grouped_mm import layer
from harness.case import Case
from harness.compare import compare
from harness.emulate import emulate
from harness.entry import planted, twins
from harness.inputs import Inputs, make_inputs
from harness.oracle import expect
from harness.pipeline import run
from harness.verdict import Status, Verdict
from reference.activation import ACTIVATIONS
from reference.rounding import Rounding

ON_INPUT = "moe.bf16.t33.h128.i64.e5.k1.default.swiglu.standard.real.oninput.s1"
BIASED = "moe.bf16.t17.h128.i64.e5.k2.renormalize.swiglu.standard.real.bias.s1"
BACKENDS = discover()
KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")


def judged(backend: Backend, text: str) -> Verdict:
    return run(Case.parse(text), backend, CPU)


def test_an_undeclared_rounding_of_weighted_rows_shows() -> None:
    """torch's GEMM can only read them in bf16."""
    case = Case.parse(ON_INPUT)
    inputs = make_inputs(case)
    assert compare(expect(case, inputs, KERNEL), emulate(inputs, replace(KERNEL, weighted_x="bf16"))).mean_z2 > 1.3


def test_only_activations_that_are_lines_through_zero_pass_factors_on() -> None:
    """Then one weight on the input is one on the output, and every kernel that mistakes them is right."""
    assert {a.name for a in ACTIVATIONS.values() if a.passes_factors} == {"relu", "identity"}


ENTRY = "flashinfer.fused_moe.trtllm_fp8_per_tensor_scale_routed_moe"
FP8_ON_INPUT = "moe.fp8_tensor-fp8_tensor.t33.h128.i128.e5.k1.default.swiglu.standard.real.oninput.s0"


def _output_instead(**given: object) -> object:
    """The flag is not looked at: weights multiply the output."""
    return twins()[ENTRY](**{**given, "use_routing_scales_on_input": False})


def _twice(**given: object) -> object:
    """vllm's fault of quantised experts: the finalize does not ask the flag (B026)."""
    ids = given["topk_ids"]
    assert isinstance(ids, Tensor)
    done = twins()[ENTRY](**given)
    assert isinstance(done, Tensor)
    weights = (ids << 16).view(torch.float32)
    return (done * weights).to(done.dtype) if given.get("do_finalize", True) else done


@pytest.mark.parametrize(("wrong", "kind"), [(_output_instead, "unweighted"), (_twice, "constant_factor")])
def test_weights_elsewhere_than_on_the_input_are_seen_and_named(wrong: Callable[..., object], kind: str) -> None:
    """Twice: with one expert a token, its row times a factor."""
    right = BACKENDS["flashinfer_trtllm_fp8_tensor_routed_twin"]
    assert judged(right, FP8_ON_INPUT).status is Status.PASSED
    verdict = judged(planted(right, "wrong", {ENTRY: wrong}), FP8_ON_INPUT)
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.kind == kind, verdict.reason


def _left_on_output(b: dict[str, Tensor]) -> Tensor:
    return layer(b, "swiglu", True)


def _on_both_sides(b: dict[str, Tensor]) -> Tensor:
    return layer({**b, "x": (b["x"].float() * b["topk_weights"]).to(b["x"].dtype)}, "swiglu", True)


@pytest.mark.parametrize(("wrong", "how"), [(_left_on_output, "output, not"), (_on_both_sides, "output as well as")])
def test_grouped_mm_weights_rows_before_its_first_gemm(wrong: Callable[[dict[str, Tensor]], Tensor], how: str) -> None:
    """A layer that multiplies elsewhere, or twice, is seen and named."""
    right = BACKENDS["torch_grouped_mm"]

    def prepare(case: Case, inputs: Inputs) -> Launch:
        launch = right.prepare(case, inputs)
        return replace(launch, call=lambda: wrong(launch.buffers))

    assert judged(right, ON_INPUT).status is Status.PASSED
    verdict = judged(replace(right, prepare=prepare, script=None), ON_INPUT)
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.kind == "unweighted"
    assert f"multiply the {how} the input" in verdict.reason


@pytest.mark.parametrize("text", [ON_INPUT, ON_INPUT.replace("k1", "k3").replace("swiglu", "gelu"), BIASED])
def test_grouped_mm_s_script_is_its_layer(text: str) -> None:
    case, backend = Case.parse(text), BACKENDS["torch_grouped_mm"]
    launch = backend.prepare(case, make_inputs(case))
    scope: dict[str, Any] = {"torch": torch}
    assert backend.script is not None
    exec(backend.script(case), scope)
    assert torch.equal(scope["call"](launch.buffers), launch.call())


def test_our_triton_kernels_multiply_the_sums_of_gemm_1(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    """Interpreted, in a child; in both cases a weight elsewhere is rejected, or the verdict were UNTRUSTED."""
    ids = [
        f"moe.{tail}.standard.real.oninput.s0"
        for tail in ("fp16.t9.h64.i32.e5.k1.default.swiglu", "nvfp4-fp16.t5.h64.i32.e4.k3.sigmoid.silu")
    ]
    chosen = [word for case in ids for word in ("-c", case)]
    answer = moecheck("run", "-b", "triton_moe", "--platform", "cpu", "--out", str(tmp_path / "run"), *chosen)
    assert "2 verdicts: 2 passed" in answer.out, answer


# -- what is compiled: a case without such weights runs the machine code that it ran before there were any

PTX = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def ptx(path, dtype, kind, factors, times):
    spec = importlib.util.spec_from_file_location(path.split("/")[-1][:-3], path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel, codes = module._gemm_kernel, dtype if kind == "plain" else "*u8"
    types = {"a_ptr": dtype, "w_ptr": codes, "s_ptr": codes, "f_ptr": "*fp32" if factors else codes, "c_ptr": dtype}
    types |= dict.fromkeys(("slots_ptr", "experts_ptr"), "*i32")
    types |= dict.fromkeys(("N", "K", "padded", "total", "divisor", "half"), "i32") | ({"t_ptr": "*fp32"} if times else {})
    constants = {"FACTORS": factors, "KIND": kind, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "t_ptr": None}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    given = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name not in types}
    return triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32)).asm["ptx"]

now, before = (ptx(path, "*fp16", "nvfp4", 2, False) for path in sys.argv[1:])
weighted = ptx(sys.argv[1], "*fp16", "nvfp4", 2, True)
print(now == before, weighted == now, ".target sm_90" in weighted)
"""
WEIGHTED = (
    "    t_ptr,\n",
    "    if t_ptr is not None:\n        acc = acc * tl.load(t_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]\n",
)


def test_weights_on_the_input_leave_no_trace_in_the_ptx_of_cases_without_them(tmp_path: Path) -> None:
    """Of the kernel, and of its source with the two places that know of them taken out; built for sm_90, on any machine."""
    pytest.importorskip("triton")
    source = Path(discover.__code__.co_filename).with_name("_triton_kernels.py").read_text()
    (tmp_path / "now.py").write_text(source)
    for text in WEIGHTED:
        assert source.count(text) == 1
        source = source.replace(text, "")
    (tmp_path / "before.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, "-c", PTX, str(tmp_path / "now.py"), str(tmp_path / "before.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True False True\n", done.stderr
