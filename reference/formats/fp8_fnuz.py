"""E4M3FNUZ codes (AMD gfx942) with one float32 scale per tensor or row; and how an E4M3FN checkpoint becomes one."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Quantized, Scaling
from reference.formats._rules import Rule, amax_over, divide, f32, multiply, variant, with_variants

DYNAMIC_MAX = 224.0  # what vLLM's dynamic quantisers map amax to; the grid itself ends at 240
TOKEN_FLOOR = f32(1 / (DYNAMIC_MAX * 512))


def from_e4m3(q: Quantized, fmt: Format) -> Quantized:
    """An E4M3FN matrix as the E4M3FNUZ matrix `fmt` of equal values: same bits, -0 made 0, scales doubled.

    Bits read as FNUZ are worth half. The NaN codes 0x7f and 0xff become +-240: FNUZ has its NaN elsewhere (vLLM does so too).
    """
    assert q.scales is not None
    codes = torch.where(q.codes == 0x80, torch.zeros_like(q.codes), q.codes)
    return Quantized(fmt, codes, q.scales * 2)


def _fnuz(name: str, group: tuple[int, int], encoder: Rule, source: str, *goldens: Golden) -> Format:
    return Format(name, grid.E4M3FNUZ, Scaling(grid.FP32, group), "even", True, source, encoder, goldens)


def _dynamic_token(amax: Tensor, gs: Tensor | None) -> Tensor:
    return (amax / DYNAMIC_MAX).clamp(min=TOKEN_FLOOR)


_SPECIALS = Golden((240.0, 17.0, 0.001, -0.0, 1.1), (0x7F, 0x60, 0x01, 0x00, 0x41), (1.0,))
_TENSOR = _fnuz(
    "fp8_fnuz_tensor",
    (WHOLE, WHOLE),
    Rule(amax_over(grid.E4M3FNUZ.max), divide),
    "static scale amax / 240, the whole grid in use; amax 0 -> 1",
    _SPECIALS,
    Golden((0.0, torch.nan), (0, 0x80), (1.0,)),
)
_ROW = _fnuz(
    "fp8_fnuz_channel",
    (1, WHOLE),
    Rule(amax_over(grid.E4M3FNUZ.max), divide),
    "static scale of a row, amax / 240; amax 0 -> 1",
    _SPECIALS,
)

FORMATS = (
    with_variants(
        _TENSOR,
        variant(
            _TENSOR,
            "vllm",
            Rule(amax_over(DYNAMIC_MAX, zero=0.0), multiply),
            "vLLM dynamic_scaled_fp8_quant on gfx942: amax / 224, x * (1 / scale); an all-zero tensor has codes NaN",
            (Golden((224.0, -1.0), (0x7E, 0xC0), (1.0,)), Golden((0.0,), (0x80,), (0.0,))),
        ),
    ),
    with_variants(
        _ROW,
        variant(
            _ROW,
            "vllm_token",
            Rule(_dynamic_token, divide),
            "vLLM dynamic_per_token_scaled_fp8_quant on gfx942: max(amax / 224, 1 / (224 * 512)), x / scale",
            (Golden((224.0, -1.0), (0x7E, 0xC0), (1.0,)), Golden((0.0,), (0,), (TOKEN_FLOOR,))),
        ),
    ),
)
