"""What block quantisers share: find each block's maximum, derive a scale, scale, pick codes. A rule is the four choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference.format import Format, Golden, Quantized, amax_of, from_blocks, to_blocks
from reference.grid import Element, ElementType

Encoder = Callable[[Format, Tensor, Tensor | None], Quantized]
FLT_MAX = torch.finfo(torch.float32).max
FLT_MIN = torch.finfo(torch.float32).tiny  # smallest normal float32
LARGEST_SUBNORMAL = FLT_MIN - 2.0**-149


def f32(value: float) -> float:
    """The Python float nearest to `value` among the float32 values: a constant as a C compiler stores it."""
    return float(torch.tensor(value, dtype=torch.float32))


def flush(x: Tensor) -> Tensor:
    """x with subnormal float32 values replaced by zeros of their sign: what `.ftz` instructions read and write."""
    return torch.nn.functional.hardshrink(x, LARGEST_SUBNORMAL).copysign_(x)


def over(limit: float, x: Tensor) -> Tensor:
    """limit / x with one rounding. Torch computes `float / tensor` as `tensor.reciprocal() * float`: two."""
    return torch.full_like(x, limit) / x


def nearest_even(element: Element, x: Tensor) -> Tensor:
    """Codes by round to nearest, ties to even, saturating."""
    return element.encode(x)


def ties_lower(element: Element, x: Tensor) -> Tensor:
    """Codes by round to nearest, ties to the lower magnitude, the sign bit set where x < 0: -0.0 -> 0, -0.1 -> code of -0."""
    assert isinstance(element, ElementType)
    return element.encode_ties(x, away=False) | ((x < 0).to(torch.int32) << (element.bits - 1))


def ties_lower_unsigned_zero(element: Element, x: Tensor) -> Tensor:
    """As `ties_lower`, but a magnitude that rounds to 0 gives code 0 whatever its sign (DeepGEMM)."""
    assert isinstance(element, ElementType)
    magnitude = element.encode_ties(x, away=False)
    return magnitude | (((x < 0) & (magnitude != 0)).to(torch.int32) << (element.bits - 1))


def ties_away(element: Element, x: Tensor) -> Tensor:
    """Codes by round to nearest, ties away from zero, the sign bit copied."""
    assert isinstance(element, ElementType)
    return element.encode_ties(x, away=True) | (x.signbit().to(torch.int32) << (element.bits - 1))


@dataclass(frozen=True)
class Rule:
    """How one library quantises. All tensors are float32 and broadcast against blocks [a, b, c, d].

    scale(amax, gs): codes of the scale grid (integers) or float32 scales, from the blocks' maxima [a, 1, c, 1];
    scaled(x, s, amax, gs): what is rounded, s being the decoded scale; pick(element, scaled): the codes;
    keep_nan: a NaN makes its block's maximum NaN, otherwise it is ignored; ftz: subnormal inputs are read as 0.
    """

    scale: Callable[[Tensor, Tensor | None], Tensor]
    scaled: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    pick: Callable[[Element, Tensor], Tensor] = nearest_even
    keep_nan: bool = False
    ftz: bool = False

    def __call__(self, fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
        """The `encoder` of a Format that quantises by this rule."""
        assert fmt.scaling is not None
        blocks = to_blocks(flush(x.float()) if self.ftz else x.float(), fmt.scaling.group)
        gs = None if global_scale is None else global_scale.reshape(-1, 1, 1, 1)
        amax = amax_of(blocks, self.keep_nan)
        scales = self.scale(amax, gs)
        decoded = scales if scales.is_floating_point() else fmt.scaling.element.decode(scales, torch.float32)
        codes = self.pick(fmt.element, self.scaled(blocks, decoded, amax, gs)).to(torch.uint8)
        kept = fmt.scaling.store(scales) if scales.is_floating_point() else scales.to(torch.uint8)
        return Quantized(fmt, from_blocks(codes, (x.shape[0], x.shape[1])), kept.flatten(2).squeeze(1), global_scale)


def divide(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    """x / s."""
    return x / s


def multiply(x: Tensor, s: Tensor, amax: Tensor, gs: Tensor | None) -> Tensor:
    """x * (1 / s): two roundings where `divide` has one."""
    return x * (1 / s)


def amax_over(limit: float, floor: float = 0.0, zero: float = 1.0) -> Callable[[Tensor, Tensor | None], Tensor]:
    """scale = max(amax / limit, floor), and `zero` where that is 0."""

    def scale(amax: Tensor, gs: Tensor | None) -> Tensor:
        s = (amax / limit).clamp(min=floor)
        return torch.where(s == 0, zero, s)

    return scale


def clamped_amax_over(limit: float, least: float) -> Callable[[Tensor, Tensor | None], Tensor]:
    """scale = max(amax, least) / limit."""
    return lambda amax, gs: amax.clamp(min=least) / limit


def variant(fmt: Format, rule: str, encoder: Encoder, source: str, goldens: tuple[Golden, ...], ties: str = "even") -> Format:
    """`fmt` by another rule, as one of its `variants`."""
    return replace(fmt, name=f"{fmt.name}:{rule}", encoder=encoder, source=source, goldens=goldens, ties=ties, variants=())


def with_variants(fmt: Format, *variants: Format) -> Format:
    """`fmt` with its variants in place."""
    return replace(fmt, variants=variants)
