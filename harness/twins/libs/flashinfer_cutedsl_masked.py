"""FlashInfer's masked NVFP4 pipeline: quantise [experts, rows, k] slabs, grouped GEMM, activate and quantise.

Source: flashinfer-python 0.7.2.post1: quantization/fp4_quantization.py and nv_internal/tensorrt_llm/thop/fp4Quantize.cpp,
gemm/kernels/grouped_gemm_masked_{wrapper,blackwell}.py. Rows from mask[e] on are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.twins.libs import _cutedsl as dsl

BLOCK = 16
LEGACY = object()  # flashinfer's _UNSET: the recipe comes from FLASHINFER_NVFP4_4OVER6*, which nobody sets here
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def scaled_fp4_grouped_quantize(
    a: Tensor, mask: Tensor, a_global_sf: Tensor, nvfp4_4over6: object = LEGACY
) -> tuple[Tensor, Tensor]:
    """a [experts, rows, k] bf16 or fp16, mask int32 [experts], a_global_sf float32 [experts] (encode sense; the docstring of
    the library says [1], its C++ counts experts by it) -> (uint8 (rows, k / 2, experts), e4m3 in the 6-D MMA view)."""
    return _quantized(a, mask, a_global_sf, a.shape[2], lambda rows: rows.float())


def silu_and_mul_scaled_nvfp4_experts_quantize(
    a: Tensor, mask: Tensor, a_global_sf: Tensor, nvfp4_4over6: object = LEGACY
) -> tuple[Tensor, Tensor]:
    """The same of silu(first half) * second half of a [experts, rows, 2 k], rounded to a's dtype in between."""

    def product(rows: Tensor) -> Tensor:
        gate, up = rows.float().chunk(2, dim=-1)
        return (gate * torch.sigmoid(gate) * up).to(a.dtype).float()

    return _quantized(a, mask, a_global_sf, a.shape[2] // 2, product)


def _quantized(a: Tensor, mask: Tensor, global_sf: Tensor, k: int, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    experts, rows, _ = a.shape
    _check(a, mask, global_sf, k)
    high, wide = -(-rows // 128) * 128, -(-(k // BLOCK) // 4) * 4
    codes = torch.empty(experts, rows, k // 2, dtype=torch.uint8, device=a.device)
    scales = torch.empty(experts, high, wide // 4, dtype=torch.int32, device=a.device)
    tiles = scales.view(torch.uint8).view(experts, high // 128, wide // 4, 32, 4, 4)
    row, column = torch.arange(rows), torch.arange(k // BLOCK)
    place = ((row // 128)[:, None], (column // 4)[None], (row % 32)[:, None], (row % 128 // 32)[:, None], (column % 4)[None])
    for expert, live in enumerate(mask.clamp(max=rows).tolist()):
        if live:
            q = dsl.NVFP4.using("fast").encode(value(a[expert, :live]), global_sf[expert])
            assert q.scales is not None
            codes[expert, :live] = q.codes[:, 0::2] | q.codes[:, 1::2] << 4
            mine = tuple(index[:live] if len(index) > 1 else index for index in place)
            tiles[expert].index_put_(mine, q.scales)
    return codes.permute(1, 2, 0), tiles.view(torch.float8_e4m3fn).permute(3, 4, 1, 5, 2, 0)


def _check(a: Tensor, mask: Tensor, global_sf: Tensor, k: int) -> None:
    """What the wrapper asserts and the C++ entry checks, in their order."""
    assert k % BLOCK == 0, f"k must be multiple of 16, but got {k}."
    for name, tensor in (("input", a), ("input_global_scale", global_sf), ("mask", mask)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    for name, tensor, ndim in (("mask", mask, 1), ("input_global_scale", global_sf, 1)):
        if tensor.ndim != ndim:
            raise RuntimeError(f"Check failed: {name}.ndim() == {ndim} ({tensor.ndim} vs. {ndim})")
    if global_sf.dtype != torch.float32 or mask.dtype != torch.int32:
        raise ValueError(f"inconsistency of Tensor type: {global_sf.dtype} scales, {mask.dtype} mask")
    if len(mask) != len(global_sf):
        raise RuntimeError(f"Check failed: mask.shape()[0] == n_experts ({len(mask)} vs. {len(global_sf)})")
    if a.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"only supports input tensor with dtypes fp16/bf16, got {a.dtype}")


def grouped_gemm_nt_masked(  # noqa: PLR0913
    lhs: tuple[Tensor, Tensor],
    rhs: tuple[Tensor, Tensor],
    out: Tensor,
    masked_m: Tensor,
    *,
    ab_dtype: str,
    sf_dtype: str,
    c_dtype: str,
    sf_vec_size: int,
    topk_weights: Tensor | None = None,
    idx_src_info: Tensor | None = None,
    rank_src_info: Tensor | None = None,
    out_ptrs: Tensor | None = None,
    num_ranks: int = 0,
    dst_signals: Tensor | None = None,
    sm_count: int | None = None,
    barrier_flag_local: Tensor | None = None,
    barrier_flag_multicast: Tensor | None = None,
    is_combine_fusion: bool = False,
    is_swap_ab: bool = False,
    **kwargs: Any,
) -> Tensor:
    """out (m, n, experts) = alpha[e] * A[e] @ B[e].T for the first masked_m[e] rows, in place, and returned. A uint8
    (m, k / 2, experts), B (n, k / 2, experts), scales in the 6-D MMA view; NVFP4 operands, no combine, no swap."""
    alpha, _ = kwargs.pop("alpha", None), kwargs.pop("alpha_dtype", None)
    kwargs.pop("mma_tiler_mn", None), kwargs.pop("cluster_shape_mn", None)
    assert not kwargs, f"Unsupported kwargs: {kwargs}"
    if out.dim() != 3 or not out.permute(2, 0, 1).is_contiguous():
        raise ValueError(
            "grouped_gemm_nt_masked: `out` must be a 3D (m, n, l) tensor that is contiguous in the layout implied by"
            f" c_major='n'. Got out.shape={tuple(out.shape)}, out.stride()={tuple(out.stride())}."
        )
    kinds = (ab_dtype, sf_dtype, sf_vec_size, is_combine_fusion or is_swap_ab or num_ranks > 0)
    if kinds != (wanted := ("float4_e2m1fn", "float8_e4m3fn", BLOCK, False)):
        dsl.unsupported("operands", kinds, wanted)
    if out.dtype != DTYPES[c_dtype]:
        raise TypeError(f"out is {out.dtype}, c_dtype {c_dtype}")
    a, b, products = _operand(*lhs), _operand(*rhs), out.permute(2, 0, 1)
    factors = torch.ones(len(products)) if alpha is None else alpha.reshape(-1)
    for expert, live in enumerate(masked_m.tolist()):
        if live:
            product = a(expert, live) @ b(expert, products.shape[2]).T
            products[expert, :live] = (product * factors[expert]).to(out.dtype)
    return out


def _operand(packed: Tensor, scales: Tensor) -> Callable[[int, int], Tensor]:
    """(expert, rows) -> float32 [rows, k] of one operand, decoded when asked."""
    rows, half, _ = packed.shape
    codes, factors = packed.permute(2, 0, 1), dsl.mma_scales(scales, rows, 2 * half // BLOCK)
    return lambda expert, live: dsl.fp4_values(codes[expert, :live], factors[expert, :live], dsl.NVFP4)


ENTRIES: dict[str, Callable[..., Any]] = {
    "flashinfer.scaled_fp4_grouped_quantize": scaled_fp4_grouped_quantize,
    "flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize": silu_and_mul_scaled_nvfp4_experts_quantize,
    "flashinfer.gemm.grouped_gemm_nt_masked": grouped_gemm_nt_masked,
    "flashinfer.cute_dsl.blockscaled_gemm.grouped_gemm_nt_masked": grouped_gemm_nt_masked,
}
