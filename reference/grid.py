"""Element types as finite sets of values: what a code means, how a value is rounded, how far apart neighbours are.

Every grid is built from its definition (exponent bits, mantissa bits, bias, specials), never from a torch cast: the
casts changed between releases (torch 2.12 made the float8 casts saturate) and are themselves under test.
Sources: OCP Microscaling Formats v1.0 section 5 (E2M1, E4M3, E5M2, E8M0), IEEE 754 (fp16, fp32), bfloat16 as truncated
fp32, AMD CDNA3 ISA (the FNUZ types).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_TABLE_BITS = 8  # grids up to one byte are looked up; wider ones are computed
NARROW = (torch.float32, torch.bfloat16, torch.float16)  # every value of these is a float32


def binade(x: Tensor) -> Tensor:
    """2**floor(log2(|x|)) of a float64 tensor: the mantissa cut off. 0 for zero and subnormals, inf for inf and NaN."""
    return (x.view(torch.int64) & (0x7FF << 52)).view(torch.float64)


def odd_bf16(x: Tensor) -> Tensor:
    """int32 bf16 bits 0..65535 of float32 x rounded to odd: cut off, and the last bit set if anything was lost.

    To round that to nearest on a grid of at most six significant bits gives what rounding x gives (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008): the last bit says on
    which side of every value and midpoint x lies.
    """
    bits = x.view(torch.int32)
    carry = (bits & 0xFFFF).add_(0xFFFF)  # bit 16 is set if the low half is not zero
    return carry.bitwise_or_(bits).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def every_bf16() -> Tensor:
    """[65536] float64: the value of every bf16 bit pattern, in the order of the pattern as an unsigned number."""
    patterns = torch.arange(1 << 16, dtype=torch.int32) << 16
    return patterns.view(torch.float32).double()


def look_up(table: Tensor, x: Tensor) -> Tensor:
    """int32 table[odd_bf16(x)] of a table [65536] over bf16 bit patterns; x float32, bf16 or fp16."""
    return table.to(x.device).index_select(0, odd_bf16(x.float()).flatten()).view(x.shape).to(torch.int32)


@dataclass(frozen=True)
class ElementType:
    """A signed floating-point grid of `1 + exponent_bits + mantissa_bits` bits with gradual underflow.

    `specials` says what is not a number: "none" (all codes finite: E2M1), "nan" (only the all-ones code is NaN: E4M3FN),
    "ieee" (the top exponent holds inf and NaN: E5M2, fp16, bf16, fp32) or "fnuz" (the code of -0 is NaN: E4M3FNUZ).
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

    @property
    def nan_code(self) -> int:
        """The code NaN is encoded as: the quiet NaN of IEEE types, +max where the grid has no NaN (as cuda_fp4.hpp does)."""
        if self.specials == "ieee":
            return ((1 << self.exponent_bits) - 1 << self.mantissa_bits) | (1 << (self.mantissa_bits - 1))
        sign = 1 << (self.bits - 1)
        return sign if self.specials == "fnuz" else sign - 1

    @cached_property
    def values(self) -> Tensor:
        """[2**bits] float64: the value of every code; NaN and inf where the type has them. One-byte types only."""
        if self.bits > MAX_TABLE_BITS:
            raise ValueError(f"{self.name} has {self.bits} bits: decode() computes it, there is no table")
        return _decode_bits(self, torch.arange(2**self.bits))

    @cached_property
    def midpoints(self) -> Tensor:
        """float64, ascending: what lies half way between neighbouring values from 0 to max; index = lower magnitude's code."""
        magnitudes = self.values[: 1 << (self.bits - 1)]
        magnitudes = magnitudes[magnitudes.isfinite()]
        return (magnitudes[1:] + magnitudes[:-1]) / 2

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Value of each integer code, as `dtype`, which must hold every value of the grid."""
        if self.bits > MAX_TABLE_BITS:
            return _decode_bits(self, codes).to(dtype)
        table = self.values.to(codes.device, dtype)
        return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)  # 6x faster than table[codes]

    @cached_property
    def codes_of_bf16(self) -> Tensor:
        """[65536] uint8: the code of every bf16 bit pattern. One-byte types only."""
        return self._codes(every_bf16()).to(torch.uint8)

    @cached_property
    def ties_of_bf16(self) -> Tensor:
        """[2, 65536] uint8: magnitude codes of every bf16 bit pattern, ties to the lower magnitude or away from zero."""
        every = every_bf16().abs()
        return torch.stack([torch.bucketize(every, self.midpoints, right=away).to(torch.uint8) for away in (False, True)])

    def ulp(self, x: Tensor) -> Tensor:
        """float64 spacing of the grid around |x|; at and below the smallest normal it is the subnormal spacing."""
        return binade(x.double()).clamp_(2.0**self.min_exponent, 2.0**self.max_exponent).mul_(2.0**-self.mantissa_bits)

    def round(self, x: Tensor) -> Tensor:
        """Nearest grid value as float64, ties to even, saturating at +-max; NaN stays NaN.

        Division and product are by powers of two, hence exact: the only rounding is the one to an integer.
        """
        spacing = self.ulp(x)
        return (x.double() / spacing).round_().mul_(spacing).clamp_(-self.max, self.max)

    def encode(self, x: Tensor) -> Tensor:
        """int32 code of the nearest grid value (ties to even, saturating; int64 for 32-bit grids).

        Zero keeps its sign where the grid has two zeros. NaN becomes `nan_code`, its sign dropped.
        """
        if self.bits > MAX_TABLE_BITS or x.dtype not in NARROW:
            return self._codes(x.double())
        return look_up(self.codes_of_bf16, x)

    def encode_ties(self, x: Tensor, away: bool) -> Tensor:
        """int32 *magnitude* code of the nearest value of float32 |x|, ties to the lower magnitude or `away` from zero.

        NaN counts as larger than max. The sign is left to the caller: those who round this way disagree about -0.
        """
        return look_up(self.ties_of_bf16[int(away)], x)

    def _codes(self, x: Tensor) -> Tensor:
        """`encode` of float64 x, from the bits of the rounded value."""
        value = self.round(x)
        magnitude = value.abs()
        normal = (magnitude.view(torch.int64) >> (52 - self.mantissa_bits)) - ((1023 - self.bias) << self.mantissa_bits)
        subnormal = (magnitude * 2.0 ** (self.mantissa_bits - self.min_exponent)).to(torch.int64)
        code = torch.where(magnitude < 2.0**self.min_exponent, subnormal, normal)
        signed = value.signbit() if self.specials != "fnuz" else value < 0
        code = torch.where(value.isnan(), self.nan_code, code | (signed.long() << (self.bits - 1)))
        return code.to(torch.int64 if self.bits == 32 else torch.int32)


def _decode_bits(element: ElementType, codes: Tensor) -> Tensor:
    bits = codes.to(torch.int64) & ((1 << element.bits) - 1)
    mantissa = bits & ((1 << element.mantissa_bits) - 1)
    biased = (bits >> element.mantissa_bits) & ((1 << element.exponent_bits) - 1)
    subnormal = biased == 0
    fraction = torch.where(subnormal, mantissa, mantissa + (1 << element.mantissa_bits)).double()
    exponent = torch.where(subnormal, 1, biased) - element.bias - element.mantissa_bits
    value = torch.ldexp(fraction, exponent.to(torch.int32))
    top = biased == (1 << element.exponent_bits) - 1
    value = torch.where((bits >> (element.bits - 1)) == 1, -value, value)
    if element.specials == "ieee":
        value = torch.where(top & (mantissa == 0), value.sign() * torch.inf, value)
        value = torch.where(top & (mantissa != 0), torch.nan, value)
    if element.specials == "nan":
        value = torch.where(top & (mantissa == (1 << element.mantissa_bits) - 1), torch.nan, value)
    if element.specials == "fnuz":
        value = torch.where(bits == 1 << (element.bits - 1), torch.nan, value)
    return value


@dataclass(frozen=True)
class IntegerType:
    """Two's complement integers from -`max` - 1 to `max`: the grid of integer-quantised weights.

    The encoder is symmetric, so the most negative code is not produced, unless `lowest` says that it is.
    """

    name: str
    bits: int
    source: str
    specials: str = "none"
    lowest: bool = False

    @property
    def max(self) -> float:
        """Largest value."""
        return float((1 << (self.bits - 1)) - 1)

    @property
    def min(self) -> float:
        """Smallest value the encoder produces."""
        return -self.max - (1 if self.lowest else 0)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Sign-extended value of each code."""
        half = 1 << (self.bits - 1)
        return (((codes.to(torch.int32) + half) & (2 * half - 1)) - half).to(dtype)

    def ulp(self, x: Tensor) -> Tensor:
        """Spacing: 1 everywhere."""
        return torch.ones_like(x, dtype=torch.float64)

    def round(self, x: Tensor) -> Tensor:
        """Nearest integer as float64, ties to even, saturating at `min` and `max`; NaN stays NaN."""
        return x.double().round().clamp(self.min, self.max)

    def encode(self, x: Tensor) -> Tensor:
        """int32 two's complement code in the low `bits` bits; NaN becomes 0, as CUDA's float to int conversions do."""
        work = x.float() if x.dtype in NARROW else x.double()
        value = work.round().clamp_(self.min, self.max).nan_to_num_(0.0)
        return value.to(torch.int32) & ((1 << self.bits) - 1)


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

    def encode_down(self, x: Tensor) -> Tensor:
        """int32: round *down* to a power of two, the exponent bits of float32 x: 0 and subnormals -> 0, inf, NaN -> 255."""
        return (x.float().view(torch.int32) >> 23) & 0xFF


Element = ElementType | IntegerType | PowerOfTwoType

E2M1 = ElementType("e2m1", 2, 1, 1, "none", "OCP MX v1.0 section 5.3.3")
E4M3 = ElementType("e4m3", 4, 3, 7, "nan", "OCP OFP8 v1.0 table 1 (E4M3)")
E5M2 = ElementType("e5m2", 5, 2, 15, "ieee", "OCP OFP8 v1.0 table 1 (E5M2)")
E4M3FNUZ = ElementType("e4m3fnuz", 4, 3, 8, "fnuz", "AMD CDNA3 (gfx942) 8-bit float, also ONNX float8e4m3fnuz")
E5M2FNUZ = ElementType("e5m2fnuz", 5, 2, 16, "fnuz", "AMD CDNA3 (gfx942) 8-bit brain float, also ONNX float8e5m2fnuz")
BF16 = ElementType("bf16", 8, 7, 127, "ieee", "fp32 with its low 16 bits cut off")
FP16 = ElementType("fp16", 5, 10, 15, "ieee", "IEEE 754-2019 binary16")
FP32 = ElementType("fp32", 8, 23, 127, "ieee", "IEEE 754-2019 binary32")
E8M0 = PowerOfTwoType()
INT4 = IntegerType("int4", 4, "two's complement nibble")
INT4_FULL = IntegerType("int4_full", 4, "two's complement nibble, -8 in use", lowest=True)
INT8 = IntegerType("int8", 8, "two's complement byte")

FLOATS = {element.name: element for element in (BF16, FP16, FP32, E4M3)}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
