"""E4M3 codes with one float32 scale per tensor, per row (token or output channel), per 1x128 group or per 128x128 block.

Stored scales are decode scales. Recipes whose libraries store the multiplier keep 1 / multiplier here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Scaling
from reference.formats._mx import ceil_power
from reference.formats._rules import (
    FLT_MAX,
    FLT_MIN,
    Rule,
    amax_over,
    clamped_amax_over,
    divide,
    f32,
    multiply,
    over,
    variant,
    with_variants,
)

MAX = grid.E4M3.max
TOKEN_FLOOR = 1 / (MAX * 512)  # the least per-token scale of vLLM and TensorRT-LLM


def _multiplier(amax: Tensor) -> Tensor:
    """448 / amax as `float / tensor` is computed by torch: the reciprocal, rounded, times 448; 1 where amax is 0."""
    return torch.where(amax == 0, 1.0, amax.reciprocal() * MAX)


def _trtllm_token(amax: Tensor, gs: Tensor | None) -> Tensor:
    return (amax.clamp(min=1e-6) / MAX).clamp(min=TOKEN_FLOOR)


def _trtllm_scaled(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    return x * over(MAX, amax.clamp(min=1e-6)).clamp(max=1 / TOKEN_FLOOR)


def _humming_multiplier(amax: Tensor) -> Tensor:
    return torch.where((amax > 0) & ~amax.isnan(), over(MAX, amax.clamp(min=f32(MAX / FLT_MAX))), 1.0)


HUMMING = Rule(
    lambda amax, gs: 1 / _humming_multiplier(amax),
    lambda x, s, amax, gs: x * _humming_multiplier(amax),
)


def _e4m3(name: str, group: tuple[int, int], encoder: Rule, source: str, *goldens: Golden) -> Format:
    return Format(name, grid.E4M3, Scaling(grid.FP32, group), "even", True, source, encoder, goldens)


_ROW = Golden((3.0, -1.0, 0.5, 0.25), (0x7E, 0xF1, 0x69, 0x61), (f32(3 / 448),))
_ROW2 = Golden((0.10009765625, 0.2001953125, -0.400390625, 0.050048828125), (0x6E, 0x76, 0xFE, 0x66), (f32(0.400390625 / 448),))
_BLOCK = Golden((3.0, -1.1015625, 0.010009765625), (0x7E, 0xF2, 0x3C), (f32(3 / 448),))
_ZERO = Golden((0.0, -0.0), (0, 0x80), (1.0,))
_EDGES = Golden((torch.inf, 1.0, torch.nan), (0x7F, 0, 0x7F), (torch.inf,))


def _multiply_then_fmin(x: Tensor, scale: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    """x * (1 / scale), where 0 * inf is NaN and CUDA's fminf(NaN, 448) is 448 (seen on an H200)."""
    scaled = multiply(x, scale, amax, gs)
    return torch.where(scaled.isnan(), MAX, scaled)


_TENSOR = _e4m3(
    "fp8_tensor",
    (WHOLE, WHOLE),
    Rule(amax_over(MAX), divide),
    "torchao _choose_scale_float8: amax / 448, x / scale; amax 0 -> 1",
    Golden((448.0, -17.0, 0.001, 0.0), (0x7E, 0xD8, 0x01, 0x00), (1.0,)),
    _BLOCK,
    _ZERO,
    _EDGES,
)
_TOKEN = _e4m3(
    "fp8_token",
    (1, WHOLE),
    Rule(amax_over(MAX), divide),
    "torchao per-row _choose_scale_float8: row amax / 448, x / scale; amax 0 -> 1",
    _ROW,
    _ROW2,
    _ZERO,
    _EDGES,
)
_CHANNEL = _e4m3("fp8_channel", (1, WHOLE), Rule(amax_over(MAX), divide), _TOKEN.source + "; of a weight: output channel", _ROW)
_GROUP = _e4m3(
    "fp8_group",
    (1, 128),
    Rule(amax_over(MAX, floor=f32(1e-12)), divide),
    "FlashInfer 0.7.2 prepare.py _deepseek_fp8_quantize_activations: max(amax / 448, 1e-12), x / scale",
    _BLOCK,
    Golden((0.0, -0.0), (0, 0x80), (f32(1e-12),)),
    _EDGES,
)
_BLOCKS = _e4m3(
    "fp8_block",
    (128, 128),
    Rule(amax_over(MAX, floor=f32(1e-12)), divide),
    "FlashInfer 0.7.2 prepare.py _deepseek_fp8_quantize_weights: max(amax / 448, 1e-12), x / scale",
    _BLOCK,
)
_DEEPGEMM = Rule(clamped_amax_over(MAX, 1e-4), multiply)
_DEEPGEMM_UE8M0 = Rule(lambda amax, gs: ceil_power(amax.clamp(min=1e-4) / MAX), multiply)
_DEEPGEMM_SOURCE = "DeepGEMM {}: max(amax, 1e-4) / 448, x * (1 / scale), no clamp"
_SMALL = f32(f32(1e-4) / 448)
_UE8M0 = Golden((3.0, -1.0), (0x7C, 0xF0), (2.0**-7,))

FORMATS = (
    with_variants(
        _TENSOR,
        variant(
            _TENSOR,
            "multiplier",
            Rule(lambda amax, gs: 1 / _multiplier(amax), lambda x, s, amax, gs: x * _multiplier(amax)),
            "FlashInfer 0.7.2 prepare.py _quantize_fp8_per_expert: x * (448 / amax), amax 0 -> 1; one matrix per expert",
            (Golden(_BLOCK.values, _BLOCK.codes, (f32(1 / f32(448 * f32(1 / 3))),)), _ZERO),
        ),
        variant(
            _TENSOR,
            "vllm",
            Rule(amax_over(MAX, zero=0.0), _multiply_then_fmin),
            "vLLM 0.25.1 dynamic_scaled_fp8_quant: amax / 448, x * (1 / scale), no floor: zeros give scale 0 and codes of 448",
            (_BLOCK, Golden((0.0, 0.0), (0x7E, 0x7E), (0.0,))),
        ),
    ),
    with_variants(
        _TOKEN,
        variant(
            _TOKEN,
            "vllm",
            Rule(amax_over(MAX, floor=f32(TOKEN_FLOOR)), divide),
            "vLLM dynamic_per_token_scaled_fp8_quant: max(amax / 448, 1 / (448 * 512)), x / scale",
            (_ROW, Golden((0.0, 1e-5), (0, 0x41), (f32(TOKEN_FLOOR),))),
        ),
        variant(
            _TOKEN,
            "trtllm",
            Rule(_trtllm_token, _trtllm_scaled),
            "TensorRT-LLM / FlashInfer per-token: row max from 1e-6 up, x * min(448 / amax, 448 * 512)",
            (_ROW, Golden((0.0, 1e-5), (0, 0x41), (f32(TOKEN_FLOOR),))),
        ),
        variant(
            _TOKEN,
            "humming",
            HUMMING,
            "FlashInfer CUTLASS Humming: x * (448 / max(amax, 448 / FLT_MAX)), 1 where amax is 0 or NaN",
            (Golden(_ROW.values, _ROW.codes, (f32(1 / f32(448 / 3)),)), _ZERO),
        ),
    ),
    _CHANNEL,
    with_variants(
        _GROUP,
        variant(
            _GROUP,
            "deepgemm",
            _DEEPGEMM,
            _DEEPGEMM_SOURCE.format("per_token_cast_to_fp8"),
            (_BLOCK, Golden((0.0,), (0,), (_SMALL,))),
        ),
        variant(
            _GROUP,
            "deepgemm_ue8m0",
            _DEEPGEMM_UE8M0,
            "DeepGEMM per_token_cast_to_fp8(use_ue8m0=True): that scale rounded up to a power of two",
            (_UE8M0, Golden((0.0,), (0,), (2.0**-22,))),
        ),
        variant(
            _GROUP,
            "vllm",
            Rule(clamped_amax_over(MAX, 1e-10), divide),
            "vLLM per_token_group_fp8_quant (CUDA): max(amax, 1e-10) / 448, x / scale",
            (_BLOCK, Golden((0.0,), (0,), (f32(f32(1e-10) / 448),))),
        ),
        variant(
            _GROUP,
            "vllm_ue8m0",
            Rule(lambda amax, gs: ceil_power((amax / MAX).clamp(min=1e-10)), divide),
            "vLLM per_token_group_fp8_quant(use_ue8m0): 2**ceil(log2(max(amax / 448, 1e-10)))",
            (_UE8M0, Golden((0.0,), (0,), (2.0**-33,))),
        ),
        variant(
            _GROUP,
            "vllm_triton",
            Rule(lambda amax, gs: amax.clamp(min=1e-10) * f32(1 / MAX), divide),
            "vLLM Triton fallback: amax * (1 / 448), x / scale",
            (Golden((3.0, -1.0, 0.5), (0x7E, 0xF1, 0x69), (f32(3 * f32(1 / 448)),)),),
        ),
        variant(
            _GROUP,
            "cutile",
            Rule(clamped_amax_over(MAX, 1e-10), multiply),
            "FlashInfer 0.7.2 cuTile per_token_group, row-major: x * (1 / scale)",
            (_BLOCK,),
        ),
        variant(
            _GROUP,
            "trtllm",
            Rule(amax_over(MAX, floor=FLT_MIN), divide),
            "trtllm-gen in-kernel activation quantisation: max(amax / 448, FLT_MIN), x / scale",
            (_BLOCK, Golden((0.0,), (0,), (FLT_MIN,))),
        ),
    ),
    with_variants(
        _BLOCKS,
        variant(
            _BLOCKS,
            "deepgemm",
            _DEEPGEMM,
            _DEEPGEMM_SOURCE.format("per_block_cast_to_fp8"),
            (_BLOCK, Golden((0.0,), (0,), (_SMALL,))),
        ),
        variant(
            _BLOCKS,
            "deepgemm_ue8m0",
            _DEEPGEMM_UE8M0,
            "DeepGEMM per_block_cast_to_fp8(use_ue8m0=True): that scale rounded up to a power of two",
            (_UE8M0, Golden((0.0,), (0,), (2.0**-22,))),
        ),
    ),
)
