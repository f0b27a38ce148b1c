"""NVFP4 with adaptive block scales, "four over six": each block's maximum is mapped to 6 or to 4, whichever errs less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from reference import grid
from reference.format import Format, Golden, Quantized, Scaling, amax_of, from_blocks, to_blocks
from reference.formats._rules import FLT_MAX, f32, flush, variant, with_variants
from reference.formats.nvfp4 import BLOCK, SIXTH, inverse_scale
from reference.grid import E2M1, E4M3

CACHED = 2**18  # elements of 4 bytes: a megabyte, half of a core's second-level cache


def absolute(error: Tensor) -> Tensor:
    """|d|, in place: MAE."""
    return error.abs_()


def squared(error: Tensor) -> Tensor:
    """d * d, in place: MSE."""
    return error.square_()


@dataclass(frozen=True)
class FourOverSix:
    """The choice between the two candidates: `penalty` of one element's error; `exact` or reciprocal arithmetic;
    `lanes`: how many threads share a block, each summing BLOCK / lanes errors in order before the sums are added;
    `scaled_error`: errors are taken before the global scale is divided out (`err_use_fast_math`)."""

    penalty: Callable[[Tensor], Tensor]
    exact: bool = True
    lanes: int = 2
    scaled_error: bool = False

    def __call__(self, fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
        """The encoder, some rows at a time on a CPU: forty passes over what stays in the cache."""
        assert fmt.scaling is not None
        assert global_scale is not None
        gs, pieces = global_scale.reshape(-1, 1, 1, 1), 1 + x.numel() // CACHED if x.device.type == "cpu" else 1
        parts = [self._encode(to_blocks(flush(part.float()), fmt.scaling.group), gs) for part in x.chunk(pieces)]
        codes, scales = (torch.cat(sides) for sides in zip(*parts, strict=True))
        return Quantized(fmt, from_blocks(codes, (x.shape[0], x.shape[1])), scales.flatten(2).squeeze(1), global_scale)

    def _encode(self, blocks: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales, uint8. Candidate 4 is taken only if its error is strictly less; an all-zero block has both 0."""
        amax = amax_of(blocks)
        six = flush(flush(amax / 6) * gs) if self.exact else flush(gs * flush(amax * SIXTH))
        codes6, scale6, error6 = self._candidate(blocks, six, gs)
        codes4, scale4, error4 = self._candidate(blocks, six * 1.5, gs)
        four = error4 < error6
        codes, scales = torch.where(four, codes4, codes6), torch.where(four, scale4, scale6)
        return codes.masked_fill_(amax == 0, 0), scales.masked_fill_(amax == 0, 0)

    def _candidate(self, blocks: Tensor, wanted: Tensor, gs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale codes and summed error of quantising with the block scale nearest to `wanted`."""
        scale = E4M3.encode(wanted)
        s = E4M3.decode(scale, torch.float32)
        inverse = inverse_scale(s, gs)
        codes = E2M1.encode(blocks * (inverse.clamp(max=FLT_MAX) if self.exact else inverse))
        error = E2M1.decode(codes, torch.float32).mul_(s)  # exact: six bits
        error = error.sub_(blocks * gs) if self.scaled_error else error.mul_(flush(1 / gs)).sub_(blocks)
        return codes.to(torch.uint8), scale.to(torch.uint8), self._sum(self.penalty(error))

    def _sum(self, error: Tensor) -> Tensor:
        """Float32 sums in the kernel's order: element after element within a thread, then the threads."""
        threads = reduce(torch.add, error.unflatten(3, (self.lanes, -1)).unbind(4))
        total: Tensor = reduce(torch.add, threads.split(1, 3))
        return total


_FIVES = (5.0,) * 15 + (6.0,)
_MIXTURE = (4, 4, 4, 4, 3.9, -4, 2, 2, 1, 1, 0, 0, -3, 3, 1, 0.5)
_PICKS_4 = Golden(_FIVES, (5,) * 15 + (6,), (0x78,), 168.0)
_PICKS_6 = Golden(_MIXTURE, (7, 7, 7, 7, 7, 15, 5, 5, 3, 3, 0, 0, 14, 6, 3, 2), (0x6E,), 168.0)
_PICKS_4_BY_MSE = Golden(_MIXTURE, (6, 6, 6, 6, 6, 14, 4, 4, 2, 2, 0, 0, 13, 5, 2, 1), (0x72,), 168.0)
_MIXED = {"MAE": _PICKS_6, "MSE": _PICKS_4_BY_MSE}
_ZERO = Golden((-0.0,) * 16, (0,) * 16, (0,), 168.0)


def _format(name: str, e4m3_max: float, rule: FourOverSix, source: str) -> Format:
    scaling = Scaling(grid.E4M3, (1, BLOCK), global_scale=True, global_range=f32(e4m3_max * E2M1.max))
    return Format(name, E2M1, scaling, "even", True, source, rule, (_PICKS_4, _PICKS_6, _ZERO))


_SOURCE = "FlashInfer 0.7.2 NVFP44Over6Config(e4m3_max={}, err_mode={}), quantization_utils.cuh, {}"


def _family(name: str, e4m3_max: int) -> Format:
    fmt = _format(name, e4m3_max, FourOverSix(absolute), _SOURCE.format(e4m3_max, "MAE", "exact arithmetic"))
    rules = {
        "mse": (FourOverSix(squared), "MSE", "exact arithmetic"),
        "fast": (FourOverSix(absolute, exact=False), "MAE", "reciprocals as correctly rounded"),
        "fast_mse": (FourOverSix(squared, exact=False), "MSE", "reciprocals as correctly rounded"),
        "one_thread": (FourOverSix(absolute, lanes=1), "MAE", "exact arithmetic, 16 elements a thread"),
        "scaled_error": (FourOverSix(absolute, scaled_error=True), "MAE", "err_use_fast_math"),
    }
    variants = (
        variant(fmt, rule, encoder, _SOURCE.format(e4m3_max, mode, how), (_PICKS_4, _MIXED[mode], _ZERO))
        for rule, (encoder, mode, how) in rules.items()
    )
    return with_variants(fmt, *variants)


FORMATS = (_family("nvfp4_4over6", 448), _family("nvfp4_4over6_256", 256))
