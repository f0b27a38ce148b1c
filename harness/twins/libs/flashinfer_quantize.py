"""What FlashInfer 0.7.2.post1's quantisers do: quantization/fp4_quantization.py, fp8_quantization.py and their
csrc/nv_internal/tensorrt_llm/thop/fp4Quantize.cpp and fp8Quantize.cpp, CUDA backends only.

Codes come from the rules of reference.formats, bytes lie where the kernels put them; padding of scales is written as 0.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from reference.format import Format, Quantized
from reference.formats import get
from reference.layouts import get as layout_of
from reference.layouts.linear import pack_nibbles

FLOATS = (torch.float16, torch.bfloat16)
_UNSET: Any = object()  # "not passed": the library reads FLASHINFER_NVFP4_4OVER6*, which is unset here


class SfLayout(IntEnum):
    """tllm_enums.SfLayout."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


NAMES = {
    SfLayout.layout_128x4: "swizzle_128x4",
    SfLayout.layout_8x4: "swizzle_8x4",
    SfLayout.layout_linear: "linear",
}


def fp4_quantize(  # noqa: PLR0913  the library's signature
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    nvfp4_4over6: Any = _UNSET,
) -> tuple[Tensor, Tensor]:
    """input [M, K] fp16 or bf16 -> (uint8 [M, K / 2], uint8 scales [rows, groups], padded where swizzled)."""
    if sf_vec_size not in (16, 32):
        raise NotImplementedError("sf_vec_size can only be 16 or 32")
    if nvfp4_4over6 not in (_UNSET, None):
        raise ValueError("nvfp4_4over6: this twin has the plain recipe only")
    if global_scale is not None:
        global_scale = global_scale.to(device=input.device, dtype=torch.float32)
    if backend != "cuda":
        raise ValueError(f"Unknown backend: {backend}. Must be 'cuda' or 'cute-dsl'.")
    assert input.shape[-1] % sf_vec_size == 0
    _refuse(input, global_scale, sf_vec_size, sf_use_ue8m0)
    if global_scale is not None and is_global_scale_inversed:
        global_scale = 1 / global_scale
    fmt = get("mxfp4" if sf_use_ue8m0 else "nvfp4:fast")
    flat = input.reshape(-1, input.shape[-1])
    q = _encoded(fmt, flat, None if sf_use_ue8m0 else global_scale)
    assert q.scales is not None
    layout = SfLayout.layout_linear
    if is_sf_swizzled_layout:
        layout = SfLayout.layout_8x4 if is_sf_8x4_layout else SfLayout.layout_128x4
    columns = q.scales.shape[1]
    scales = layout_of(NAMES[layout]).pack(q.scales)
    return pack_nibbles(q.codes).view(*input.shape[:-1], input.shape[-1] // 2), scales.reshape(
        scales.numel() // (-(-columns // 4) * 4) if is_sf_swizzled_layout else len(flat),
        -(-columns // 4) * 4 if is_sf_swizzled_layout else columns,
    )


def _refuse(input: Tensor, global_scale: Tensor | None, sf_vec_size: int, sf_use_ue8m0: bool) -> None:
    """The checks of fp4_quantize in C++; TVM_FFI_ICHECK raises RuntimeError."""
    if not input.is_contiguous():
        raise RuntimeError("self must be contiguous")
    if sf_use_ue8m0 and sf_vec_size != 32:
        raise RuntimeError("sfVecSize can only be 32, when sfUseUE8M0 is true")
    if not sf_use_ue8m0 and global_scale is None:
        raise RuntimeError("globalScale is required when sfUseUE8M0 is false")
    if not sf_use_ue8m0 and sf_vec_size != 16:
        raise RuntimeError("sfVecSize can only be 16, when sfUseUE8M0 is false")
    if input.dim() < 2:
        raise RuntimeError("Input should be >=2D tensor.")
    if global_scale is not None and global_scale.numel() not in (1, input.numel() // input.shape[-1]):
        raise RuntimeError("globalScale should have shape [1] or [num_tokens]")
    if input.dtype not in FLOATS:
        raise NotImplementedError("fp4_quantize only supports input tensor with dtypes fp16/bf16/e4m3.")


def _encoded(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    if global_scale is None or global_scale.numel() == 1:
        return fmt.encode(x, global_scale)
    rows = [fmt.encode(row[None], scale) for row, scale in zip(x, global_scale.flatten(), strict=True)]
    scales = torch.cat([q.scales for q in rows if q.scales is not None])
    return Quantized(fmt, torch.cat([q.codes for q in rows]), scales, global_scale)


def nvfp4_quantize(  # noqa: PLR0913  the library's signature
    a: Tensor,
    a_global_sf: Tensor,
    sfLayout: int = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: Tensor | None = None,
    out_scale: Tensor | None = None,
    nvfp4_4over6: Any = _UNSET,
) -> tuple[Tensor, Tensor]:
    """fp4_quantize with the layout as an enum; neither shuffled nor per token here."""
    if per_token_activation or do_shuffle:
        raise NotImplementedError("this twin has no per-token scales and no shuffle")
    if out_scale is not None:
        raise ValueError("out_scale is only supported with per_token_activation=True")
    if backend != "cuda":
        raise ValueError(f"Unknown backend: {backend}. Must be 'cuda', 'cute-dsl' or 'cake'.")
    if expanded_idx_to_permuted_idx is not None:
        raise ValueError("expanded_idx_to_permuted_idx is only supported with per_token_activation=True")
    swizzled, small = sfLayout != SfLayout.layout_linear, sfLayout == SfLayout.layout_8x4
    return fp4_quantize(
        *(a, a_global_sf, sf_vec_size, False, swizzled, small), enable_pdl=enable_pdl, nvfp4_4over6=nvfp4_4over6
    )


def mxfp4_quantize(
    a: Tensor, backend: str = "cuda", enable_pdl: bool | None = None, sfLayout: int = SfLayout.layout_128x4
) -> tuple[Tensor, Tensor]:
    """fp4_quantize of groups of 32 with E8M0 scales."""
    sfLayout = SfLayout(sfLayout)
    if backend != "cuda":
        raise ValueError(f"Unknown backend: {backend}. Must be 'cuda' or 'cute-dsl'.")
    return fp4_quantize(a, None, 32, True, sfLayout != SfLayout.layout_linear, sfLayout == SfLayout.layout_8x4)


def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: int | None = None,
) -> tuple[Tensor, Tensor]:
    """input [M, K] fp16 or bf16 -> (e4m3 [M, K rounded up to `alignment`], uint8 scales, flat); as on CUDA, not the library's
    own CPU path, which is another function."""
    assert input.shape[-1] % 32 == 0
    assert backend in ("cuda", "cute-dsl"), f"backend must be 'cuda' or 'cute-dsl', got '{backend}'"
    if not input.is_contiguous():
        raise RuntimeError("input must be contiguous")
    if alignment % 32:
        raise RuntimeError("alignment must be divisible by SF_VEC_SIZE = 32")
    if input.dtype not in FLOATS:
        raise NotImplementedError("mxfp8_quantize only supports input tensor with dtypes fp16/bf16.")
    if sf_swizzle_layout is None:
        sf_swizzle_layout = SfLayout.layout_128x4 if is_sf_swizzled_layout else SfLayout.layout_linear
    flat = input.reshape(-1, input.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % alignment))
    q = get("mxfp8").encode(padded)
    assert q.scales is not None
    codes = q.codes.view(torch.float8_e4m3fn).view(*input.shape[:-1], padded.shape[1])
    return codes, layout_of(NAMES[SfLayout(sf_swizzle_layout)]).pack(q.scales).flatten()


ENTRIES = {
    f"flashinfer.quantization.{function.__name__}": function
    for function in (fp4_quantize, nvfp4_quantize, mxfp4_quantize, mxfp8_quantize)
}
