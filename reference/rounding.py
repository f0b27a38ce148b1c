"""Named rounding points: where an implementation leaves the accumulator for a narrower type."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reference.grid import FLOATS, ElementType


@dataclass(frozen=True)
class Rounding:
    """One element-type name per point, None where nothing narrower than the fp32 accumulator is written.

    routing_weight: the top-k weights; gate_up: output of GEMM 1; activated: act(gate) before it meets up; middle: input
    of GEMM 2; row: output of GEMM 2 per expert; weighted: row times routing weight; partial: the running sum over the
    token's experts; out: the layer's output.
    """

    routing_weight: str | None = None
    gate_up: str | None = None
    activated: str | None = None
    middle: str | None = None
    row: str | None = None
    weighted: str | None = None
    partial: str | None = None
    out: str | None = None

    def element(self, point: str) -> ElementType | None:
        """The grid at `point`, or None."""
        name = getattr(self, point)
        return None if name is None else FLOATS[name]

    def at(self, point: str, value: Tensor) -> Tensor:
        """`value` (float64) as it leaves `point`."""
        element = self.element(point)
        return value if element is None else element.round(value)


IDEAL = Rounding()
