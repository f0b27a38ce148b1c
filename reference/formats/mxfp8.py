"""MXFP8: E4M3 (or E5M2) codes, one E8M0 scale per 32 elements of a row. The default is the rule of the CUDA quantisers."""

from __future__ import annotations

import torch

from reference import grid
from reference.format import Format, Golden, Scaling
from reference.formats import _mx
from reference.formats._rules import FLT_MIN, Rule, variant, with_variants
from reference.grid import Element


def _nan_to_max(element: Element, x: torch.Tensor) -> torch.Tensor:
    """Codes after max(min(x, 448), -448): fminf and fmaxf return the number, so NaN becomes +448."""
    return element.encode(x.nan_to_num(nan=element.max, posinf=torch.inf, neginf=-torch.inf))


def _row(*first: float) -> tuple[float, ...]:
    return first + (0.0,) * (32 - len(first))


def _codes(*first: int) -> tuple[int, ...]:
    return first + (0,) * (32 - len(first))


_LINE = tuple(torch.linspace(-3, 3, 32).tolist())
_LINE_CODES = (
    *(0xFC, 0xFB, 0xFA, 0xFA, 0xF9, 0xF8, 0xF7, 0xF5, 0xF4, 0xF2, 0xF1, 0xEE, 0xEB, 0xE7, 0xE1, 0xD4),
    *(0x54, 0x61, 0x67, 0x6B, 0x6E, 0x71, 0x72, 0x74, 0x75, 0x77, 0x78, 0x79, 0x7A, 0x7A, 0x7B, 0x7C),
)

_MXFP8 = Format(
    name="mxfp8",
    element=grid.E4M3,
    scaling=Scaling(grid.E8M0, (1, 32)),
    ties="even",
    saturates=True,
    source="FlashInfer 0.7.2 mxfp8_quantize: cvt_warp_fp16_to_mxfp8 in quantization_utils.cuh",
    encoder=Rule(_mx.ceil_of_product(448.0), _mx.times_inverse(zero=0.0, ftz=True), _nan_to_max, ftz=True),
    goldens=(
        Golden(_LINE, _LINE_CODES, (120,)),
        Golden(_row(449.0, 1.0), _codes(0x76, 0x30), (128,)),
        Golden(_row(2.0**-126, -(2.0**-126)), _codes(0, 0x80), (0,)),
        Golden(_row(torch.inf, 1.0, -1.0), _codes(0x7E, 0, 0x80), (254,)),
        Golden(_row(torch.nan, 448.0), _codes(0x7E, 0x7E), (127,)),
    ),
)
_MXFP8_E5M2 = Format(
    name="mxfp8_e5m2",
    element=grid.E5M2,
    scaling=Scaling(grid.E8M0, (1, 32)),
    ties="even",
    saturates=True,
    source="triton_kernels downcast_to_mxfp ROUND_UP: (bits(amax / 57344) + 0x7fffff) & 0x7f800000",
    encoder=Rule(_mx.up_by_bits(57344.0), _mx.times_inverse(zero=0.0), keep_nan=True),
    goldens=(Golden(_row(57344.0, -1.0, 3.5), _codes(0x7B, 0xBC, 0x43), (127,)), Golden(_row(57345.0), _codes(0x77), (128,))),
)

FORMATS = (
    with_variants(
        _MXFP8,
        variant(
            _MXFP8,
            "ocp",
            Rule(_mx.floor_of_amax(8), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "OCP MX v1.0 section 6.3: shared exponent floor(log2 amax) - 8, elements saturate; torchao FLOOR",
            (Golden(_row(500.0, 1.0), _codes(0x7E, 0x38), (127,)),),
        ),
        variant(
            _MXFP8,
            "even",
            Rule(_mx.floor_of_amax(8, mantissa_bits=3), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "torchao EVEN: amax rounded to three mantissa bits, then the OCP rule",
            (Golden(_row(495.0), _codes(0x7E), (127,)), Golden(_row(496.0), _codes(0x78), (128,))),
        ),
        variant(
            _MXFP8,
            "compressed_tensors",
            Rule(_mx.floor_of_amax(8, mantissa_bits=1), _mx.times_inverse(), keep_nan=True),
            "compressed-tensors generate_mx_scales: amax rounded to *one* mantissa bit also for E4M3, then the OCP rule",
            (Golden(_row(447.0), _codes(0x7E), (127,)), Golden(_row(448.0), _codes(0x76), (128,))),
        ),
        variant(
            _MXFP8,
            "torchao_ceil",
            Rule(_mx.ceil_of_amax(8), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "torchao CEIL: 2**ceil(log2 amax) / 256",
            (Golden(_row(300.0), _codes(0x71), (128,)), Golden(_row(256.0), _codes(0x78), (127,))),
        ),
        variant(
            _MXFP8,
            "rceil",
            Rule(_mx.ceil_of_quotient(448.0), _mx.times_inverse(zero=1.0), keep_nan=True),
            "torchao RCEIL, cuBLAS block scaling: ceil of amax / 448 by a true division",
            (Golden(_row(449.0, 1.0), _codes(0x76, 0x30), (128,)),),
        ),
        variant(
            _MXFP8,
            "cutile",
            Rule(_mx.ceil_of_quotient(448.0), _mx.times_inverse()),
            "FlashInfer 0.7.2 cuTile grouped mxfp8: ceil of amax / 448 by exponent bits, blocks of byte 0 scaled as any other",
            (Golden(_row(449.0, 1.0), _codes(0x76, 0x30), (128,)), Golden(_row(2.0**-126), _codes(0x40), (0,))),
        ),
        variant(
            _MXFP8,
            "vllm",
            Rule(_mx.ceil_of_quotient(448.0, least=FLT_MIN), _mx.times_inverse(), keep_nan=True),
            "vLLM 0.33 torch mxfp8 quantiser: ceil(log2(max(amax, FLT_MIN) / 448)), clamped to bytes 0..254, x / scale",
            (Golden(_row(449.0, 1.0), _codes(0x76, 0x30), (128,)), Golden(_row(0.0), _codes(0), (0,))),
        ),
        variant(
            _MXFP8,
            "vllm_v1",
            Rule(_mx.floor_of_amax(0), _mx.times_inverse(), keep_nan=True),
            "vLLM torch mxfp8 quantiser of early releases: floor(log2 amax), the top eight binades of E4M3 unused",
            (Golden(_row(3.0, 1.0), _codes(0x3C, 0x30), (128,)),),
        ),
        variant(
            _MXFP8,
            "triton_up",
            Rule(_mx.up_by_bits(448.0), _mx.times_inverse(zero=0.0), keep_nan=True),
            "triton_kernels downcast_to_mxfp ROUND_UP: (bits(amax / 448) + 0x7fffff) & 0x7f800000",
            (Golden(_row(449.0, 1.0), _codes(0x76, 0x30), (128,)),),
        ),
        variant(
            _MXFP8,
            "triton_down",
            Rule(_mx.down_by_bits(256.0), _mx.times_inverse(zero=0.0), keep_nan=True),
            "triton_kernels downcast_to_mxfp ROUND_DOWN: bits(amax / 256) & 0x7f800000, as OCP",
            (Golden(_row(500.0, 1.0), _codes(0x7E, 0x38), (127,)),),
        ),
    ),
    with_variants(
        _MXFP8_E5M2,
        variant(
            _MXFP8_E5M2,
            "ocp",
            Rule(_mx.floor_of_amax(15), _mx.times_inverse(zero=2.0**126), keep_nan=True),
            "OCP MX v1.0 section 6.3: shared exponent floor(log2 amax) - 15; torchao FLOOR",
            (Golden(_row(65000.0, 1.0), _codes(0x7B, 0x3C), (127,)),),
        ),
    ),
)
