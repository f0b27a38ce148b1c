"""Tokens to expert order and back: stable sort by expert, offsets, aligned blocks, the numbering of slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Slots (token * top_k + k) grouped by expert, stable. order [slots]; offsets [experts + 1], exclusive prefix sums."""

    order: Tensor
    offsets: Tensor

    def slots(self, expert: int) -> Tensor:
        """The slots of one expert, ascending."""
        return self.order[int(self.offsets[expert]) : int(self.offsets[expert + 1])]


def dispatch(ids: Tensor, experts: int) -> Dispatch:
    """Group the slots of ids [tokens, top_k]; ids outside [0, experts) are dropped (the padding convention is -1)."""
    flat = ids.flatten()
    valid = (flat >= 0) & (flat < experts)
    key = torch.where(valid, flat, experts)
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Dispatch(key.argsort(stable=True)[: int(offsets[-1])], offsets)


def align_blocks(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """(sorted slots, expert of each block): every expert's slots padded to whole blocks with the sentinel ids.numel().

    The contract of moe_align_block_size in vLLM and SGLang, without its unspecified tail.
    """
    groups = dispatch(ids, experts)
    slots, owners = [ids.new_empty(0, dtype=torch.int64)], []
    for expert in range(experts):
        mine = groups.slots(expert)
        padding = mine.new_full((-len(mine) % block,), ids.numel())
        slots += [mine, padding]
        owners += [expert] * ((len(mine) + len(padding)) // block)
    return torch.cat(slots), torch.tensor(owners, dtype=torch.int64, device=ids.device)


def to_k_major(slots: Tensor, tokens: int, top_k: int) -> Tensor:
    """token * top_k + k (trtllm, triton_kernels, vLLM) -> k * tokens + token (the expanded index of CUTLASS)."""
    return slots % top_k * tokens + slots // top_k


def to_token_major(slots: Tensor, tokens: int, top_k: int) -> Tensor:
    """Inverse of `to_k_major`."""
    return slots % tokens * top_k + slots // tokens


def permuted_maps(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """(expanded -> permuted row [slots], permuted row -> token [rows]) of ids [tokens, top_k] that are local or -1: each
    expert's rows padded to whole tiles. -1 for remote slots and for padding rows. trtllm-gen's order within an expert is
    that of its atomics, ours is ascending."""
    slots, _ = align_blocks(ids, experts, tile)
    real = slots < ids.numel()
    permuted = torch.full((ids.numel(),), -1, dtype=torch.int64, device=ids.device)
    permuted[slots[real]] = torch.arange(len(slots), device=ids.device)[real]
    return permuted, torch.where(real, slots // max(1, ids.shape[1]), -1)
