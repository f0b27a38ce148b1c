"""The integer keys by which trtllm-gen sorts: order-preserving bits of the score above, the complement of the index below."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
MAX_INDEX = 65535


def sort_keys(scores: Tensor) -> Tensor:
    """[tokens, experts] int64 keys of bf16, fp16 or fp32 scores: the larger key wins, so an equal score loses with the
    larger index. Unlike a comparison of floats, -0 is below +0, a negative NaN below -inf, a positive one above +inf."""
    integer = _BITS[scores.dtype]
    bits, low = scores.contiguous().view(integer).long(), torch.iinfo(integer).min
    ordered = torch.where(bits >= 0, bits, low - bits - 1)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return (ordered << 16) | (MAX_INDEX - index)


def select_by_key(scores: Tensor, top_k: int) -> Tensor:
    """ids [tokens, top_k] int64 as trtllm-gen orders them."""
    return MAX_INDEX - (sort_keys(scores).topk(top_k, dim=-1).values & MAX_INDEX)
