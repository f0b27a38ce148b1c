"""Faults of a per-row quantiser in a carrier that loses nothing: the middle's rows over powers of two, still bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs

WARP_ROWS = 4  # rows of a slab that one warp reduces


class ScaledRows(BatchedMoe):
    """Clean: every row of the middle is stored divided by 2 ** floor(log2 amax), and GEMM 2's epilogue multiplies it back."""

    def activation_kernel(self, pre: Tensor, middle: Tensor, slabs: Slabs) -> None:
        """Scale the rows in use."""
        super().activation_kernel(pre, middle, slabs)
        self.scales = self.empty(len(middle), dtype=torch.float32)
        amax = self.amax(middle.float())
        for expert in range(len(self.local)):
            rows = slice(expert * slabs.capacity, expert * slabs.capacity + int(slabs.masked_m[expert]))
            self.scales[rows] = self.scale(amax[rows])
            middle[rows] = (middle[rows].float() * self.multiplier(self.scales[rows])[:, None]).to(middle.dtype)

    def amax(self, rows: Tensor) -> Tensor:
        """Largest magnitude of each row [rows, columns]."""
        return rows.abs().amax(-1)

    def scale(self, amax: Tensor) -> Tensor:
        """A power of two; 1 for a row of zeros."""
        return torch.where(amax == 0, 1.0, power_of_two(amax))

    def multiplier(self, scale: Tensor) -> Tensor:
        """What a row is multiplied by."""
        return 1 / scale

    def multiply(self, gemm: Gemm, expert: int, rows: Tensor, mask: Tensor, tile: int) -> Tensor:
        """Rows of the middle get their scale back."""
        total = super().multiply(gemm, expert, rows, mask, tile)
        if gemm.weights is not self.w2:
            return total
        return total * torch.where(mask, self.scales[torch.where(mask, rows, 0)], 1.0)[:, None]


def power_of_two(amax: Tensor) -> Tensor:
    """2 ** floor(log2 amax), 0 of 0."""
    mantissa, exponent = torch.frexp(amax)
    return torch.where(amax == 0, 0.0, torch.ldexp(torch.ones_like(mantissa), exponent - 1))


class ZeroRowUnguarded(ScaledRows):
    """The fast-math path takes the reciprocal of a row's scale without asking whether the row is all zero: inf, then NaN."""

    def scale(self, amax: Tensor) -> Tensor:
        """0 for a row of zeros."""
        return power_of_two(amax)


class MultiplierInHalf(ScaledRows):
    """The quantiser's multiplier, one over a power-of-two scale, is held in fp16: inf for rows below 2**-16."""

    def multiplier(self, scale: Tensor) -> Tensor:
        """Beyond 65504."""
        return (1 / scale).half().float()


class WarpSeesMaskedRows(ScaledRows):
    """A warp takes the maximum over 4 rows of a slab, masked ones included: padding moves the scale of real rows."""

    def amax(self, rows: Tensor) -> Tensor:
        """fmaxf drops NaN, and nothing drops the rest."""
        finite = super().amax(rows.nan_to_num(nan=0.0))
        lanes = torch.nn.functional.pad(finite, (0, -len(rows) % WARP_ROWS)).view(-1, WARP_ROWS)
        return lanes.amax(-1).repeat_interleave(WARP_ROWS)[: len(rows)]


FLASHINFER = "https://github.com/flashinfer-ai/flashinfer"
FAULTS = (
    planted("B087", MultiplierInHalf, "https://github.com/sgl-project/sglang/pull/33533", ("non_finite",)),
    planted("B103", WarpSeesMaskedRows, f"{FLASHINFER}/issues/3057", ("poison", "zeros", "non_finite")),
    planted("B110", ZeroRowUnguarded, f"{FLASHINFER}/pull/5031", ("non_finite",)),
)
