"""MXFP4: E2M1 codes, one E8M0 scale per 32 elements of a row, the scale rounded *up* as NVIDIA's quantisers do."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import grid
from reference.format import Format, Golden, Quantized, Scaling, block_amax, expand_blocks

SIXTH = 1 / grid.E2M1.max  # FlashInfer multiplies amax by rcp(6); for bf16 amax the byte equals ceil(log2(amax / 6))


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """byte = ceil_e8m0(amax * (1/6)) in float32, code = e2m1_rne(x * 2**(127 - byte)); an all-zero block gets byte 0."""
    assert fmt.scaling is not None
    amax = block_amax(x, fmt.scaling.group)
    scales = fmt.scaling.element.encode(amax * torch.tensor(SIXTH, dtype=torch.float32, device=x.device))
    inverse = torch.ldexp(torch.ones_like(amax, dtype=torch.float64), 127 - scales)
    inverse = torch.where(scales == 0, 1.0, inverse)  # the CUDA kernel leaves byte-0 blocks unscaled
    scaled = x.double() * expand_blocks(inverse, (x.shape[0], x.shape[1]), fmt.scaling.group)
    return Quantized(fmt, fmt.element.encode(scaled).to(torch.uint8), scales.to(torch.uint8))


_RAMP = tuple(float(torch.tensor(0.1 * i, dtype=torch.bfloat16)) for i in range(-16, 16))
_RAMP_CODES = (13, 13, 13, 13, 12, 12, 12, 12, 11, 11, 10, 10, 10, 9, 9, 8, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5)

FORMATS = (
    Format(
        name="mxfp4",
        element=grid.E2M1,
        scaling=Scaling(grid.E8M0, (1, 32)),
        ties="even",
        saturates=True,
        source="FlashInfer 0.7.2 fp4_quantize(sf_vec_size=32, ue8m0): quantization_utils.cuh",
        encoder=encode,
        goldens=(
            Golden(_RAMP, _RAMP_CODES, (126,)),
            Golden((6.5,) + (0.0,) * 31, (5,) + (0,) * 31, (128,)),
            Golden((-0.0,) * 32, (8,) * 32, (0,)),
        ),
    ),
)
