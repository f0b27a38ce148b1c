"""vLLM's quantisers, activations and routers, as `vllm._custom_ops` and its MoE layer call them (0.25.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from harness.backends._ops import global_scale, matrix, packed, some_tokens, unswizzled
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.rounding import Rounding

OPS = "vllm._custom_ops"
ACTIVATION = "vllm.model_executor.layers.fused_moe.activation"
FP8_ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
FP4_ARCHS = ("sm100", "sm103", "sm120", "sm121")  # csrc/quantization/fp4 is built for these alone
ACTIVATIONS = {"swiglu": "SILU", "geglu": "GELU", "geglu_tanh": "GELU_TANH"}
V3_GROUPS, V3_KEPT, V3_SCALE = 8, 4, 2.5  # DeepSeek-V3 config.json
SIGMOID = 1  # scoring_func of ops.grouped_topk
BLOCK = 16


def _fp8(mode: str, case: Case, inputs: Inputs) -> Launch:
    """scaled_fp8_quant with a scale handed over ("static"), one for the tensor ("tensor") or one a token ("token")."""
    function, x = resolve(f"{OPS}.scaled_fp8_quant", inputs.device), inputs.x
    buffers = {"x": x}
    if mode == "static":
        buffers["scale"] = 1 / global_scale(inputs)

    def call() -> Tensor:
        codes, scales = function(x, buffers.get("scale"), use_per_token_if_dynamic=mode == "token")
        return matrix(codes, scales.view(-1, 1))

    return Launch(call, buffers, contract=(Argument("scale", torch.float32, (1,)),) if mode == "static" else ())


def _fp4(swizzled: bool, case: Case, inputs: Inputs) -> Launch:
    function, x, scale = resolve(f"{OPS}.scaled_fp4_quant", inputs.device), inputs.x, global_scale(inputs)
    shape = (case.shape.tokens, case.shape.hidden // BLOCK)

    def call() -> Tensor:
        codes, scales = function(x, scale, swizzled)
        return matrix(codes, unswizzled(scales, "swizzle_128x4" if swizzled else "linear", shape))

    contract = (Argument("x", x.dtype), Argument("global_scale", torch.float32, (1,)))
    return Launch(call, {"x": x, "global_scale": scale}, contract=contract)


def _activate(case: Case, inputs: Inputs) -> Launch:
    function = resolve(f"{ACTIVATION}.apply_moe_activation", inputs.device)
    kind = getattr(resolve(f"{ACTIVATION}.MoEActivation", inputs.device), ACTIVATIONS[case.activation])
    x, shape = inputs.x, (case.shape.tokens, case.shape.inter)

    def into(out: Tensor) -> object:
        return function(kind, out, x)

    def call() -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        into(out)
        return out

    return Launch(call, {"x": x}, out=into)


def _softmax(case: Case, inputs: Inputs) -> Launch:
    function, logits = resolve(f"{OPS}.topk_softmax", inputs.device), inputs.logits

    def call() -> Tensor:
        shape = (case.shape.tokens, case.shape.top_k)
        weights, ids, indices = (torch.empty(shape, dtype=t, device=logits.device) for t in (torch.float32, *[torch.int32] * 2))
        function(weights, ids, indices, logits, case.routing == "renormalize")
        return packed(ids, weights)

    return Launch(call, {"logits": logits})


def _grouped(case: Case, inputs: Inputs) -> Launch:
    function, logits, bias = resolve(f"{OPS}.grouped_topk", inputs.device), inputs.logits, inputs.bias
    assert bias is not None

    def call() -> Tensor:
        weights, ids = function(logits, V3_GROUPS, V3_KEPT, case.shape.top_k, True, V3_SCALE, bias, SIGMOID)
        return packed(ids, weights)

    return Launch(call, {"logits": logits, "bias": bias})


def _backend(
    name: str, op: str, entries: tuple[str, ...], prepare: Callable[[Case, Inputs], Launch], **more: object
) -> Backend:
    given: dict[str, object] = {
        **{"name": f"vllm_{name}", "op": op, "library": "vllm", "deterministic": True, "activations": (), "archs": FP8_ARCHS},
        **{
            "prepare": prepare,
            "entries": entries,
            "probe": needs(*entries),
            "twinned": True,
            "rounding": lambda case: Rounding(),
        },
    }
    return Backend(**{**given, **more})  # type: ignore[arg-type]


def _no_tokens(case: Case) -> str | None:
    """Seen on an H200, 0.25.1: nothing is raised, and the next launch of anybody fails with `invalid argument`."""
    return None if case.shape.tokens else "no tokens: a grid of no blocks, whose error is left behind"


def _quantiser(name: str, mode: str, recipe: str, rule: str) -> Backend:
    return _backend(
        *(name, "quantize", (f"{OPS}.scaled_fp8_quant",), partial(_fp8, mode)),
        recipes=(recipe, f"{recipe}-fp16", f"{recipe}-fp32"),
        rounding=lambda case: Rounding(x=rule),
        limits=() if mode == "token" else (Limit(("tokens",), _no_tokens),),
        summary=f"scaled_fp8_quant, {mode} scale",
    )


def _fp4_quantiser(name: str, swizzled: bool) -> Backend:
    return _backend(
        *(name, "quantize", (f"{OPS}.scaled_fp4_quant",), partial(_fp4, swizzled)),
        recipes=("nvfp4", "nvfp4-fp16"),
        archs=FP4_ARCHS,
        rounding=lambda case: Rounding(x="nvfp4:vllm"),
        summary=f"scaled_fp4_quant, {'128x4' if swizzled else 'linear'} scales",
    )


def _twice(case: Case) -> Rounding:
    """silu gives the tensor's type back before it meets up (csrc/activation_kernels.cu)."""
    return Rounding(activated=case.recipe.out, out=case.recipe.out)


BACKENDS = (
    _quantiser("scaled_fp8_quant_static", "static", "fp8_tensor", "e4m3"),
    _quantiser("scaled_fp8_quant_tensor", "tensor", "fp8_tensor", "fp8_tensor:vllm"),
    _quantiser("scaled_fp8_quant_token", "token", "fp8_token", "fp8_token:vllm"),
    _fp4_quantiser("scaled_fp4_quant_128x4", True),
    _fp4_quantiser("scaled_fp4_quant_linear", False),
    _backend(
        *("moe_activation", "activate", (f"{ACTIVATION}.apply_moe_activation", f"{ACTIVATION}.MoEActivation"), _activate),
        recipes=("bf16", "fp16"),
        activations=tuple(ACTIVATIONS),
        rounding=_twice,
        exempt={name: "the kernel takes rows to be dense and checks no stride" for name in ("out_strided", "strided_inputs")},
        summary="silu_and_mul, gelu_and_mul, gelu_tanh_and_mul",
    ),
    _backend(
        *("topk_softmax", "route", (f"{OPS}.topk_softmax",), _softmax),
        recipes=("fp32", "bf16"),
        routings=("default", "renormalize"),
        limits=(some_tokens("topk_softmax_kernels.cu"),),
        summary="softmax, then top-k, renormalised on request",
    ),
    _backend(
        *("grouped_topk", "route", (f"{OPS}.grouped_topk",), _grouped),
        recipes=("fp32",),
        routings=("deepseek_v3",),
        limits=(
            Limit(("top_k",), lambda case: None if case.shape.top_k <= 32 else "topk must be <= 32 (grouped_topk_router.py)"),
            some_tokens("grouped_topk_kernels.cu"),
        ),
        exempt={"strided_inputs": "it takes rows to be dense and checks no stride (grouped_topk_kernels.cu, 0.25.1)"},
        summary="grouped_topk with sigmoid and bias",
    ),
)
