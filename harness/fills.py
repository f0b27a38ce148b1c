"""How random words become codes and scales: the `real` fill (every code its own draw), and integers packed for the `exact` one.

Nothing here names a format: a fill reads the element grid and the scaling of whatever format it is handed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from harness.hashing import Stream, Streams
from reference.format import WHOLE, Format, Quantized, block_amax, expand_blocks
from reference.grid import FLOATS, ElementType, IntegerType, PowerOfTwoType

BINADES = 4  # the real fill spreads floating-point codes over this many binades: the whole of E2M1
ROUND_UP = 1.5  # what rounding scales up to a power of two adds to their root mean square
POWERS = 3  # block scales of the exact fill: three powers of two, all that E2M1's integers 1, 2, 4 have room for
FEW_BLOCKS = 8  # of a matrix: below, random scales would too often agree with the next block's or expert's (one time in three)
SCALE_LEVELS = (2.0**-7, 8.0, 192.0)  # E4M3 scales around its subnormals, its middle and below its end 448
SCALE_STEPS = 256  # real block scales are base * 2**{-1, 0} * (1 + j / 256), exact in float64 on every device


@dataclass(frozen=True)
class Scales:
    """Where the block scales of one matrix of some experts come from: `own` are their streams, `shared` that of all experts,
    and `turns` (0..2) differ from the next expert's."""

    own: Streams
    shared: Stream
    turns: tuple[int, ...]


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


def real(fmt: Format, shape: tuple[int, int], stream: Stream, rms: float, common: Stream | None = None) -> Quantized:
    """A dense random matrix [rows, columns] of root mean square about `rms`, drawn as codes and scales. `common`: the stream
    of a matrix with which it shares the odd part of the factor of a `static` format: the two differ by a power of two, so a
    library with one factor for both can be handed the other as a shift of its scales or codes."""
    own, other = (Streams(s.seed, (s.name,), s.device) for s in (stream, common or stream))
    return real_all(fmt, shape, own, rms, other)[0]


def real_all(fmt: Format, shape: tuple[int, int], own: Streams, rms: float, common: Streams) -> list[Quantized]:
    """`real` of several streams."""
    element = fmt.element
    assert isinstance(element, ElementType | IntegerType)
    codes = window(element, own.child("codes").raw(*shape, element.bits))
    base = rms / window_rms(element)
    if fmt.torch_dtype is not None:  # the bits of a plain format are its value's
        values = codes.contiguous().view(fmt.torch_dtype) * 2.0 ** round(math.log2(base))
        return [Quantized(fmt, one) for one in values.unbind()]
    assert fmt.scaling is not None
    zeros = None
    if fmt.scaling.zero_points:
        base /= math.sqrt(2)  # code minus zero point: a difference of two such draws
        zeros = window(element, own.child("zeros").raw(*fmt.scaling.scale_shape(*shape), element.bits))
    return _split(fmt, codes, *_real_scales(fmt, shape, (own, common), base), zeros)


def _split(
    fmt: Format, codes: Tensor, scales: Tensor, global_scales: Tensor | None, zeros: Tensor | None = None
) -> list[Quantized]:
    """The matrices that lie along the leading axis of these."""
    nothing = [None] * len(codes)
    factors = nothing if global_scales is None else global_scales.unbind()
    parts = zip(codes.unbind(), scales.unbind(), factors, nothing if zeros is None else zeros.unbind(), strict=True)
    return [Quantized(fmt, *part) for part in parts]


def _real_scales(
    fmt: Format, shape: tuple[int, int], streams: tuple[Streams, Streams], base: float
) -> tuple[Tensor, Tensor | None]:
    """Block scales [streams, ...] and global scales [streams] or None."""
    assert fmt.scaling is not None
    own, common = streams
    blocks = fmt.scaling.scale_shape(*shape)
    draw = own.child("scales").fields(*blocks, 16)
    odd = common.child("scales").fields(*blocks, 16) if fmt.scaling.group == (WHOLE, WHOLE) else draw
    jitter = (1 + (odd & (SCALE_STEPS - 1)).double() / SCALE_STEPS) / (1 + ((draw >> 8) & 1)).double()
    if isinstance(fmt.scaling.element, PowerOfTwoType):
        base /= ROUND_UP
    if not fmt.scaling.global_scale:
        return _store(fmt, jitter * base), None
    # The block scales sit somewhere on the scale grid; the global scale carries the rest (encode sense).
    levels, factors = [], []
    for word, shift in zip(*(_global_words(s) for s in (common, own)), strict=True):
        middle, part = SCALE_LEVELS[(word >> 8) % len(SCALE_LEVELS)], 1 + (word & (SCALE_STEPS - 1)) / SCALE_STEPS
        levels.append(middle)
        factors.append(middle / base * part / 2 * 2.0 ** (shift >> 12 & 1))
    level = torch.tensor(levels, dtype=torch.float64, device=draw.device)[:, None, None]
    return _store(fmt, jitter * level), torch.tensor(factors, dtype=torch.float32, device=draw.device)


def _global_words(streams: Streams) -> list[int]:
    """One word of each stream, drawn where it is read: a GPU would be waited for."""
    words: list[int] = replace(streams, device="cpu").child("global").fields(1, 1, 16).flatten().tolist()
    return words


def _store(fmt: Format, scales: Tensor) -> Tensor:
    """Scales as the format stores them: codes of its scale grid, or float32 where that is the grid."""
    assert fmt.scaling is not None
    element = fmt.scaling.element
    return fmt.scaling.store(scales.float()) if element is FLOATS["fp32"] else element.encode(scales).to(torch.uint8)


def pack_all(fmt: Format, integers: Tensor, unit: float, scales: Scales) -> list[Quantized]:
    """Matrices `integers` [n, rows, columns] times `unit` (a power of two), exactly, while codes and scales differ from block
    to block: scale = unit / 2**p and code = integer * 2**p with p in 0..2, less where a block's largest integer leaves no
    room."""
    if fmt.torch_dtype is not None:
        return [Quantized(fmt, codes) for codes in (integers.to(fmt.torch_dtype) * unit).unbind()]
    assert fmt.scaling is not None
    powers, block = _powers(fmt, (integers.shape[1], integers.shape[2]), scales), fmt.scaling.group[0]
    if block == WHOLE or integers.shape[1] % block:
        packed = [_packed(fmt, one, power) for one, power in zip(integers, powers, strict=True)]
        codes, powers = (torch.stack(part) for part in zip(*packed, strict=True))
    else:  # blocks end with a matrix: all of them are one tall one
        found = _packed(fmt, integers.flatten(0, 1), powers.flatten(0, 1))
        codes, powers = (part.unflatten(0, (len(integers), -1)) for part in found)
    stored = torch.exp2(-powers.double()) * unit
    if not fmt.scaling.global_scale:
        return _split(fmt, codes, _store(fmt, stored), None)
    lifts = torch.tensor([2.0 ** -(word % POWERS) for word in _global_words(scales.own)], device=integers.device)
    return _split(fmt, codes, _store(fmt, stored * lifts[:, None, None]), lifts)


def _packed(fmt: Format, integers: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of one matrix and the powers of its blocks, as there is room for them."""
    assert fmt.scaling is not None
    assert isinstance(fmt.element, ElementType | IntegerType)
    shape = (integers.shape[0], integers.shape[1])
    room = (fmt.element.max / block_amax(integers, fmt.scaling.group).clamp(min=1)).log2().floor().long()
    powers = torch.minimum(powers, room)
    quarters = expand_blocks((4 * torch.exp2(powers.float())).to(torch.int16), shape, fmt.scaling.group)
    table = _quarter_codes(fmt.element).to(integers.device)
    return table.index_select(0, (integers * quarters + len(table) // 2).flatten().int()).view(shape), powers


@cache
def _quarter_codes(element: ElementType | IntegerType) -> Tensor:
    """uint8: the codes of all quarters up to a largest value of 448; the fill asks for those on the grid."""
    largest = 4 * round(min(element.max, FLOATS["e4m3"].max))
    return element.encode(torch.arange(-largest, largest + 1, dtype=torch.float64) / 4).to(torch.uint8)


def _powers(fmt: Format, shape: tuple[int, int], scales: Scales) -> Tensor:
    """int64 0..2 for every block of every matrix. Many blocks: random, two experts or two neighbours agree in a third of
    them. Few: chosen, so that a block's neighbour along the row and the next expert's block always differ."""
    assert fmt.scaling is not None
    rows, columns = fmt.scaling.scale_shape(*shape)
    if rows * columns > FEW_BLOCKS:
        return scales.own.child("scales").fields(rows, columns, 16) % POWERS
    device = scales.shared.device
    along = torch.tensor([turn(i, columns) for i in range(columns)], device=device)
    turns = torch.tensor(scales.turns, device=device)[:, None, None]
    return (scales.shared.child("scales").fields(rows, 1, 16) + along + turns) % POWERS


def turn(i: int, count: int) -> int:
    """0..2, such that no two neighbours of a ring of `count` agree."""
    return 2 if count > 1 and count % 2 and i == count - 1 else i % 2


def peak(fmt: Format) -> float:
    """The code value to which the format's rule maps the largest magnitude of a scale group."""
    row = torch.full((1, 1), fmt.element.max)
    return float(fmt.element.decode(fmt.encode(row, fmt.fit_global_scale(row)).codes))


def real_acts(fmt: Format, shape: tuple[int, int], stream: Stream, rms: float, carrier: Format) -> tuple[Tensor, float]:
    """Fixed points of the quantiser `fmt`: dense random values [rows, columns] as `carrier` holds them, of root mean square
    about `rms`, each scale group with one element at its peak; and the scale that a `static` format is handed.

    value = code * scale * 2**k, of codes and scales so short that the carrier holds every product.
    """
    assert fmt.scaling is not None
    assert carrier.torch_dtype is not None
    rows, columns = shape
    group = fmt.scaling.group[1] or columns
    table, scales = _act_values(fmt).to(stream.device), _act_scales(fmt, carrier).to(stream.device)
    fields = stream.child("codes").raw(rows, columns, fmt.element.bits)
    codes = table[fields.flatten().int()].view(rows, columns // group, group)
    words = stream.child("peaks").fields(rows, columns // group, 32)
    sign = 1 - (0 if _asymmetric(fmt) else 2) * (words >> 16 & 1)
    codes.scatter_(2, (words & 0xFFFF).remainder(group).unsqueeze(-1), (sign * peak(fmt)).to(codes.dtype).unsqueeze(-1))
    drawn = scales[stream.child("scales").fields(rows, columns // group, 16) % len(scales)]
    if fmt.scaling.global_scale:  # so that a scale fitted to the row or to the tensor is the one handed over
        drawn.scatter_(1, stream.child("top").fields(rows, 1, 16) % drawn.shape[1], float(scales.max()))
    squares = (float(table.square().mean()) * (group - 1) + peak(fmt) ** 2) / group * float(scales.square().mean())
    power = 2.0 ** round(math.log2(rms / math.sqrt(squares)))
    return (codes * drawn.unsqueeze(-1) * power).flatten(1).to(carrier.torch_dtype), 1 / power


def _asymmetric(fmt: Format) -> bool:
    """A grid that reaches further down than up: only a positive peak is mapped to the largest code."""
    return isinstance(fmt.element, IntegerType) and fmt.element.lowest


def _act_values(fmt: Format) -> Tensor:
    """[2**bits] float32: the code values that real activations take, `window`'s with its top binade moved to the peak's."""
    element = fmt.element
    assert isinstance(element, ElementType | IntegerType)
    values = element.decode(window(element, torch.arange(2**element.bits, dtype=torch.uint8)), torch.float32)
    top = peak(fmt)
    shift = math.floor(math.log2(top)) - math.floor(math.log2(float(values.abs().max())))
    return (values * 2.0**shift).clamp(-top, top)


def _act_scales(fmt: Format, carrier: Format) -> Tensor:
    """float32: the block scales that real activations draw from, two binades of as many bits as the carrier has room for."""
    assert fmt.scaling is not None
    scaling = fmt.scaling
    if scaling.static and not scaling.global_scale:
        return torch.ones(1)
    if isinstance(scaling.element, PowerOfTwoType):
        return torch.tensor([1.0, 0.5])
    steps = 2 ** max(0, min(3, significant_bits(carrier.element) - significant_bits(fmt.element) - 1))
    jitter = torch.tensor([(1 + j / steps) / h for h in (1, 2) for j in range(steps)])
    if not scaling.global_scale:
        return jitter
    top = scaling.global_range / peak(fmt)
    return (jitter * 2.0 ** math.floor(math.log2(top))).clamp(max=top)


def significant_bits(element: object) -> int:
    """How many bits the magnitudes of a grid have."""
    assert isinstance(element, ElementType | IntegerType)
    return element.mantissa_bits + 1 if isinstance(element, ElementType) else element.bits - 1


def on_grid(element: object, values: list[float]) -> bool:
    """Are all of these values of the grid?"""
    assert isinstance(element, ElementType | IntegerType)
    wanted = torch.tensor(values, dtype=torch.float64)
    return torch.equal(element.round(wanted), wanted)
