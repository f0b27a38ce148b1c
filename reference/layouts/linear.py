"""Row-major storage, and two 4-bit codes in a byte: element 0 in the low nibble."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.layout import REST, Tiling, tiled


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., columns] 4-bit codes -> [..., columns / 2] uint8, even column in the low nibble; columns must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"4-bit codes pack in pairs: got {codes.shape[-1]} columns, want an even number")
    low, high = codes[..., 0::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


LAYOUTS = (tiled("linear", Tiling(((REST,), (REST,)), (0, 1), (1, 1)), "row-major; FlashInfer SfLayout.layout_linear"),)
