"""TRT-LLM's shuffleMatrixSfA on linear scales: the row shuffle of the weights, then the 128x4 swizzle.

rows % 128 == 0; columns are padded to 4 with zeros. The number of elements per scale does not enter.
Source: FlashInfer shuffle_matrix_sf_a.
"""

from __future__ import annotations

from reference.layout import Layout
from reference.layouts import swizzle_128x4
from reference.layouts.trtllm_row_shuffle import row_shuffle


def scale_shuffle(block: int) -> Layout:
    """[rows, columns] scales -> flat; `block` is the row shuffle's (16 or 32)."""
    rows = row_shuffle(block)
    return Layout(
        name=f"trtllm_scale_shuffle_{block}",
        packer=lambda scales: swizzle_128x4.swizzle(rows.pack(scales)),
        unpacker=lambda flat, shape: rows.unpack(swizzle_128x4.unswizzle(flat, shape[0], shape[1]), shape),
        padding=lambda shape: swizzle_128x4.padded_shape(shape[0], shape[1]),
        source="FlashInfer shuffle_matrix_sf_a",
        multiple=(128, 1),
    )


LAYOUTS = (scale_shuffle(16), scale_shuffle(32))
