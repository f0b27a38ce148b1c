"""Element types as finite sets of values: what a code means, how a value is rounded, how far apart neighbours are.

Every grid is built from its definition (exponent bits, mantissa bits, bias, specials), never from a torch cast: the
casts changed between releases (torch 2.12 made the float8 casts saturate) and are themselves under test.
Sources: OCP Microscaling Formats v1.0 section 5 (E2M1, E4M3, E8M0), IEEE 754 (fp16, fp32), bfloat16 as truncated fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_TABLE_BITS = 8  # grids up to one byte are looked up; wider ones are computed


@dataclass(frozen=True)
class ElementType:
    """A signed floating-point grid of `1 + exponent_bits + mantissa_bits` bits with gradual underflow.

    `specials` says what the top exponent holds: "none" (all codes finite: E2M1), "nan" (only the all-ones code is NaN:
    E4M3FN) or "ieee" (inf and NaN: fp16, bf16, fp32).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str
    source: str

    @property
    def bits(self) -> int:
        """Storage bits of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share its spacing."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value."""
        top = (1 << self.exponent_bits) - 1
        return top - self.bias - (1 if self.specials == "ieee" else 0)

    @property
    def max(self) -> float:
        """Largest finite value."""
        ones = (1 << self.mantissa_bits) - 1 - (1 if self.specials == "nan" else 0)
        return float(2.0**self.max_exponent * (1 + ones / 2**self.mantissa_bits))

    @cached_property
    def values(self) -> Tensor:
        """[2**bits] float64: the value of every code; NaN and inf where the type has them. One-byte types only."""
        if self.bits > MAX_TABLE_BITS:
            raise ValueError(f"{self.name} has {self.bits} bits: decode() computes it, there is no table")
        return _decode_bits(self, torch.arange(2**self.bits))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Value of each integer code, as `dtype`, which must hold every value of the grid."""
        if self.bits > MAX_TABLE_BITS:
            return _decode_bits(self, codes).to(dtype)
        table = self.values.to(codes.device, dtype)
        return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)  # 6x faster than table[codes]

    def ulp(self, x: Tensor) -> Tensor:
        """float64 spacing of the grid around |x|; at and below the smallest normal it is the subnormal spacing."""
        exponent = torch.frexp(x.double().abs())[1].to(torch.int32) - 1
        exponent = torch.where(x == 0, self.min_exponent, exponent).clamp(self.min_exponent, self.max_exponent)
        return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - self.mantissa_bits)

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value as float64, ties to even, saturating at +-max; NaN stays NaN."""
        x = x.double()
        spacing = self.ulp(x)
        return torch.where(x.isnan(), x, ((x / spacing).round() * spacing).clamp(-self.max, self.max))

    def encode(self, x: Tensor) -> Tensor:
        """int32 code of the nearest grid value (ties to even, saturating). Zero keeps its sign.

        NaN becomes the positive NaN code, or +max where the grid has none (cuda_fp4.hpp does the same).
        """
        value = self.round(x)
        exponent = torch.frexp(value.abs())[1].to(torch.int64) - 1
        exponent = exponent.clamp(self.min_exponent, self.max_exponent)
        scaled = torch.ldexp(value.abs(), (self.mantissa_bits - exponent).to(torch.int32)).nan_to_num(0).to(torch.int64)
        hidden = 1 << self.mantissa_bits
        normal = scaled >= hidden
        biased = torch.where(normal, exponent + self.bias, torch.zeros_like(exponent))
        mantissa = torch.where(normal, scaled - hidden, scaled)
        code = (biased << self.mantissa_bits) | mantissa
        code = torch.where(x.isnan(), torch.full_like(code, self._nan_code()), code)
        sign = torch.signbit(x).to(torch.int64) & (~x.isnan()).to(torch.int64)
        return (code | (sign << (self.bits - 1))).to(torch.int64 if self.bits == 32 else torch.int32)

    def _nan_code(self) -> int:
        positive = (1 << (self.bits - 1)) - 1
        if self.specials == "ieee":
            return ((1 << self.exponent_bits) - 1 << self.mantissa_bits) | (1 << (self.mantissa_bits - 1))
        return positive


def _decode_bits(element: ElementType, codes: Tensor) -> Tensor:
    bits = codes.to(torch.int64) & ((1 << element.bits) - 1)
    mantissa = bits & ((1 << element.mantissa_bits) - 1)
    biased = (bits >> element.mantissa_bits) & ((1 << element.exponent_bits) - 1)
    subnormal = biased == 0
    fraction = torch.where(subnormal, mantissa, mantissa + (1 << element.mantissa_bits)).double()
    exponent = torch.where(subnormal, 1, biased) - element.bias - element.mantissa_bits
    value = torch.ldexp(fraction, exponent.to(torch.int32))
    top = biased == (1 << element.exponent_bits) - 1
    if element.specials == "ieee":
        value = torch.where(top & (mantissa == 0), torch.inf, value)
        value = torch.where(top & (mantissa != 0), torch.nan, value)
    if element.specials == "nan":
        value = torch.where(top & (mantissa == (1 << element.mantissa_bits) - 1), torch.nan, value)
    return torch.where((bits >> (element.bits - 1)) == 1, -value, value)


@dataclass(frozen=True)
class IntegerType:
    """Two's complement integers from -`limit` - 1 to `limit`: the grid of integer-quantised weights."""

    name: str
    bits: int
    source: str
    specials: str = "none"

    @property
    def max(self) -> float:
        """Largest value; the encoder is symmetric, so the most negative code is never produced."""
        return float((1 << (self.bits - 1)) - 1)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Sign-extended value of each code."""
        half = 1 << (self.bits - 1)
        return (((codes.to(torch.int32) + half) & (2 * half - 1)) - half).to(dtype)

    def ulp(self, x: Tensor) -> Tensor:
        """Spacing: 1 everywhere."""
        return torch.ones_like(x, dtype=torch.float64)

    def round(self, x: Tensor) -> Tensor:
        """Nearest integer as float64, ties to even, saturating at +-max."""
        return x.double().round().clamp(-self.max, self.max)

    def encode(self, x: Tensor) -> Tensor:
        """int32 two's complement code in the low `bits` bits."""
        return self.round(x).to(torch.int32) & ((1 << self.bits) - 1)


@dataclass(frozen=True)
class PowerOfTwoType:
    """E8M0: 2**(byte - 127) for bytes 0..254, 255 is NaN; no sign, no zero (OCP MX v1.0 section 5.4.1)."""

    name: str = "e8m0"
    bits: int = 8
    source: str = "OCP MX v1.0 section 5.4.1"

    @property
    def max(self) -> float:
        """Largest value."""
        return 2.0**127

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """2**(code - 127); NaN for 255. Byte 0 is 2**-127, not zero."""
        exponent = codes.to(torch.int32) - 127
        value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
        return torch.where(codes == 255, torch.nan, value).to(dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Round *up* to a power of two, as `cvt.rp.satfinite.ue8m0` does: 0 -> 0, inf -> 254, NaN -> 255, sign ignored."""
        magnitude = x.double().abs()
        mantissa, exponent = torch.frexp(magnitude)
        ceil_log2 = exponent - (mantissa == 0.5).to(exponent.dtype)  # frexp: x = m * 2**e with m in [0.5, 1)
        code = (ceil_log2 + 127).clamp(0, 254)
        code = torch.where(magnitude == 0, 0, torch.where(magnitude.isinf(), 254, code))
        return torch.where(x.isnan(), 255, code).to(torch.int32)


Element = ElementType | IntegerType | PowerOfTwoType

E2M1 = ElementType("e2m1", 2, 1, 1, "none", "OCP MX v1.0 section 5.3.3")
E4M3 = ElementType("e4m3", 4, 3, 7, "nan", "OCP OFP8 v1.0 table 1 (E4M3)")
BF16 = ElementType("bf16", 8, 7, 127, "ieee", "fp32 with its low 16 bits cut off")
FP16 = ElementType("fp16", 5, 10, 15, "ieee", "IEEE 754-2019 binary16")
FP32 = ElementType("fp32", 8, 23, 127, "ieee", "IEEE 754-2019 binary32")
E8M0 = PowerOfTwoType()
INT4 = IntegerType("int4", 4, "two's complement nibble")
INT8 = IntegerType("int8", 8, "two's complement byte")

FLOATS = {element.name: element for element in (BF16, FP16, FP32, E4M3)}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
