"""MXINT4: int4 codes -8..7, one scale per 32 elements of a row, kept in bf16. Peaks of either sign use the whole grid."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import Format, Golden, Quantized, Scaling, from_blocks, to_blocks
from reference.formats._rules import f32, variant, with_variants


def _encode(fmt: Format, x: Tensor, eightfold: bool) -> Quantized:
    """A = max(max(x) * 8/7, -min(x)), s = A / 8 (1 where not positive), q = rint(x * (1 / s)) in -8..7, bf16(s) kept."""
    assert fmt.scaling is not None
    blocks = to_blocks(x.float(), fmt.scaling.group)
    numbers = blocks.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    high, low = numbers.amax(dim=3, keepdim=True), numbers.amin(dim=3, keepdim=True)
    high = high * 8 / 7 if eightfold else high * f32(8 / 7)
    scale = torch.maximum(high, -low) / 8
    scale = torch.where(scale > 0, scale, 1.0)
    codes = fmt.element.encode(blocks * (1 / scale)).to(torch.uint8)
    kept = fmt.scaling.store(scale).flatten(2).squeeze(1)
    return Quantized(fmt, from_blocks(codes, (x.shape[0], x.shape[1])), kept)


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """The rule of FlashInfer's weight preparation: max(x) times the constant 8/7."""
    return _encode(fmt, x, eightfold=False)


def encode_eightfold(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """The same with max(x) times 8, then over 7: one more rounding, another float32 scale in a third of all blocks."""
    return _encode(fmt, x, eightfold=True)


_BF16_SEVENTH = 0.142578125
_MXINT4 = Format(
    name="mxint4",
    element=grid.INT4_FULL,
    scaling=Scaling(grid.FP32, (1, 32), stored=grid.BF16),
    ties="even",
    saturates=True,
    source="FlashInfer 0.7.2 prepare.py _mxint4_quantize (trtllm_mxint4_block_scale_moe)",
    encoder=encode,
    goldens=(
        Golden((1.0, -0.5, 0.3, -0.9) + (0.0,) * 28, (7, 13, 2, 10) + (0,) * 28, (_BF16_SEVENTH,)),
        Golden((-8.0, 7.0) + (0.5,) * 30, (8, 7) + (0,) * 30, (1.0,)),
        Golden((0.0,) * 32, (0,) * 32, (1.0,)),
    ),
)

FORMATS = (
    with_variants(
        _MXINT4,
        variant(
            _MXINT4,
            "flat_test",
            encode_eightfold,
            "FlashInfer's flat MoE test helper: max(x) * 8 / 7 (its zero blocks are NaN; here they have scale 1)",
            (Golden((1.0, -0.5, 0.3, -0.9) + (0.0,) * 28, (7, 13, 2, 10) + (0,) * 28, (_BF16_SEVENTH,)),),
        ),
    ),
)
