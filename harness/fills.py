"""How random words become codes and scales: the `real` fill (every code its own draw) and the `exact` fill (sparse integers).

Nothing here names a format: a fill reads the element grid and the scaling of whatever format it is handed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from harness.hashing import Stream
from reference.format import Format, Quantized, expand_blocks
from reference.grid import FLOATS, ElementType, IntegerType, PowerOfTwoType

GROUP = 8  # columns of which the exact fill makes at most one non-zero
BINADES = 4  # the real fill spreads floating-point codes over this many binades: the whole of E2M1
ROUND_UP = 1.5  # what rounding scales up to a power of two adds to their root mean square
SCALE_STEPS = 256  # real block scales are base * 2**{-1, 0} * (1 + j / 256), exact in float64 on every device


@dataclass(frozen=True)
class Sparse:
    """The exact fill of one matrix: each group of 8 columns has, with probability `live`, one entry of +-`value`."""

    value: float
    live: float
    signed: bool


def window(element: ElementType | IntegerType, field: Tensor) -> Tensor:
    """Codes from random bit fields of the element's width: all signs and mantissas, the top BINADES exponents below 2**0
    (of E2M1: every code), all integers but the most negative. Same dtype as `field`."""
    if isinstance(element, IntegerType):
        return torch.where(field == 1 << (element.bits - 1), 0, field)
    man = element.mantissa_bits
    if (1 << element.exponent_bits) <= BINADES:
        return field
    exponent = element.bias + min(0, element.max_exponent) - ((field >> man) & (BINADES - 1))
    keep = (1 << man) - 1 - (1 << (element.bits - 1)) if field.dtype.is_signed else (1 << man) - 1 | 1 << (element.bits - 1)
    return (field & keep) | (exponent << man)


@cache
def window_rms(element: ElementType | IntegerType) -> float:
    """Root mean square of `window`'s values under uniform fields."""
    fields = torch.arange(2 ** min(element.bits, 8), dtype=torch.uint8)
    if element.bits > 8:  # rms over mantissas is that of a coarser grid to 0.1 %; it only sets a magnitude
        coarse = ElementType("coarse", 4, 3, 7, "nan", "")
        return window_rms(coarse)
    values = element.decode(window(element, fields))
    return float(values.square().mean().sqrt())


def real(fmt: Format, shape: tuple[int, int], stream: Stream, rms: float) -> Quantized:
    """A dense random matrix [rows, columns] of root mean square about `rms`, drawn as codes and scales."""
    rows, columns = shape
    element = fmt.element
    assert isinstance(element, ElementType | IntegerType)
    codes = window(element, stream.child("codes").raw(rows, columns, element.bits))
    base = rms / window_rms(element)
    if fmt.scaling is not None and fmt.scaling.zero_points:
        base /= math.sqrt(2)  # code minus zero point: a difference of two such draws
    if fmt.torch_dtype is not None:  # the bits of a plain format are its value's
        return Quantized(fmt, codes.contiguous().view(fmt.torch_dtype) * 2.0 ** round(math.log2(base)))
    scales, global_scale = _real_scales(fmt, shape, stream, base)
    zeros = None
    if fmt.scaling is not None and fmt.scaling.zero_points:
        zeros = window(element, stream.child("zeros").raw(*fmt.scaling.scale_shape(*shape), element.bits))
    return Quantized(fmt, codes, scales, global_scale, zeros)


def _real_scales(fmt: Format, shape: tuple[int, int], stream: Stream, base: float) -> tuple[Tensor, Tensor | None]:
    assert fmt.scaling is not None
    draw = stream.child("scales").fields(*fmt.scaling.scale_shape(*shape), 16)
    jitter = (1 + (draw & (SCALE_STEPS - 1)).double() / SCALE_STEPS) / (1 + ((draw >> 8) & 1)).double()
    if isinstance(fmt.scaling.element, PowerOfTwoType):
        base /= ROUND_UP
    if not fmt.scaling.global_scale:
        return _store(fmt, jitter * base), None
    # The block scales sit around 8, the middle of the scale grid; the global scale carries the rest (encode sense).
    middle = 8.0
    odd = 1 + (int(stream.child("global").fields(1, 1, 16)) & (SCALE_STEPS - 1)) / SCALE_STEPS
    return _store(fmt, jitter * middle), torch.tensor(middle / base * odd / 1.5, dtype=torch.float32, device=draw.device)


def _store(fmt: Format, scales: Tensor) -> Tensor:
    """Scales as the format stores them: codes of its scale grid, or float32 where that is the grid."""
    assert fmt.scaling is not None
    element = fmt.scaling.element
    return fmt.scaling.store(scales.float()) if element is FLOATS["fp32"] else element.encode(scales).to(torch.uint8)


def exact(fmt: Format, shape: tuple[int, int], stream: Stream, sparse: Sparse) -> Quantized:
    """A sparse matrix whose entries are 0 or +-`value` (a power of two) while codes and scales differ from block to block."""
    rows, columns = shape
    words = stream.child("codes").fields(rows, -(-columns // GROUP), 32)
    live = (words & 0xFFFF) < min(65536, round(sparse.live * 65536))
    position = (words >> 16) & (GROUP - 1)
    sign = 1 - 2 * ((words >> 19) & 1) if sparse.signed else torch.ones_like(words)
    signs = torch.zeros(rows, words.shape[1], GROUP, dtype=torch.int8, device=words.device)
    signs.scatter_(2, position.unsqueeze(-1), (sign * live).to(torch.int8).unsqueeze(-1))
    signs = signs.flatten(1)[:, :columns]
    if fmt.torch_dtype is not None:
        return Quantized(fmt, (signs.to(fmt.torch_dtype) * sparse.value))
    return _exact_codes(fmt, signs, stream, sparse.value)


def _exact_codes(fmt: Format, signs: Tensor, stream: Stream, value: float) -> Quantized:
    """scale = value / c with c in {1, 2, 4} per block, code = +-c: the product is the same, a moved scale shows."""
    assert fmt.scaling is not None
    rows, columns = signs.shape
    draw = stream.child("scales").fields(*fmt.scaling.scale_shape(rows, columns), 16)
    power = draw % 3
    magnitude = expand_blocks((1 << power).to(torch.int8), (rows, columns), fmt.scaling.group)
    codes = _code_table(fmt).to(signs.device)[(signs * magnitude).int() + 4]
    scales = torch.ldexp(torch.full_like(power, 1, dtype=torch.float64) * value, -power)
    if not fmt.scaling.global_scale:
        return Quantized(fmt, codes, _store(fmt, scales))
    lift = 2.0 ** (stream.child("global").fields(1, 1, 16).item() % 3)
    return Quantized(fmt, codes, _store(fmt, scales * lift), torch.tensor(lift, dtype=torch.float32, device=signs.device))


def _code_table(fmt: Format) -> Tensor:
    """[9] uint8: the codes of -4 .. 4 (of which 0, +-1, +-2, +-4 are used)."""
    table: Tensor = fmt.element.encode(torch.arange(-4, 5, dtype=torch.float64)).to(torch.uint8)
    return table
