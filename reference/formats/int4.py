"""int4 weights: one scale per output channel, or per group of 32, 64 or 128 columns, with or without zero points.

Codes and zero points are two's complement here. Offset-binary storage (u4b8, AWQ and GPTQ nibbles) is code + 8, zero + 8:
the same numbers, another layout.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Quantized, Scaling, from_blocks, to_blocks
from reference.formats._rules import Rule, amax_over, divide, f32, variant, with_variants
from reference.grid import Element

GROUPS = (32, 64, 128)
LEVELS = 15.0  # steps between -8 and 7
EPSILON = torch.finfo(torch.float32).eps  # compressed-tensors' scale of a group that is all zero
AWQ_RANGE = 1e-5  # AutoAWQ's least max - min


def encode_with_zero_points(fmt: Format, x: Tensor, global_scale: Tensor | None, awq: bool = False) -> Quantized:
    """s = (max - min) / 15 with 0 inside the range; zero and codes as compressed-tensors or, if `awq`, AutoAWQ rounds them.

    compressed-tensors: z = rint(-8 - min / s), q = rint(x / s + z): one rounding after the sum, zero groups get s = 2**-23.
    AutoAWQ: z = rint(-min / s) - 8, q = rint(x / s) + z: rounded before the sum, max - min at least 1e-5.
    """
    assert fmt.scaling is not None
    blocks = to_blocks(x.float(), fmt.scaling.group)
    numbers = blocks.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    high = numbers.amax(dim=3, keepdim=True).clamp(min=0)
    low = numbers.amin(dim=3, keepdim=True).clamp(max=0)
    scale = (high - low).clamp(min=AWQ_RANGE if awq else 0.0) / LEVELS
    zero = ((-low / scale).round() - 8 if awq else -8 - low / scale).nan_to_num(0.0).round().clamp(max=7)  # not lower: min <= 0
    scale = torch.where(scale == 0, EPSILON, scale)
    codes = ((blocks / scale).round() + zero if awq else blocks / scale + zero).round()
    shape = (x.shape[0], x.shape[1])
    kept, zeros = (t.flatten(2).squeeze(1) for t in (fmt.scaling.store(scale), fmt.element.encode(zero).to(torch.uint8)))
    return Quantized(fmt, from_blocks(fmt.element.encode(codes).to(torch.uint8), shape), kept, zeros=zeros)


def _symmetric(name: str, group: tuple[int, int], element: Element, stored: grid.ElementType | None, source: str) -> Format:
    goldens = (
        Golden((7.0, -3.5, 1.0, -7.0), (7, 0x10 - 4, 1, 0x10 - 7), (1.0,)),
        Golden((0.0, -0.0), (0, 0), (1.0,)),
    )
    scaling = Scaling(grid.FP32, group, stored=stored)
    return Format(name, element, scaling, "even", True, source, Rule(amax_over(7.0), divide), goldens)


def _grouped(size: int) -> Format:
    source = "FlashInfer 0.7.2 prepare.py _quantize_int4_grouped: amax / 7 (0 -> 1), rint(x / scale) in -8..7, then bf16 scales"
    fmt = _symmetric(f"int4_g{size}", (1, size), grid.INT4_FULL, grid.BF16, source)
    sheet = Golden((0.7, -0.35, 0.1, -0.8), (6, 0x10 - 3, 1, 0x10 - 7), (0.1142578125,))
    compressed = variant(
        fmt,
        "compressed_tensors",
        Rule(lambda amax, gs: torch.where(amax == 0, EPSILON, amax / (LEVELS / 2)), divide),
        "compressed-tensors symmetric int4 in float32: amax / 7.5, rint(x / scale) in -8..7: the peak is 7.5, a tie",
        (Golden((7.5, -7.5, 1.0), (7, 8, 1), (1.0,)), Golden((0.0,), (0,), (EPSILON,))),
    )
    return replace(fmt, goldens=(*fmt.goldens, sheet), variants=(compressed,))


_AWQ_ZERO = Golden((0.0,), (8,), (f32(f32(AWQ_RANGE) / LEVELS),), zeros=(8,))


def _asymmetric(size: int) -> Format:
    ramp = Golden((0.0, 15.0, 3.0, 7.5), (8, 7, 11, 0), (1.0,), zeros=(8,))
    fmt = Format(
        name=f"int4_g{size}_zp",
        element=grid.INT4_FULL,
        scaling=Scaling(grid.FP32, (1, size), zero_points=True),
        ties="even",
        saturates=True,
        source="compressed-tensors asymmetric int4 in float32: s = (max - min) / 15, z = rint(-8 - min / s), rint(x / s + z)",
        encoder=encode_with_zero_points,
        goldens=(
            ramp,
            Golden((-7.5, 7.5, 0.0), (8, 7, 0), (1.0,), zeros=(0,)),
            Golden((0.0, 0.0), (0, 0), (EPSILON,), zeros=(0,)),
        ),
    )
    awq = variant(
        fmt,
        "awq",
        partial(encode_with_zero_points, awq=True),
        "AutoAWQ pseudo_quantize_tensor: s = max(max - min, 1e-5) / 15, z = rint(-min / s), q = rint(x / s) + z in 0..15",
        (
            ramp,
            Golden((-0.5, 14.5, 3.0), (8, 6, 11), (1.0,), zeros=(8,)),
            _AWQ_ZERO,
        ),
    )
    return with_variants(fmt, awq)


FORMATS = (
    _symmetric(
        "int4_channel",
        (1, WHOLE),
        grid.INT4,
        None,
        "symmetric per-channel weight quantisation, as ONNX Runtime's QMoE consumes it: amax / 7 (0 -> 1), rint(x / scale)",
    ),
    *(_grouped(size) for size in GROUPS),
    *(_asymmetric(size) for size in GROUPS),
)
