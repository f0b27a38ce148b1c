"""Twins of FlashInfer's CuTe-DSL fused MoE of SM90, bf16 and fp16, and of its weight interleave, release 0.7.2.post1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.twins.libs._flashinfer_layer import GATED, activate, dense, expert_rows, finalize
from harness.twins.libs.flashinfer_enums import ActivationType
from reference.layouts.gated_interleave import gated_interleave

ROWS = 32  # of each half in turn
SUPPORTED = (ActivationType.Swiglu, ActivationType.GegluTanh, ActivationType.Relu2)
NO_LIMIT = torch.finfo(torch.float32).max  # tllm_enums.DEFAULT_SWIGLU_LIMIT


def cute_dsl_fused_moe_bf16(  # noqa: PLR0913  the library's signature
    x: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    w1_weight: Tensor,
    w2_weight: Tensor,
    num_experts: int,
    top_k: int,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    use_fused_finalize: bool = True,
    moe_output: Tensor | None = None,
    enable_pdl: bool = True,
    activation_type: int = ActivationType.Swiglu.value,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    swiglu_limit: float = NO_LIMIT,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    *,
    intermediate_buffer: Tensor | None = None,
    tactic: tuple[object, ...] | None = None,
) -> Tensor:
    """x [tokens, hidden], ids int32 and scales float32 [tokens, top_k], w1 [local experts, 2 * inter, hidden] with 32 up rows
    and 32 gate rows in turn (or [.., inter, hidden]), w2 [.., hidden, inter] -> [tokens, hidden] in x's dtype, in `moe_output`
    where it is given. ValueError as the library raises it.

    The fused finalize adds in the output's dtype, here slot after slot. `intermediate_buffer` stays as it was.
    """
    kind, values = _activation(activation_type, (swiglu_alpha, swiglu_beta, swiglu_limit), situ_beta, situ_linear_beta)
    _check(x, w1_weight, w2_weight, kind in GATED)
    if token_selected_experts.shape != (len(x), top_k):
        raise ValueError(f"token_selected_experts {tuple(token_selected_experts.shape)} is not [num_tokens, top_k={top_k}]")
    output = torch.empty_like(x) if moe_output is None else moe_output
    count = num_experts if num_local_experts is None else num_local_experts
    local = range(local_expert_offset, local_expert_offset + count)

    def expert(number: int, tokens: Tensor) -> Tensor:
        pre = x[tokens].float() @ w1_weight[number].float().T
        up, gate = (t.flatten(1) for t in pre.unflatten(1, (-1, 2, ROWS)).unbind(2)) if kind in GATED else (pre, None)
        middle = activate(kind, up, gate, values).to(x.dtype).float()
        row = middle @ w2_weight[number].float().T
        return row if use_fused_finalize else row.to(x.dtype).float()

    ids, scales = token_selected_experts, token_final_scales
    rows = expert_rows(ids, local, x.shape[1], expert)
    dense(output).copy_(_added(rows, ids, scales, x.dtype) if use_fused_finalize else finalize(rows, ids, scales, local))
    return output


def _added(rows: Tensor, ids: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted rows rounded to `dtype`, then added in it to a zeroed output; a slot of another rank has a row of zeros."""
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=dtype)
    for slot in range(ids.shape[1]):
        total = total + (rows[:, slot] * scales[:, slot, None]).to(dtype)
    return total


def _activation(
    number: int, swiglu: tuple[float, float, float], beta: float | None, linear_beta: float | None
) -> tuple[ActivationType, dict[str, float]]:
    """The epilogue's activation and its constants: Swiglu with a `situ_beta` is SiTU."""
    kind = ActivationType(number)
    if kind not in SUPPORTED:
        raise ValueError(f"Unsupported activation_type {kind!r}; expected {' or '.join(repr(t) for t in SUPPORTED)}")
    for name, value in zip(("alpha", "beta", "limit"), swiglu, strict=True):
        positive = name == "limit"
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"swiglu_{name} must be {'positive and ' if positive else ''}finite in fp32")
    if beta is None and linear_beta is not None:
        raise ValueError("situ_linear_beta requires situ_beta")
    if beta is not None and kind != ActivationType.Swiglu:
        raise ValueError("SiTU parameters require ActivationType.Swiglu")
    if beta is not None:
        return ActivationType.Situ, {"beta": beta, "linear_beta": math.inf if linear_beta is None else linear_beta}
    kind = ActivationType.SwigluBias if kind == ActivationType.Swiglu and swiglu != (1.0, 0.0, NO_LIMIT) else kind
    return kind, dict(zip(("alpha", "beta", "limit"), swiglu, strict=True))


def _check(x: Tensor, w1: Tensor, w2: Tensor, gated: bool) -> None:
    """What the two GEMMs' wrappers check."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != w1.dtype:
        raise ValueError(f"unsupported/mismatched dtypes: {x.dtype}, {w1.dtype}")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError("x must be a contiguous 2D [num_tokens, k] tensor")
    if w1.dim() != 3 or w1.stride(2) != 1:
        raise ValueError("w1_weight must be a 3D tensor, K-major (stride 1 along K)")
    if w1.shape[2] != x.shape[1]:
        raise ValueError(f"k mismatch: x k={x.shape[1]}, w1_weight k={w1.shape[2]}")
    inter = w1.shape[1] // (2 if gated else 1)
    if w2.shape[2] != inter:
        text = f"w1_weight ({w1.shape[1]} rows, {'gated' if gated else 'non-gated'} activation -> {inter})"
        raise ValueError(f"w2_weight intermediate size {w2.shape[2]} does not match {text}")
    if x.shape[1] % 8 or inter % (ROWS if gated else 8):
        raise ValueError(f"hidden {x.shape[1]} and intermediate {inter}: no tactic can implement them")


def interleave_up_gate_sm90(w_gate_up: Tensor) -> Tensor:
    """[experts, 2 * inter, K], gate rows above up rows -> the same shape: 32 up rows, 32 gate rows, in turn. ValueError where
    inter is no multiple of 32."""
    inter = w_gate_up.shape[1] // 2
    if inter % ROWS:
        raise ValueError(f"intermediate size {inter} must be a multiple of 32")
    layout = gated_interleave(ROWS)
    return torch.stack([layout.pack(torch.cat((one[inter:], one[:inter]))) for one in w_gate_up])


ENTRIES = {
    "flashinfer.fused_moe.cute_dsl_fused_moe_bf16": cute_dsl_fused_moe_bf16,
    "flashinfer.fused_moe.cute_dsl.sm90_contiguous_gather_grouped_gemm_act_fusion.interleave_up_gate_sm90": (
        interleave_up_gate_sm90
    ),
}
