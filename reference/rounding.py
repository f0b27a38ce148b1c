"""Named rounding points: where an implementation leaves the accumulator for a narrower type, and through what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.exactness import ACCUMULATORS
from reference.format import Format
from reference.formats import get
from reference.grid import FLOATS

THEN = ">"


@dataclass(frozen=True)
class Rounding:
    """One text per point: None (nothing narrower than the fp32 accumulator is written), an element type ("bf16"), a
    format ("mxfp8": quantised and read back), or a chain ("bf16>nvfp4": rounded to bf16, then quantised).

    x: input of GEMM 1; routing_weight: the top-k weights; weighted_x: x times routing weight, where it is GEMM 1 that reads
    weighted rows; product: what either GEMM sums up, before an expert's bias is added;
    gate_up: output of GEMM 1, with its bias; activated: act(gate) before it meets up;
    middle: input of GEMM 2; row: output of GEMM 2 per expert; weighted: row times routing weight; partial: the running sum
    over the token's experts; out: the layer's output. x_scale and middle_scale: what a format whose scaling is `static` is
    handed there, as `requantized` takes it; None, and at every other point, scales are fitted to the tensor at hand.
    accumulate: the accumulator of both GEMMs, one of `reference.exactness.ACCUMULATORS`; ValueError for another name.
    """

    x: str | None = None
    routing_weight: str | None = None
    weighted_x: str | None = None
    product: str | None = None
    gate_up: str | None = None
    activated: str | None = None
    middle: str | None = None
    row: str | None = None
    weighted: str | None = None
    partial: str | None = None
    out: str | None = None
    x_scale: float | None = None
    middle_scale: float | None = None
    accumulate: str = "fp32"

    def __post_init__(self) -> None:
        if self.accumulate not in ACCUMULATORS:
            raise ValueError(f"accumulator {self.accumulate!r} unknown; known: {', '.join(ACCUMULATORS)}")

    def steps(self, point: str) -> tuple[str, ...]:
        """The names a value passes at `point`, in order."""
        text = getattr(self, point)
        return () if text is None else tuple(text.split(THEN))

    @property
    def quantises(self) -> bool:
        """Does a format with scales of its own stand between GEMM 1 and GEMM 2?"""
        return any(step not in FLOATS for point in ("gate_up", "activated", "middle") for step in self.steps(point))

    @property
    def spans_rows(self) -> bool:
        """Is a scale fitted to several rows somewhere, so that a row's error depends on the others?"""
        for point in ("x", "gate_up", "activated", "middle", "row"):
            for name in self.steps(point):
                scaling = None if name in FLOATS else get(name).scaling
                if scaling is None:
                    continue
                fitted = scaling.static and getattr(self, f"{point}_scale", None) is None
                if fitted or (scaling.group[0] != 1 and not scaling.static):
                    return True
        return False

    def at(self, point: str, value: Tensor) -> Tensor:
        """`value` (float64; [rows, columns] where a format is involved) as it leaves `point`."""
        for name in self.steps(point):
            value = FLOATS[name].round(value) if name in FLOATS else self._requantized(point, name, value)
        return value

    def _requantized(self, point: str, name: str, value: Tensor) -> Tensor:
        return requantized(get(name), value, getattr(self, f"{point}_scale", None))

    def variance(self, point: str, value: Tensor) -> Tensor:
        """Variance of the error made at `point`. A grid of spacing u around a value adds u**2 / 12. Of a block format the
        error itself is known, (read back - value): a kernel's value differs from the ideal one by far less than a 4- or
        8-bit grid's spacing, and one that falls to the other side of a midpoint errs by as much with the other sign.
        Before GEMM 2 such errors also depend on each other: `reference.bounds.known_error`."""
        total = torch.zeros_like(value)
        for name in self.steps(point):
            if name in FLOATS:
                total += FLOATS[name].ulp(value).square() / 12
            else:
                total += (self._requantized(point, name, value) - value).square()
        return total


def requantized(fmt: Format, value: Tensor, scale: float | None = None) -> Tensor:
    """value [rows, columns] through the format and back, float64. `scale`, for a format whose scaling is `static`: its global
    scale, or what a value is multiplied by to become a code (the encode sense of both)."""
    if not value.numel():
        return value
    narrow = value.float()
    if scale is None or fmt.scaling is None or not fmt.scaling.static:
        return fmt.decode(fmt.encode(narrow, fmt.fit_global_scale(narrow)))
    if fmt.scaling.global_scale:
        return fmt.decode(fmt.encode(narrow, torch.tensor(scale, device=value.device)))
    codes = fmt.element.encode(narrow * scale)
    return fmt.element.decode(codes) / scale


IDEAL = Rounding()
