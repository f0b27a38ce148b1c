"""NVFP4: E2M1 codes, one E4M3 scale per 16 elements of a row, one float32 global scale for the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import Format, Golden, Quantized, Scaling, block_amax, expand_blocks

ENCODE_RANGE = grid.E4M3.max * grid.E2M1.max  # 2688: the global scale that uses the whole range is 2688 / amax


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """The exact-reciprocal recipe, float32 throughout: sf = e4m3(amax * (gs * f32(1/6))), o = min(1 / (sf * (1 / gs)),
    FLT_MAX), code = e2m1_rne(x * o); a zero block gets scale 0. FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1 does the same."""
    assert fmt.scaling is not None
    assert global_scale is not None
    gs = global_scale.float()
    sixth = torch.tensor(1 / grid.E2M1.max, dtype=torch.float32, device=x.device)
    amax = block_amax(x, fmt.scaling.group)
    scales = fmt.scaling.element.encode(amax * (gs * sixth))
    decoded = fmt.scaling.element.decode(scales, torch.float32)
    inverse = (1 / (decoded * (1 / gs))).clamp(max=torch.finfo(torch.float32).max)
    inverse = torch.where(amax == 0, 0.0, inverse)
    scaled = x.float() * expand_blocks(inverse, (x.shape[0], x.shape[1]), fmt.scaling.group)
    return Quantized(fmt, fmt.element.encode(scaled).to(torch.uint8), scales.to(torch.uint8), gs)


FORMATS = (
    Format(
        name="nvfp4",
        element=grid.E2M1,
        scaling=Scaling(grid.E4M3, (1, 16), global_scale=True),
        ties="even",
        saturates=True,
        source="FlashInfer 0.7.2 fp4_quantize exact path (quantization_utils.cuh); equals TransformerEngine",
        encoder=encode,
        goldens=(
            Golden(
                (0, 0.25, -0.5, 0.75, 1, -1.25, 1.5, 2, -2.5, 3, 3.5, -4, 5, 6, -0.1, 7),
                (0, 0, 9, 1, 2, 10, 3, 3, 12, 5, 5, 13, 6, 7, 8, 7),
                (0x7E,),
                384.0,
            ),
            Golden((0.5,) * 15 + (1.296875,), (4,) * 15 + (7,), (0x4C,), 26.88),
        ),
    ),
)
