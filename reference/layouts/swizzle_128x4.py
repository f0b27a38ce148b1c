"""The 128x4 scale swizzle: 512-byte tiles of 128 rows x 4 columns, rows interleaved 32 apart.

offset(r, c) = ((r // 128) * T + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4, T = ceil(columns / 4).
Source: cuBLAS "1D block scaling factors layout" (the 32x4x4 atom); FlashInfer SfLayout.layout_128x4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.layout import Layout

ROWS, COLUMNS = 128, 4  # one tile


def padded_shape(rows: int, columns: int) -> tuple[int, int]:
    """[rows, columns] rounded up to whole tiles."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


def swizzle(scales: Tensor) -> Tensor:
    """[rows, columns] -> flat [padded rows * padded columns]; padding bytes are 0, as FlashInfer writes them."""
    rows, columns = scales.shape
    padded_rows, padded_columns = padded_shape(rows, columns)
    full = torch.nn.functional.pad(scales, (0, padded_columns - columns, 0, padded_rows - rows))
    tiles = full.view(padded_rows // ROWS, 4, 32, padded_columns // COLUMNS, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(flat: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `swizzle`; padding is dropped."""
    padded_rows, padded_columns = padded_shape(rows, columns)
    if flat.numel() != padded_rows * padded_columns:
        raise ValueError(f"[{rows}, {columns}] scales swizzle to {padded_rows * padded_columns} bytes, got {flat.numel()}")
    tiles = flat.view(padded_rows // ROWS, padded_columns // COLUMNS, 32, 4, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)[:rows, :columns]


LAYOUTS = (
    Layout(
        name="swizzle_128x4",
        packer=swizzle,
        unpacker=lambda flat, shape: unswizzle(flat, shape[0], shape[1]),
        padding=lambda shape: padded_shape(shape[0], shape[1]),
        source='cuBLAS "1D block scaling factors layout"; FlashInfer SfLayout.layout_128x4, block_scale_interleave',
    ),
)
