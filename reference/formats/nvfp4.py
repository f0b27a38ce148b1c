"""NVFP4: E2M1 codes, one E4M3 scale per 16 elements of a row, one float32 global scale per matrix or per row.

Global scales here are in the *encode* sense, as FlashInfer, vLLM and compressed-tensors pass them: 448 * 6 / amax, by which
the quantiser multiplies. ModelOpt's `weight_scale_2` and torchao's `per_tensor_scale` are the inverse: `encode_sense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Quantized, Scaling, amax_of, to_blocks
from reference.formats._rules import FLT_MAX, Rule, f32, flush, over, variant, with_variants

ENCODE_RANGE = grid.E4M3.max * grid.E2M1.max  # 2688: the global scale that uses the whole range is 2688 / amax
BLOCK = 16
SIXTH = f32(1 / 6)
LEAST_TORCHAO = 2.0**-6  # torchao's least block scale: the smallest normal E4M3
ZERO_COMPRESSED = 0.125  # compressed-tensors' block scale where it would be 0: the machine epsilon of E4M3


def scale_exact(amax: Tensor, gs: Tensor | None) -> Tensor:
    """E4M3 code of amax * (gs * f32(1/6)), subnormal results flushed."""
    assert gs is not None
    return grid.E4M3.encode(flush(amax * flush(gs * SIXTH)))


def scale_fast(amax: Tensor, gs: Tensor | None) -> Tensor:
    """E4M3 code of gs * (amax * rcp(6)), subnormal results flushed; rcp taken as correctly rounded."""
    return grid.E4M3.encode(flush(gs * flush(amax * SIXTH)))  # type: ignore[operator]


def inverse_scale(s: Tensor, gs: Tensor) -> Tensor:
    """1 / (s * (1 / gs)), subnormal results flushed: inf where s is 0 or 1 / gs is subnormal."""
    return flush(1 / flush(s * flush(1 / gs)))


def _times_exact(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x * torch.where(amax == 0, 0.0, inverse_scale(s, gs).clamp(max=FLT_MAX))


def _times_fast(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x * torch.where(amax == 0, 0.0, inverse_scale(s, gs))


def _times_vllm(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x * torch.where(s == 0, 0.0, inverse_scale(s, gs))


def _scale_modelopt(amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    s = amax / (6 * (1 / gs))
    return grid.E4M3.encode(torch.where(s == 0, 1.0, s))


def _over_modelopt(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x / (s * (1 / gs))


def _scale_compressed(amax: Tensor, gs: Tensor | None) -> Tensor:
    code = grid.E4M3.encode(gs * (amax / 6))  # type: ignore[operator]
    return torch.where(code == 0, int(grid.E4M3.encode(torch.tensor(ZERO_COMPRESSED))), code)


def _over_compressed(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x / (s / gs)


def _scale_torchao(amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return grid.E4M3.encode((amax / 6 / (1 / gs)).clamp(min=LEAST_TORCHAO))


def _times_torchao(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    assert gs is not None
    return x * ((1 / (1 / gs)) / s)


def encode_sense(decode_scale: Tensor) -> Tensor:
    """float32 1 / decode_scale: what `is_global_scale_inversed` has the kernel do. Not always bit-equal to 2688 / amax."""
    return 1 / decode_scale.float()


def token_global_scales(x: Tensor, fast: bool = False) -> Tensor:
    """[rows] float32 encode-sense global scales of `per_token_activation`, FLT_MAX for a zero row (fast: 0).

    exact: min((1 / f32(1/2688)) / row amax, FLT_MAX). fast: rcp(row amax * f32(1/2688)). NaN ignored.
    """
    step = f32(1 / ENCODE_RANGE)
    amax = flush(amax_of(to_blocks(x.float(), (1, WHOLE))).flatten())
    if fast:
        token = flush(amax * step)
        return torch.where(token == 0, 0.0, 1 / token)
    return torch.where(amax == 0, FLT_MAX, over(f32(1 / step), amax).clamp(max=FLT_MAX))


def encode_experts(fmt: Format, x: Tensor, global_scales: Tensor) -> list[Quantized]:
    """x [experts, rows, columns], each expert by its own encode-sense scale of `global_scales` [experts] float32."""
    if global_scales.shape != x.shape[:1]:
        raise ValueError(
            f"{fmt.name}: wanted a global scale for each of {x.shape[0]} experts, not {tuple(global_scales.shape)}"
        )
    return [fmt.encode(matrix, scale) for matrix, scale in zip(x, global_scales, strict=True)]


def shared_global_scale(global_scales: Sequence[float] | Tensor) -> Tensor:
    """The one encode-sense scale of backends that take the largest decode scale of all experts: the smallest of [experts]."""
    return torch.as_tensor(global_scales, dtype=torch.float32).amin()


def dequantize_nvfp4_to_dtype(
    codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype, block_size: int = BLOCK
) -> Tensor:
    """[M, K] of `dtype`: e2m1 * block scale / global_scale, computed in float64 and rounded once (to even, saturating).

    codes uint8 [M, K/2], the even column in the low nibble; scales E4M3 [M, K/16] in linear (unswizzled) order, as
    float8_e4m3fn or its bytes in uint8; global_scale float32 [1] or [], encode sense. Raises ValueError for anything else.
    """
    _check_packed(codes, scales, block_size)
    _check_global(global_scale)
    unpacked = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(1)
    fmt = FORMATS[0]
    value = fmt.decode(Quantized(fmt, unpacked, scales.view(torch.uint8), global_scale.reshape(1)))
    narrow = next((grid.FLOATS[name] for name, t in grid.TORCH_DTYPES.items() if t == dtype), None)
    return (value if narrow is None else narrow.round(value)).to(dtype)


def _check_packed(codes: Tensor, scales: Tensor, block_size: int) -> None:
    if block_size != BLOCK:
        raise ValueError(f"NVFP4 has one scale per {BLOCK} elements, got block_size={block_size}; for 32 see mxfp4")
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(
            f"codes: wanted uint8 [M, K/2], two codes a byte, got {codes.dtype} {tuple(codes.shape)};"
            " dequantise a stack of experts expert by expert"
        )
    if scales.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"scales: wanted float8_e4m3fn or its bytes as uint8, got {scales.dtype}; a cast is not a view")
    wanted = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
    if codes.shape[1] * 2 % BLOCK or tuple(scales.shape) != wanted:
        raise ValueError(
            f"scales: wanted [M, K/{BLOCK}] = {list(wanted)} in linear order for codes {tuple(codes.shape)}, got"
            f" {tuple(scales.shape)}; unswizzle padded or interleaved scales first, and K must be a multiple of {BLOCK}"
        )


def _check_global(global_scale: Tensor) -> None:
    if global_scale.numel() != 1:
        experts = global_scale.numel()
        raise ValueError(
            f"global_scale: got shape {tuple(global_scale.shape)}, wanted one float32 value, [1] or [], in the encode sense"
            f" (2688 / amax). {experts} values are one per expert: dequantise expert by expert, e.g. torch.stack("
            f"[dequantize_nvfp4_to_dtype(codes[e], scales[e], global_scale[e], dtype) for e in range({experts})])"
        )
    if global_scale.dtype != torch.float32:
        raise ValueError(f"global_scale: wanted float32, got {global_scale.dtype}: 8 bits move every value by up to 0.4 %")


def _block(*first: float, rest: float = 0.0) -> tuple[float, ...]:
    return first + (rest,) * (BLOCK - len(first))


def _codes(*first: int, rest: int = 0) -> tuple[int, ...]:
    return first + (rest,) * (BLOCK - len(first))


_SHEET = (
    Golden(
        (0, 0.25, -0.5, 0.75, 1, -1.25, 1.5, 2, -2.5, 3, 3.5, -4, 5, 6, -0.1, 7),
        (0, 0, 9, 1, 2, 10, 3, 3, 12, 5, 5, 13, 6, 7, 8, 7),
        (0x7E,),
        384.0,
    ),
    Golden((0.5,) * 15 + (1.296875,), (4,) * 15 + (7,), (0x4C,), 26.88),
)
_INF = Golden(_block(torch.inf, 100.0, 1.0, -torch.inf), _codes(7, 7, 2, 15), (0x7E,), 448.0)
_NAN = Golden(_block(torch.nan, 6.0, 3.0), _codes(7, 7, 5), (0x38,), 1.0)
_OVER = Golden(_block(6000.0, 1000.0, -300.0), _codes(7, 4, 9), (0x7E,), 1.0)
_UNDER, _TINY = _block(1e-6, -1e-6, 0.0, 0.0), _block(2.0**-130, -(2.0**-130), -0.0)

_NVFP4 = Format(
    name="nvfp4",
    element=grid.E2M1,
    scaling=Scaling(grid.E4M3, (1, BLOCK), global_scale=True, global_range=ENCODE_RANGE),
    ties="even",
    saturates=True,
    source="FlashInfer 0.7.2 fp4_quantize exact path (quantization_utils.cuh); equals TransformerEngine",
    encoder=Rule(scale_exact, _times_exact, ftz=True),
    goldens=(
        *_SHEET,
        _INF,
        _NAN,
        _OVER,
        Golden(_UNDER, _codes(7, 15), (0,), 1.0),
        Golden(_TINY, _codes(0, 8, 8), (0,), 1.0),
    ),
)

FORMATS = (
    with_variants(
        _NVFP4,
        variant(
            _NVFP4,
            "fast",
            Rule(scale_fast, _times_fast, ftz=True),
            "FlashInfer 0.7.2 fp4_quantize default path, rcp.approx taken as correctly rounded",
            (*_SHEET, _INF, _NAN, _OVER, Golden(_UNDER, _codes(7, 15, rest=7), (0,), 1.0)),
        ),
        variant(
            _NVFP4,
            "vllm",
            Rule(scale_fast, _times_vllm, ftz=True),
            "vLLM scaled_fp4_quant: the fast path, but a block whose scale rounds to 0 gets codes 0",
            (*_SHEET, Golden(_UNDER, _codes(0, 8), (0,), 1.0)),
        ),
        variant(
            _NVFP4,
            "modelopt",
            Rule(_scale_modelopt, _over_modelopt),
            "ModelOpt: e4m3(amax / (6 * ws2)), 0 -> 1 before the cast, x / (scale * ws2), ws2 = 1 / global scale; no FTZ",
            (*_SHEET, Golden(_block(), _codes(), (0x38,), 1.0)),
        ),
        variant(
            _NVFP4,
            "compressed_tensors",
            Rule(_scale_compressed, _over_compressed),
            "compressed-tensors: e4m3(gs * (amax / 6)), a zero scale becomes 0.125, x / (scale / gs)",
            (*_SHEET, Golden(_block(), _codes(), (0x20,), 1.0), Golden(_UNDER, _codes(0, 8), (0x20,), 1.0)),
        ),
        variant(
            _NVFP4,
            "torchao",
            Rule(_scale_torchao, _times_torchao),
            "torchao nvfp4_quantize(per_tensor_scale=1/gs): e4m3 of amax / 6 / pts, at least 2**-6, x * ((1 / pts) / scale)",
            (*_SHEET, Golden(_block(), _codes(), (0x08,), 1.0), Golden(_UNDER, _codes(0, 8), (0x08,), 1.0)),
        ),
    ),
    replace(
        _NVFP4,
        name="nvfp4_token",
        scaling=replace(_NVFP4.scaling, global_group=(1, WHOLE)),  # type: ignore[type-var]
        source="FlashInfer 0.7.2 fp4_quantize(per_token_activation): the exact path, a global scale for every row",
    ),
)
