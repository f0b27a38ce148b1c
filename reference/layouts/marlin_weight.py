"""Marlin's 4-bit weights (nvfp4, mxfp4, uint4b8 alike): [N, K / 2] bytes, low nibble first -> [K / 16, 8 N] bytes.

16-bit activations: tiles of 16 K x 64 N; in a tile, the 32-bit word of thread t = 4 * (n % 8) + k % 8 // 2 and warp
n % 64 // 16 is word 4 t + warp; its nibble is k % 16 // 8 + 2 * (n % 16 // 8) + 4 * (k % 2).
8-bit activations: tiles of 32 K x 32 N; t = 4 * (n % 8) + k % 16 // 4, warp n % 32 // 8, nibble 2 * (k % 4) + k % 32 // 16.
Source: vLLM csrc/quantization/marlin/gptq_marlin_repack.cu; padding: marlin_utils.marlin_padded_nk of 0.33.0.
"""

from __future__ import annotations

import math

from torch import Tensor

from reference.layout import REST, Layout, Shape, Tiling, crop, pad_to, round_up
from reference.layouts.linear import pack_nibbles, unpack_nibbles

SOURCE = "vLLM gptq_marlin_repack"
#                  N: tile, warp, half, column          K: tile, half, quad, pair
A16 = Tiling(split=((REST, 4, 2, 8), (REST, 2, 4, 2)), order=(4, 0, 3, 6, 1, 7, 2, 5), merge=(1, 7))
#                  N: tile, warp, column                K: tile, half, quad, element
A8 = Tiling(split=((REST, 4, 8), (REST, 2, 4, 4)), order=(3, 0, 2, 5, 1, 6, 4), merge=(1, 6))


def padded_nk(n: int, k: int, group: int) -> tuple[int, int]:
    """N and K rounded up to (64, 128) or (128, 64), whichever is smaller; K stays a multiple of `group`."""
    candidates = (
        (round_up(n, 64), round_up(k, math.lcm(128, group))),
        (round_up(n, 128), round_up(k, math.lcm(64, group))),
    )
    return min(candidates, key=math.prod)


def marlin_weight(name: str, tiling: Tiling, group: int) -> Layout:
    """The repack of one tile shape; the int32 tensor of the library is these bytes, little-endian."""

    def padding(shape: Shape) -> Shape:
        n, k = padded_nk(shape[0], 2 * shape[1], group)
        return n, k // 2

    def pack(weight: Tensor) -> Tensor:
        codes = unpack_nibbles(pad_to(weight, padding(tuple(weight.shape))))
        return pack_nibbles(tiling.store(codes)).reshape(codes.shape[1] // 16, 8 * codes.shape[0])

    def unpack(stored: Tensor, shape: Shape) -> Tensor:
        n, k_bytes = padding(shape)
        return crop(pack_nibbles(tiling.load(unpack_nibbles(stored), (n, 2 * k_bytes))), shape)

    return Layout(name, pack, unpack, padding, SOURCE, bitwise=True)


LAYOUTS = (
    marlin_weight("marlin_weight_a16", A16, 32),  # groups of 16, 32 and 64 pad alike
    marlin_weight("marlin_weight_a16_g128", A16, 128),
    marlin_weight("marlin_weight_a8", A8, 32),
)
