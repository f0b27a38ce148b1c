"""Packed top-k: one int32 per slot, the expert in the upper half and the bits of a 16-bit weight in the lower.

FlashInfer RoutingInputMode.PackedPrecomputed, `(id << 16) | (bits(weight) & 0xffff)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFF


def encode(ids: Tensor, weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """ids [tokens, top_k] in [-32768, 32768), weights of the same shape rounded to bf16 or fp16 -> int32."""
    if ids.numel() and not -(1 << 15) <= int(ids.min()) <= int(ids.max()) < 1 << 15:
        raise ValueError(f"ids {int(ids.min())}..{int(ids.max())} do not fit the upper 16 bits of a packed slot")
    return (ids.long() << 16 | _bits(weights, dtype) & LOW).int()


def decode(packed: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """(ids int64, weights of `dtype`) of packed int32: the id keeps its sign, so -1 comes back as -1."""
    signed = packed.long() << 48 >> 48  # the lower half's sign spread over the rest
    return packed.long() >> 16, signed.to(torch.int16).view(dtype)


def encode_sign_extended(ids: Tensor, weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The mistake to recognise: without the mask, a negative weight's sign fills the upper half and every id reads -1."""
    return (ids.long() << 16 | _bits(weights, dtype)).int()


def _bits(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.to(dtype).contiguous().view(torch.int16).long()
