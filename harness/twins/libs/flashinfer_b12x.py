"""FlashInfer's b12x fused MoE of SM120, NVFP4: bf16 tokens in, everything else inside.

Source: flashinfer-python 0.7.2.post1, fused_moe/cute_dsl/b12x_moe.py and blackwell_sm12x/{moe_dispatch,moe_static_kernel}.py.
Four kernels stand behind the entry point, chosen by the number of slots. The twin rounds as the direct micro kernel (a few
slots: fp32 to the end) or as the static one: GEMM 2 in groups of 256 neurons, each written in bf16, times bf16(routing weight *
alpha), summed over slots in fp32. The atomics of the other two it does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.twins.libs import _cutedsl as dsl

BLOCK = 16
GROUP = 256  # moe_dispatch._STATIC_RETAINED_GROUP_N
LIMIT = 7.0  # moe_activation.SWIGLUOAI_DEFAULT_LIMIT
QUANTISER = dsl.NVFP4.using("vllm")  # quantize_block_fp4_fast: codes 0 where the block scale rounds to 0
PLAIN = (1.0, 0.0, torch.inf)
KINDS = {"silu": dsl.SWIGLU, "swigluoai_uninterleave": dsl.SWIGLU, "gelu_tanh": dsl.GEGLU_TANH, "relu2": dsl.RELU2}


def b12x_fused_moe(  # noqa: PLR0913
    x: Tensor,
    w1_weight: Tensor,
    w1_weight_sf: Tensor,
    w2_weight: Tensor,
    w2_weight_sf: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    num_experts: int,
    top_k: int,
    *,
    w1_alpha: Tensor,
    w2_alpha: Tensor,
    fc2_input_scale: Tensor | None = None,
    input_global_scale: Tensor | None = None,
    num_local_experts: int | None = None,
    expert_map: Tensor | None = None,
    output: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu",
    swiglu_alpha: float = 1.702,
    swiglu_beta: float = 1.0,
    swiglu_limit: float | None = None,
    activation_precision: str = "fp4",
    quant_mode: str | None = None,
    source_format: str = "modelopt",
) -> Tensor:
    """bf16 [tokens, hidden], in `output` where that is given. Rows of w1: up, then gate. A negative id adds nothing. Input
    scales in the decode sense; without `input_global_scale`, w1_alpha is both the alpha and the scale of x."""
    call = SimpleNamespace(**locals())
    _check(call)
    hidden, inter = w2_weight.shape[1], 2 * w2_weight.shape[2]
    slots = torch.zeros(*token_selected_experts.shape, hidden)
    scales = [dsl.mma_scales(w1_weight_sf, w1_weight.shape[1], hidden // BLOCK)]
    scales.append(dsl.mma_scales(w2_weight_sf, hidden, inter // BLOCK))
    for expert in range(num_experts):
        token, slot = (token_selected_experts == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        middle = _gemm1(call, expert, x[token].float(), scales[0][expert])
        down = dsl.fp4_values(w2_weight[expert], scales[1][expert], dsl.NVFP4)
        factor = token_final_scales[token, slot, None].float() * w2_alpha[expert]
        slots[token, slot] = middle @ down.T * factor if _direct(call) else _static(middle, down, factor)
    out = torch.empty_like(x) if output is None else output
    return out.copy_(slots.sum(1))


def _direct(call: SimpleNamespace) -> bool:
    """moe_dispatch.launch_sm120_static_moe: does the direct micro kernel take it?"""
    tokens, top_k = call.token_selected_experts.shape
    inter = -(-2 * call.w2_weight.shape[2] // GROUP) * GROUP
    return tokens <= 8 and tokens * top_k < 32 and inter <= 512 and call.x.shape[1] % 128 == 0  # type: ignore[no-any-return]


def _static(middle: Tensor, down: Tensor, factor: Tensor) -> Tensor:
    """The static kernel's partial rows, summed."""
    factor = factor.bfloat16().float()
    groups = [a @ b.T for a, b in zip(middle.split(GROUP, 1), down.split(GROUP, 1), strict=True)]
    return torch.stack([(g.bfloat16().float() * factor).bfloat16().float() for g in groups]).sum(0)


def _check(call: SimpleNamespace) -> None:
    """What the entry point refuses, in its words."""
    for name, dtype in (("output_dtype", call.output_dtype), ("output", getattr(call.output, "dtype", torch.bfloat16))):
        if dtype != torch.bfloat16:
            raise ValueError(f"b12x fused MoE only supports {name}=torch.bfloat16, got {dtype}.")
    mode = (call.quant_mode or call.activation_precision).lower()
    if mode not in ("fp4", "nvfp4", "w4a4"):
        dsl.unsupported("quant_mode", mode, "nvfp4")
    if call.expert_map is not None or call.num_local_experts not in (None, call.num_experts):
        raise NotImplementedError("b12x_fused_moe supports Expert Parallelism only for quant_mode='w4a16'")
    if call.fc2_input_scale is None:
        raise ValueError("fc2_input_scale is required when quant_mode='nvfp4'.")
    if call.activation not in KINDS:
        raise ValueError(f"unsupported activation {call.activation!r}")
    if call.x.dtype != torch.bfloat16 or not call.x.is_contiguous():
        raise ValueError(f"x: wanted contiguous bfloat16, got {call.x.dtype} with strides {call.x.stride()}")


def _of(scale: Tensor, expert: int) -> Tensor:
    """One scale for all experts, or one each."""
    return scale.reshape(-1)[expert if scale.numel() > 1 else 0]


def _gemm1(call: SimpleNamespace, expert: int, rows: Tensor, scales: Tensor) -> Tensor:
    """float32 [rows, inter]: the quantised activation's codes times block scales."""
    folded = call.w1_alpha if call.input_global_scale is None else call.w1_alpha * call.input_global_scale
    given = call.w1_alpha if call.input_global_scale is None else call.input_global_scale
    x = dsl.requantized(rows, QUANTISER, 1 / _of(given, expert))
    product = x @ dsl.fp4_values(call.w1_weight[expert], scales, dsl.NVFP4).T * _of(folded, expert)
    kind, limit = KINDS[call.activation], call.swiglu_limit or LIMIT
    swiglu = (call.swiglu_alpha, call.swiglu_beta, limit) if call.activation.startswith("swigluoai") else PLAIN
    up, gate = (None, product) if kind == dsl.RELU2 else product.chunk(2, dim=1)
    middle = dsl.activated(gate, up, kind, swiglu).bfloat16().float()
    return dsl.requantized(middle, QUANTISER, 1 / _of(call.fc2_input_scale, expert))


ENTRIES: dict[str, Callable[..., Any]] = {"flashinfer.fused_moe.b12x_fused_moe": b12x_fused_moe}
