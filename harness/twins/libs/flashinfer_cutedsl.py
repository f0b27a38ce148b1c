"""FlashInfer's CuTe-DSL fused MoE, W4A4 (NVFP4) and W4A8 (MXFP4 weights, MXFP8 activations), and its scale layout helper.

Source: flashinfer-python 0.7.2.post1, fused_moe/cute_dsl/fused_moe.py and the two kernels behind it. Rows of w1 are up and
gate in turn, 64 at a time; GEMM 1's epilogue quantises the activation out of fp32; GEMM 2 multiplies alpha and routing weight,
rounds, and adds to the output in its type (atomics), or stores its rows for a sum in fp32 (`use_fused_finalize=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.twins.libs import _cutedsl as dsl
from reference.format import Format

FLT_MAX = torch.finfo(torch.float32).max  # tllm_enums.DEFAULT_SWIGLU_LIMIT
INTERLEAVE = 64  # rows: prepare._interleave_linear_and_gate
ATOM = 128  # rows of a scale tile; both kernels want whole ones along their N


def convert_sf_to_mma_layout(sf: Tensor, m: int, k: int, num_groups: int = 1, sf_vec_size: int = 16) -> Tensor:
    """Scale factors swizzled 128x4, group after group, as the strided view (32, 4, m tiles, 4, k tiles, groups)."""
    m_tiles, k_tiles = -(-m // ATOM), -(-k // (4 * sf_vec_size))
    expected = num_groups * m_tiles * k_tiles * ATOM * 4
    if sf.numel() != expected:
        raise ValueError(
            f"Scale factor tensor has {sf.numel()} elements, expected {expected} for m={m}, k={k}, num_groups={num_groups}"
        )
    return sf.view(num_groups, m_tiles, k_tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


@dataclass(frozen=True)
class _Weights:
    """One GEMM's weights: uint8 [experts, rows, columns / 2], scales as the kernel takes them, float32 alpha [experts]."""

    data: Tensor
    scales: Tensor
    alpha: Tensor
    fmt: Format

    def linear(self, expert: int, rows: Tensor) -> Tensor:
        """float32 alpha * rows @ expert.T."""
        block = self.fmt.scaling.group[1]  # type: ignore[union-attr]
        scales = dsl.mma_scales(self.scales[..., expert : expert + 1], self.data.shape[1], 2 * self.data.shape[2] // block)
        return rows @ dsl.fp4_values(self.data[expert], scales[0], self.fmt).T * self.alpha[expert]


def cute_dsl_fused_moe(  # noqa: PLR0913
    x: Tensor,
    x_sf: Tensor | None,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    w1_weight: Tensor,
    w1_weight_sf: Tensor,
    w1_alpha: Tensor,
    fc2_input_scale: Tensor | None,
    w2_weight: Tensor,
    w2_weight_sf: Tensor,
    w2_alpha: Tensor,
    num_experts: int,
    top_k: int,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    output_dtype: torch.dtype = torch.bfloat16,
    use_fused_finalize: bool = True,
    moe_output: Tensor | None = None,
    aux_stream: object = None,
    enable_pdl: bool = True,
    activation_type: int = dsl.SWIGLU,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    swiglu_limit: float = FLT_MAX,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    *,
    quant_mode: str = "w4a4",
    per_token_scale: Tensor | None = None,
    tactic: tuple[Any, ...] | None = None,
    localized_weights: list[Any] | None = None,
    localized_streams: list[Any] | None = None,
    localized_sm_count: int | None = None,
    localized_memset_stream: object = None,
    localized_allow_nonlocalized: bool = False,
    autotune_use_cuda_graph: bool = False,
) -> Tensor:
    """[tokens, hidden], in `moe_output` where that is given. A slot whose expert is not in [offset, offset + local) adds
    nothing. ValueError, TypeError or AssertionError as the library says them; the modes it does not do are refused."""
    call = SimpleNamespace(**locals())
    call.mode, call.local = _mode(call), num_experts if num_local_experts is None else num_local_experts
    fmt = dsl.NVFP4 if call.mode == "w4a4" else dsl.MXFP4
    first, second = _Weights(w1_weight, w1_weight_sf, w1_alpha, fmt), _Weights(w2_weight, w2_weight_sf, w2_alpha, fmt)
    rows = _input(call.mode, x, x_sf, fc2_input_scale)
    _check(call, rows, first, second)
    out = _output(moe_output, (len(rows), w2_weight.size(1)), output_dtype)
    return _finalized(_slots(call, rows, first, second), None if use_fused_finalize else token_final_scales, out)


def cute_dsl_fused_moe_nvfp4(  # noqa: PLR0913
    x: Tensor,
    x_sf: Tensor | None,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    w1_weight: Tensor,
    w1_weight_sf: Tensor,
    w1_alpha: Tensor,
    fc2_input_scale: Tensor | None,
    w2_weight: Tensor,
    w2_weight_sf: Tensor,
    w2_alpha: Tensor,
    num_experts: int,
    top_k: int,
    num_local_experts: int | None = None,
    local_expert_offset: int = 0,
    output_dtype: torch.dtype = torch.bfloat16,
    use_fused_finalize: bool = True,
    moe_output: Tensor | None = None,
    aux_stream: object = None,
    enable_pdl: bool = True,
    activation_type: int = dsl.SWIGLU,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    swiglu_limit: float = FLT_MAX,
    situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
    *,
    quant_mode: str = "w4a4",
    per_token_scale: Tensor | None = None,
    localized_weights: list[Any] | None = None,
    localized_streams: list[Any] | None = None,
    localized_sm_count: int | None = None,
    localized_memset_stream: object = None,
    localized_allow_nonlocalized: bool = False,
    autotune_use_cuda_graph: bool = False,
) -> Tensor:
    """`cute_dsl_fused_moe` under the name it has had since 0.6.4; it forwards every argument."""
    given = dict(locals())
    return cute_dsl_fused_moe(**given)


def _mode(call: SimpleNamespace) -> str:
    mode = {"nvfp4": "w4a4"}.get(call.quant_mode.lower(), call.quant_mode.lower())
    plain = call.per_token_scale is None and call.localized_weights is None
    if mode not in ("w4a4", "w4a8") or not plain:
        dsl.unsupported("quant_mode", (call.quant_mode, plain), ("w4a4 or w4a8", True))
    if mode == "w4a8" and not (call.use_fused_finalize and call.output_dtype == torch.bfloat16 and call.situ_beta is None):
        raise ValueError("quant_mode='w4a8': only torch.bfloat16 output, use_fused_finalize=True, no SiTU")
    return str(mode)


def _slots(call: SimpleNamespace, rows: Tensor, first: _Weights, second: _Weights) -> Tensor:
    """output_dtype [tokens, top_k, hidden]: what GEMM 2's epilogue hands on for every slot, 0 for those of other ranks."""
    ids = call.token_selected_experts.long() - call.local_expert_offset
    slots = torch.zeros(*ids.shape, second.data.shape[1], dtype=call.output_dtype, device=rows.device)
    for expert in range(call.local):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        middle = dsl.requantized(
            _activated(call, first.linear(expert, rows[token])), *_quantiser(call.mode, call.fc2_input_scale)
        )
        weight = call.token_final_scales[token, slot, None].float() if call.use_fused_finalize else 1.0
        slots[token, slot] = (second.linear(expert, middle) * weight).to(call.output_dtype)
    return slots


def _activated(call: SimpleNamespace, product: Tensor) -> Tensor:
    """float32: the activation of columns that are up and gate in turn, INTERLEAVE at a time."""
    if call.activation_type == dsl.RELU2:
        return dsl.activated(product, None, dsl.RELU2, (1.0, 0.0, FLT_MAX))
    if call.activation_type not in (dsl.SWIGLU, dsl.GEGLU_TANH):
        raise ValueError(f"Unsupported activation_type {call.activation_type!r}")
    up, gate = (half.flatten(1) for half in product.unflatten(1, (-1, 2, INTERLEAVE)).unbind(2))
    if call.situ_beta is not None:
        return dsl.situ(gate, up, call.situ_beta, call.situ_linear_beta)
    return dsl.activated(gate, up, call.activation_type, (call.swiglu_alpha, call.swiglu_beta, call.swiglu_limit))


def _input(mode: str, x: Tensor, x_sf: Tensor | None, fc2_input_scale: Tensor | None) -> Tensor:
    """float32 [tokens, hidden]: codes times linear block scales."""
    if x_sf is None:
        raise ValueError("x_sf is required for block-scaled MoE")
    if mode == "w4a4":
        if x.dtype is not torch.uint8:
            raise TypeError("quant_mode='w4a4' requires packed uint8 input")
        if fc2_input_scale is None:
            raise ValueError("fc2_input_scale is required when quant_mode='w4a4'")
        return dsl.fp4_values(x, _linear(x_sf, len(x), 2 * x.shape[1] // 16), dsl.NVFP4)
    if x.dtype is not torch.float8_e4m3fn:
        raise TypeError("quant_mode='w4a8' requires float8_e4m3fn input")
    if fc2_input_scale is not None:
        raise ValueError("fc2_input_scale must be None when quant_mode='w4a8'")
    if tuple(x_sf.shape) != (wanted := (x.shape[0], x.shape[1] // 32)):
        raise ValueError(f"x_sf must have shape {wanted}")
    return dsl.scaled(x.float(), x_sf, dsl.MXFP8)


def _linear(x_sf: Tensor, rows: int, blocks: int) -> Tensor:
    """The kernel takes the address and reads [rows, blocks] bytes, whatever the tensor's shape says."""
    flat = x_sf.reshape(-1)
    if flat.numel() < rows * blocks:
        raise IndexError(f"x_sf has {flat.numel()} scales, {rows * blocks} are read")
    return flat[: rows * blocks].view(rows, blocks)


def _check(call: SimpleNamespace, rows: Tensor, first: _Weights, second: _Weights) -> None:
    """AssertionError or ValueError where moe_sort, the wrappers or the kernels' can_implement say no."""
    ids, local, offset = call.token_selected_experts, call.local, call.local_expert_offset
    assert ids.size(1) == call.top_k, "token_selected_experts.size(1) must equal top_k"
    assert tuple(call.token_final_scales.shape) == tuple(ids.shape), "token_final_scales must equal num_tokens, top_k"
    if local != len(first.data) or offset + local > call.num_experts:
        raise IndexError(f"{len(first.data)} experts of weights for {local} from {offset} on: the kernel would read past them")
    n, hidden, inter = first.data.shape[1], 2 * first.data.shape[2], 2 * second.data.shape[2]
    columns = n // (1 if call.activation_type == dsl.RELU2 else 2)
    for name, given, wanted in (("A and B", rows.shape[1], hidden), ("GEMM2's A and B", columns, inter)):
        if given != wanted:
            raise ValueError(f"{name} logical K dimensions must match, got {given} and {wanted}")
    if n % ATOM:
        raise ValueError(f"GEMM1 output dim n={n} must be a multiple of 128.")
    unpacked = call.mode == "w4a8" and (hidden % ATOM or inter % ATOM)
    if second.data.shape[1] % ATOM or hidden % 32 or inter % 32 or unpacked:
        raise ValueError(f"Unsupported configuration: shape n={n}, hidden={second.data.shape[1]}, inter={inter}")


def _output(given: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The buffer that is written: the caller's, after the checks of the finalize kernel, or a new one."""
    if given is None:
        return torch.empty(shape, dtype=dtype)
    if tuple(given.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(given.shape)}")
    if given.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {given.dtype}")
    if not given.is_contiguous():
        raise ValueError("out must be contiguous")
    return given


def _quantiser(mode: str, fc2_input_scale: Tensor | None) -> tuple[Format, Tensor | None]:
    """norm_const_tensor[0]: one scale for all experts, whatever the tensor holds beyond."""
    return (dsl.MXFP8, None) if mode == "w4a8" else (dsl.NVFP4, fc2_input_scale.flatten()[0])  # type: ignore[union-attr]


def _finalized(slots: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """slots [tokens, top_k, hidden] summed into `out`: in its own type, or with weights in fp32 and rounded once."""
    if weights is not None:
        return out.copy_((slots.float() * weights.float().unsqueeze(-1)).sum(1))
    out.zero_()
    for slot in slots.unbind(1):
        out.copy_(out.float() + slot.float())
    return out


ENTRIES: dict[str, Callable[..., Any]] = {
    "flashinfer.cute_dsl.utils.convert_sf_to_mma_layout": convert_sf_to_mma_layout,
    "flashinfer.fused_moe.cute_dsl_fused_moe": cute_dsl_fused_moe,
    "flashinfer.fused_moe.cute_dsl_fused_moe_nvfp4": cute_dsl_fused_moe_nvfp4,
}
