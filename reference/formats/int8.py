"""int8 codes with one float32 scale per tensor, per row (token or output channel) or per 1x128 group. No zero points."""

from __future__ import annotations

from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Scaling
from reference.formats._rules import Rule, amax_over, clamped_amax_over, divide, f32, over, variant, with_variants
from reference.grid import Element

MAX = grid.INT8.max


def truncate(element: Element, x: Tensor) -> Tensor:
    """Codes by cutting the fraction off, as a cast to int8 does."""
    return element.encode(x.trunc())


def halves_up(element: Element, x: Tensor) -> Tensor:
    """Codes by floor(x + 0.5): halves go up, towards +inf."""
    return element.encode((x + 0.5).floor())


def _by_quotient(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    return x * over(MAX, amax.clamp(min=1e-10))


def _int8(name: str, group: tuple[int, int], encoder: Rule, source: str, *goldens: Golden) -> Format:
    return Format(name, grid.INT8, Scaling(grid.FP32, group), "even", True, source, encoder, goldens)


_PLAIN = Golden((127.0, -63.5, 38.1), (127, 0x100 - 64, 38), (1.0,))
_SCALED = Golden((1.0, -0.5, 0.3), (127, 0x100 - 64, 38), (f32(1 / 127),))
_ZERO = Golden((0.0, -0.0), (0, 0), (1.0,))
_SYMMETRIC = Rule(amax_over(MAX), divide)
_SOURCE = "symmetric {} quantisation: amax / 127 (0 -> 1), rint(x / scale), as ONNX Runtime's QMoE and vLLM's int8 experts read"

_TOKEN = _int8("int8_token", (1, WHOLE), _SYMMETRIC, _SOURCE.format("per-token"), _PLAIN, _SCALED, _ZERO)
_GROUP = _int8("int8_group", (1, 128), _SYMMETRIC, _SOURCE.format("per-group"), _PLAIN, _SCALED, _ZERO)

FORMATS = (
    _int8("int8_tensor", (WHOLE, WHOLE), _SYMMETRIC, _SOURCE.format("per-tensor"), _PLAIN, _SCALED, _ZERO),
    _int8("int8_channel", (1, WHOLE), _SYMMETRIC, _SOURCE.format("per-channel weight"), _PLAIN, _SCALED, _ZERO),
    with_variants(
        _TOKEN,
        variant(
            _TOKEN,
            "vllm",
            Rule(clamped_amax_over(MAX, 1e-10), _by_quotient),
            "vLLM per_token_quant_int8: max(amax, 1e-10) / 127, rint(x * (127 / amax))",
            (_SCALED, Golden((0.0,), (0,), (f32(f32(1e-10) / 127),))),
        ),
    ),
    with_variants(
        _GROUP,
        variant(
            _GROUP,
            "vllm",
            Rule(clamped_amax_over(MAX, 1e-10), divide, truncate),
            "vLLM per_token_group_quant_int8: max(amax, 1e-10) / 127, x / scale cast to int8, which truncates",
            (Golden((1.0, -0.5, 0.3), (127, 0x100 - 63, 38), (f32(1 / 127),)),),
            ties="truncates",
        ),
        variant(
            _GROUP,
            "cutile",
            Rule(clamped_amax_over(MAX, 1e-10), divide, halves_up),
            "FlashInfer 0.7.2 cuTile per_token_group_8bit: floor(x / scale + 0.5)",
            (Golden((127.0, -63.5, 63.5), (127, 0x100 - 63, 64), (1.0,)),),
            ties="up",
        ),
    ),
)
