"""MXFP4: E2M1 codes, one E8M0 scale per 32 elements of a row. The default is the rule of NVIDIA's CUDA quantisers."""

from __future__ import annotations

import torch

from reference import grid
from reference.format import Format, Golden, Scaling
from reference.formats import _mx
from reference.formats._rules import Rule, ties_away, ties_lower, ties_lower_unsigned_zero, variant, with_variants
from reference.grid import Element

LOST_STICKY = 0.25 + 3 * 2.0**-25  # three float32 ulp above the tie between 0 and 0.5


def _lost_sticky(element: Element, x: torch.Tensor) -> torch.Tensor:
    """Nearest even, but the three float32 values just above 0.25 round to 0: bits lost while a subnormal is formed."""
    near = (x.abs() > 0.25) & (x.abs() <= LOST_STICKY)
    return element.encode(torch.where(near, torch.full_like(x, 0.25).copysign(x), x))


def _row(*first: float) -> tuple[float, ...]:
    return first + (0.0,) * (32 - len(first))


def _codes(*first: int) -> tuple[int, ...]:
    return first + (0,) * (32 - len(first))


_RAMP = tuple(float(torch.tensor(0.1 * i, dtype=torch.bfloat16)) for i in range(-16, 16))
_RAMP_CODES = (13, 13, 13, 13, 12, 12, 12, 12, 11, 11, 10, 10, 10, 9, 9, 8, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5)
_TIES = _row(4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -0.1, -0.0)

_MXFP4 = Format(
    name="mxfp4",
    element=grid.E2M1,
    scaling=Scaling(grid.E8M0, (1, 32)),
    ties="even",
    saturates=True,
    source="FlashInfer 0.7.2 fp4_quantize(sf_vec_size=32, ue8m0): quantization_utils.cuh",
    encoder=Rule(_mx.ceil_of_product(6.0), _mx.times_inverse(zero=1.0, ftz=True), ftz=True),
    goldens=(
        Golden(_RAMP, _RAMP_CODES, (126,)),
        Golden(_row(6.5), _codes(5), (128,)),
        Golden((-0.0,) * 32, (8,) * 32, (0,)),
        Golden(_row(torch.inf, 1.0, -torch.inf), _codes(7, 0, 7), (254,)),
        Golden(_row(torch.nan, 6.0), _codes(7, 7), (127,)),
    ),
)

FORMATS = (
    with_variants(
        _MXFP4,
        variant(
            _MXFP4,
            "cute_dsl",
            Rule(_mx.ceil_of_product(6.0), _mx.times_inverse(zero=0.0, ftz=True), ftz=True),
            "FlashInfer 0.7.2 CuTe-DSL mxfp4 quantiser: as the CUDA kernel, but a scale byte of 0 zeroes its block",
            (Golden(_row(6.5), _codes(5), (128,)), Golden(_row(2.0**-125), _codes(0), (0,))),
        ),
        variant(
            _MXFP4,
            "ocp",
            Rule(_mx.floor_of_amax(2), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "OCP MX v1.0 section 6.3: shared exponent floor(log2 amax) - 2, elements saturate; torchao FLOOR",
            (Golden(_row(6.5, 5.0), _codes(7, 6), (127,)), Golden(_TIES, _codes(6, 0, 2, 2, 4, 4, 6, 8, 8), (127,))),
        ),
        variant(
            _MXFP4,
            "even",
            Rule(_mx.floor_of_amax(2, mantissa_bits=1), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "torchao EVEN: amax rounded to the element's mantissa, then the OCP rule; compressed-tensors, AMD Quark",
            (Golden(_row(6.5, 5.0), _codes(7, 6), (127,)), Golden(_row(7.0, 5.0), _codes(6, 4), (128,))),
        ),
        variant(
            _MXFP4,
            "torchao_ceil",
            Rule(_mx.ceil_of_amax(2), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "torchao CEIL: 2**ceil(log2 amax) / 4, one binade above OCP unless amax is a power of two",
            (Golden(_row(6.0, 3.0), _codes(5, 3), (128,)), Golden(_row(4.0), _codes(6), (127,))),
        ),
        variant(
            _MXFP4,
            "rceil",
            Rule(_mx.ceil_of_quotient(6.0), _mx.times_inverse(zero=1.0), keep_nan=True),
            "torchao RCEIL, cuBLAS block scaling: ceil of amax / 6 by a true division",
            (Golden(_row(6.5), _codes(5), (128,)), Golden(_row(6.0), _codes(7), (127,))),
        ),
        variant(
            _MXFP4,
            "linear",
            Rule(_mx.ceil_of_quotient(6.0), _mx.times_inverse(), ties_lower),
            "FlashInfer 0.7.2 prepare.py _quantize_mxfp4_linear (SM90 W4A16, Humming): ties to the lower magnitude",
            (Golden(_TIES, _codes(6, 0, 1, 2, 3, 4, 5, 8, 0), (127,)),),
            ties="lower",
        ),
        variant(
            _MXFP4,
            "triton_up",
            Rule(_mx.up_by_bits(6.0), _mx.times_inverse(zero=0.0), keep_nan=True),
            "triton_kernels downcast_to_mxfp ROUND_UP: (bits(amax / 6) + 0x7fffff) & 0x7f800000",
            (Golden(_row(6.5), _codes(5), (128,)), Golden(_TIES, _codes(6, 0, 2, 2, 4, 4, 6, 8, 8), (127,))),
        ),
        variant(
            _MXFP4,
            "triton_down",
            Rule(_mx.down_by_bits(4.0), _mx.times_inverse(zero=0.0), keep_nan=True),
            "triton_kernels downcast_to_mxfp ROUND_DOWN since ROUND_NEAREST came: bits(amax / 4) & 0x7f800000, as OCP",
            (Golden(_row(6.5, 5.0), _codes(7, 6), (127,)), Golden(_row(4.0), _codes(6), (127,))),
        ),
        variant(
            _MXFP4,
            "triton_down_v1",
            Rule(_mx.down_by_bits(6.0), _mx.times_inverse(zero=0.0), keep_nan=True),
            "triton_kernels downcast_to_mxfp ROUND_DOWN of earlier releases: bits(amax / 6) & 0x7f800000, clips from 4 up",
            (Golden(_row(6.5, 3.0), _codes(7, 5), (127,)), Golden(_row(5.0, 2.0), _codes(7, 6), (126,))),
        ),
        variant(
            _MXFP4,
            "triton_away",
            Rule(_mx.up_by_bits(6.0), _mx.times_inverse(zero=0.0), ties_away, keep_nan=True),
            "triton_kernels of 2025: halves round away from zero",
            (Golden(_TIES, _codes(6, 1, 2, 3, 4, 5, 6, 8, 8), (127,)),),
            ties="away",
        ),
        variant(
            _MXFP4,
            "triton_lost_sticky",
            Rule(_mx.up_by_bits(6.0), _mx.times_inverse(zero=0.0), _lost_sticky, keep_nan=True),
            "triton_kernels between the two: nearest even without the bits shifted out of subnormals",
            (
                Golden(_row(4.0, 0.25 + 2.0**-25, LOST_STICKY, LOST_STICKY + 2.0**-25), _codes(6, 0, 0, 1), (127,)),
                Golden(_row(6.5), _codes(5), (128,)),
            ),
        ),
        variant(
            _MXFP4,
            "deepgemm",
            Rule(_mx.deepgemm(6.0), _mx.times_inverse(), ties_lower_unsigned_zero),
            "DeepGEMM per_token_cast_to_fp4(use_ue8m0=True, gran_k=32): amax at least 1e-4, exponent byte 1..254, ties lower",
            (Golden(_TIES, _codes(6, 0, 1, 2, 3, 4, 5, 0, 0), (127,)), Golden(_row(0.0), _codes(0), (112,))),
            ties="lower",
        ),
    ),
)
