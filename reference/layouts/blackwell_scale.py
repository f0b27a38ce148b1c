"""triton_kernels Blackwell scales, on logical [N, K / 32]: the 128x4 swizzle with columns padded to 8, not 4.

Memory is (1, rows / 128, columns / 4, 2, 256). The activation variant is the same with tokens for rows; its ragged form
starts every expert's slice at a new multiple of 128 rows, in a buffer for the worst split of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.layout import Layout, Shape, crop, pad_to, round_up, rounded
from reference.layouts import swizzle_128x4

SOURCE = "triton_kernels tensor_details/layout_details/blackwell_scale.py"
PADDING = rounded(128, 8)


def swizzle(scales: Tensor) -> Tensor:
    """[rows, columns] -> (1, padded rows / 128, padded columns / 4, 2, 256)."""
    high, wide = PADDING(tuple(scales.shape))
    return swizzle_128x4.swizzle(pad_to(scales, (high, wide))).view(1, high // 128, wide // 4, 2, 256)


def unswizzle(stored: Tensor, shape: Shape) -> Tensor:
    """Inverse of `swizzle`."""
    high, wide = PADDING(shape)
    return crop(swizzle_128x4.unswizzle(stored.reshape(-1), high, wide), shape)


def ragged(sizes: tuple[int, ...]) -> Layout:
    """Activation scales [tokens, columns], expert e owning the next sizes[e] rows; rows after the last are not stored."""

    def padding(shape: Shape) -> Shape:
        return 128 * most_blocks(len(sizes), shape[0]), round_up(shape[1], 8)

    def pack(scales: Tensor) -> Tensor:
        slices = scales[: sum(sizes)].split(sizes)
        padded = torch.cat([pad_to(s, (round_up(s.shape[0], 128), s.shape[1])) for s in slices])
        return swizzle(pad_to(padded, padding(tuple(scales.shape))))

    def unpack(stored: Tensor, shape: Shape) -> Tensor:
        tall = unswizzle(stored, padding(shape))[:, : shape[1]]
        high = [round_up(size, 128) for size in sizes]
        slices = tall[: sum(high)].split(high)
        return pad_to(torch.cat([s[:size] for s, size in zip(slices, sizes, strict=True)]), shape)

    return Layout("blackwell_activation_scale_ragged", pack, unpack, padding, SOURCE)


def most_blocks(slices: int, rows: int) -> int:
    """The most 128-row blocks that `rows` rows in `slices` slices can need: all but one slice hold a single row."""
    return min(rows, slices - 1 + -(-(rows - slices + 1) // 128))


LAYOUTS = (Layout("blackwell_scale", swizzle, unswizzle, PADDING, SOURCE),)
