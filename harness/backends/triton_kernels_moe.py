"""triton_kernels (matmul_ogs with the fused clamped SwiGLU), as vLLM calls and bundles it: MXFP4 or bf16 weights times bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import Stack, biases, pack
from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import BIASES, Case
from harness.inputs import Inputs
from reference.rounding import Rounding

MODULE = f"{_vllm.FUSED_MOE}.experts.gpt_oss_triton_kernels_moe"
EXPERTS, ROUTE = f"{MODULE}.triton_kernel_fused_experts", f"{MODULE}.make_routing_data"
SWIZZLE = f"{_vllm.QUANT_UTILS}.mxfp4_utils._swizzle_mxfp4"
CONFIG = f"{_vllm.FUSED_MOE}.config.mxfp4_w4a16_moe_quant_config"
PLAIN = f"{_vllm.FUSED_MOE}.config.FUSED_MOE_UNQUANTIZED_CONFIG"
BIASED = f"{_vllm.FUSED_MOE}.config.biased_moe_quant_config"
MATMUL = "triton_kernels.matmul_ogs"


def probe(device: Device) -> Support:
    """vLLM's wrapper, which puts its own copy in sys.modules where none is installed, and triton-lang's matmul_ogs."""
    found = _vllm.needs(EXPERTS, ROUTE, SWIZZLE)(device)
    if not found.ok:
        return found
    if not _vllm.library("vllm.utils.import_utils.has_triton_kernels")():
        return Support.no("library", "vllm finds no triton_kernels")
    if not _vllm.needs(f"{MATMUL}.matmul_ogs")(device).ok:
        return Support.no(
            "library", f"the installed triton_kernels has no {MATMUL}: PyPI's package of that name is another one"
        )
    return YES


def rounding(case: Case) -> Rounding:
    """The activation in GEMM 1's epilogue and the routing weight in GEMM 2's act on fp32; make_routing_data hands the weights
    over in bf16; rows are reduced in fp32."""
    return Rounding(middle="bf16", routing_weight="bf16", weighted="bf16", out="bf16")


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, hidden, 2 * inter], gate and up columns alternating, and w2 [experts, inter, hidden]; swizzled if MXFP4."""
    stacks = pack(case, inputs)
    buffers, weights = _vllm.step(inputs), []
    scales: list[Any] = []
    for name, stack in zip(("w13", "w2"), stacks, strict=True):
        data = _vllm.ordered(case, stack.data) if name == "w13" else stack.data
        if case.recipe.weights == "bf16":
            weights.append(data.transpose(-2, -1))
            buffers[name] = weights[-1]
            continue
        swizzled, config = mxfp4(data, _ordered_scales(case, name, stack))
        weights.append(swizzled)
        scales.append(config)
        buffers |= {name: swizzled.storage.data, f"{name}_scales": config.weight_scale.storage.data}
    added = biases(inputs, torch.float32)  # which triton_kernel_fused_experts asserts
    if added:
        added["w13_bias"] = _vllm.ordered(case, added["w13_bias"])
        buffers |= added
    quant = _described(scales, added)
    return Launch(_call(case, buffers, weights, quant), buffers, contract=_vllm.contract(case))


def _described(scales: list[Any], added: dict[str, Tensor]) -> Any:
    """vLLM's description of weights with or without scales and biases."""
    if scales:
        return _vllm.library(CONFIG)(*scales, w1_bias=added.get("w13_bias"), w2_bias=added.get("w2_bias"))
    if added:
        return _vllm.library(BIASED)(w1_bias=added["w13_bias"], w2_bias=added["w2_bias"])
    return _vllm.library(PLAIN)


def _ordered_scales(case: Case, name: str, stack: Stack) -> Tensor:
    assert stack.scales is not None
    return _vllm.ordered(case, stack.scales) if name == "w13" else stack.scales


def mxfp4(data: Tensor, scales: Tensor) -> tuple[Any, Any]:
    """(weights, PrecisionConfig with their scales) in the layouts of this device: vLLM oracle/mxfp4.py."""
    swizzled, flex, moved = _vllm.library(SWIZZLE)(data, scales)
    context = _vllm.library(f"{MATMUL}.FlexCtx")(rhs_data=flex)
    return swizzled, _vllm.library(f"{MATMUL}.PrecisionConfig")(weight_scale=moved, flex_ctx=context)


def _call(case: Case, b: dict[str, Tensor], weights: list[Any], quant: Any) -> Callable[[], Tensor]:
    experts, route = _vllm.library(EXPERTS), _vllm.library(ROUTE)
    shape = case.shape

    def call() -> Tensor:
        routing, gather, scatter = route(b["ids"], b["topk_weights"], shape.experts)
        x = b["x"]
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        done: Tensor = experts(
            output, x, weights[0], weights[1], routing, gather, scatter, topk=shape.top_k, quant_config=quant
        )
        return done

    return call


BACKENDS = (
    Backend(
        name="triton_kernels",
        library="vllm",
        deterministic=True,
        recipes=("bf16", "mxfp4"),
        activations=("swiglu_oai",),  # swiglu_fn adds 1 to the linear half, whatever its parameters
        archs=("sm90", "sm100", "sm103"),
        rounding=rounding,
        probe=probe,
        limits=(_vllm.SOME_TOKENS,),
        biases=BIASES,
        prepare=prepare,
        exempt={"duplicate_expert": "the routing is a bit matrix: an expert is in a row or not"},
        entries=(EXPERTS, ROUTE, SWIZZLE),
        summary="triton_kernels matmul_ogs as vLLM bundles it: MXFP4 (Hopper value and scale swizzle) or bf16 weights",
    ),
)
