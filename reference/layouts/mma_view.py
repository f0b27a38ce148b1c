"""The 6-D view that masked grouped GEMMs take: the bytes of a per-expert 128x4 swizzle, seen as (32, 4, rm, 4, rk, groups).

Element (r, c) of group g is at [r % 32, (r % 128) // 32, r // 128, c % 4, c // 4, g]. The result is a strided view;
memory holds (groups, rm, rk, 32, 4, 4). Source: FlashInfer convert_sf_to_mma_layout.
"""

from __future__ import annotations

from torch import Tensor

from reference.layout import Layout, Shape, per_expert
from reference.layouts import swizzle_128x4

PER_EXPERT = per_expert(swizzle_128x4.LAYOUTS[0])
VIEW, MEMORY = (3, 4, 1, 5, 2, 0), (5, 2, 4, 0, 1, 3)


def view(scales: Tensor) -> Tensor:
    """[groups, rows, columns] -> (32, 4, ceil(rows / 128), 4, ceil(columns / 4), groups), strided."""
    groups, high, wide = PER_EXPERT.padded_shape(tuple(scales.shape))
    return PER_EXPERT.pack(scales).view(groups, high // 128, wide // 4, 32, 4, 4).permute(VIEW)


def unview(stored: Tensor, shape: Shape) -> Tensor:
    """Inverse of `view`."""
    return PER_EXPERT.unpack(stored.permute(MEMORY).flatten(1), shape)


LAYOUTS = (
    Layout("mma_6d_view", view, unview, PER_EXPERT.padding, "FlashInfer cute_dsl.utils.convert_sf_to_mma_layout", (1, 1, 1)),
)
