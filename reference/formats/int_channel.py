"""Symmetric int8 and int4 weights, one float32 scale per output channel (row)."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import WHOLE, Format, Golden, Quantized, Scaling, block_amax


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """s = amax(row) / limit (1 for a zero row), q = rint(x / s) clipped to +-limit (7 or 127)."""
    assert fmt.scaling is not None
    amax = block_amax(x, fmt.scaling.group)
    scale = torch.where(amax == 0, 1.0, amax / fmt.element.max)
    return Quantized(fmt, fmt.element.encode(x.float() / scale).to(torch.uint8), scale)


def _channel(element: grid.IntegerType, goldens: tuple[Golden, ...]) -> Format:
    scaling = Scaling(grid.FP32, (1, WHOLE))
    source = "symmetric per-channel weight quantisation, as ONNX Runtime's QMoE and vLLM's int8 experts consume it"
    return Format(f"{element.name}_channel", element, scaling, "even", True, source, encode, goldens)


FORMATS = (
    _channel(grid.INT8, (Golden((127.0, -63.5, 38.1), (127, 0x100 - 64, 38), (1.0,)),)),
    _channel(grid.INT4, (Golden((7.0, -3.5, 1.0, -7.0), (7, 0x10 - 4, 1, 0x10 - 7), (1.0,)),)),
)
