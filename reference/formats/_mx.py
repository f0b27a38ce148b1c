"""The rules by which libraries choose an E8M0 block scale, and what they multiply the block with.

Each function returns a `Rule.scale` (amax -> byte) or a `Rule.scaled`. Bytes are made from float32 bits: log2 in float32
is wrong just above powers of two, and casts to E8M0 round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.formats._rules import f32, flush
from reference.grid import E8M0

Scale = Callable[[Tensor, Tensor | None], Tensor]
Scaled = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def ceil_of_product(limit: float) -> Scale:
    """ceil_e8m0(amax * f32(1 / limit)), the product flushed: CUDA, whose rcp.approx(limit) is taken as correctly rounded."""
    return lambda amax, gs: E8M0.encode(flush(amax * f32(1 / limit)))


def ceil_of_quotient(limit: float, least: float = 0.0) -> Scale:
    """ceil_e8m0(max(amax, least) / limit), the quotient rounded once."""
    return lambda amax, gs: E8M0.encode(amax.clamp(min=least) / limit)


def floor_of_amax(element_exponent: int, mantissa_bits: int | None = None) -> Scale:
    """floor(log2 amax) - element_exponent (OCP), amax first rounded half up to `mantissa_bits` if given; NaN -> 255."""
    carry = 0 if mantissa_bits is None else 1 << (22 - mantissa_bits)

    def scale(amax: Tensor, gs: Tensor | None) -> Tensor:
        exponent = ((amax.view(torch.int32) + carry) >> 23) & 0xFF
        return torch.where(amax.isnan(), 255, (exponent - element_exponent).clamp(0, 254))

    return scale


def ceil_of_amax(element_exponent: int) -> Scale:
    """ceil(log2 amax) - element_exponent, at least byte 0; inf counts as 2**128, NaN -> 255."""

    def scale(amax: Tensor, gs: Tensor | None) -> Tensor:
        bits = amax.view(torch.int32)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
        return torch.where(amax.isnan(), 255, (exponent - element_exponent).clamp(min=0))

    return scale


def up_by_bits(limit: float) -> Scale:
    """(bits(amax / limit) + 0x7fffff) >> 23: up to a power of two; a NaN overflows into the sign and leaves byte 0."""
    return lambda amax, gs: (((amax / limit).view(torch.int32).long() + 0x7FFFFF) >> 23).to(torch.int32) & 0xFF


def down_by_bits(limit: float) -> Scale:
    """bits(amax / limit) >> 23: down to a power of two."""
    return lambda amax, gs: E8M0.encode_down(amax / limit)


def deepgemm(limit: float) -> Scale:
    """ceil_e8m0(max(amax, 1e-4) / limit), a byte of 254 at most."""
    return lambda amax, gs: ceil_power(amax.clamp(min=1e-4) / limit).view(torch.int32) >> 23


def times_inverse(zero: float | None = None, ftz: bool = False) -> Scaled:
    """x * 2**(127 - byte), exact up to underflow; blocks of byte 0 times `zero` if given; `ftz`: 2**-127 counts as 0."""

    def scaled(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
        inverse = 1 / s
        if zero is not None:
            inverse = torch.where(s == 2.0**-127, zero, inverse)
        return x * (flush(inverse) if ftz else inverse)

    return scaled


def ceil_power(x: Tensor) -> Tensor:
    """Normal positive float32 x rounded up to a power of two, 2**127 at most (DeepGEMM; its clamp from below never acts)."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent.clamp(max=254) << 23).view(torch.float32)
