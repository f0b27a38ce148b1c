"""E4M3 codes with one float32 scale for the whole tensor: amax maps to 448."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Quantized, Scaling, block_amax


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """s = amax / 448 (1 when amax is 0), code = e4m3(x / s). The stored scale is the decode scale."""
    assert fmt.scaling is not None
    amax = block_amax(x, fmt.scaling.group)
    scale = torch.where(amax == 0, 1.0, amax / fmt.element.max)
    return Quantized(fmt, fmt.element.encode(x.float() / scale).to(torch.uint8), scale)


FORMATS = (
    Format(
        name="fp8_tensor",
        element=grid.E4M3,
        scaling=Scaling(grid.FP32, (WHOLE, WHOLE)),
        ties="even",
        saturates=True,
        source="FlashInfer trtllm per-tensor prepare: multiplier 448/amax, amax 0 -> 1",
        encoder=encode,
        goldens=(Golden((448.0, -17.0, 0.001, 0.0), (0x7E, 0xD8, 0x01, 0x00), (1.0,)),),
    ),
)
