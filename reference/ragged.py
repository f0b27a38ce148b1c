"""The metadata of triton_kernels' ragged matmul: tokens by expert, and which program works on which block of which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.dispatch import dispatch

BLOCK_SIZES = (16, 32, 64, 128)
HIP_BLOCK_SIZES = (*BLOCK_SIZES, 256)
UNUSED = -1


@dataclass(frozen=True)
class Ragged:
    """slots = token * top_k + k. sizes [experts]: tokens per expert; offsets [experts + 1]: exclusive prefix sums;
    col_sorted [slots]: slots grouped by expert, stable, -1 after the valid ones; row_sorted [slots]: its inverse, -1 for
    slots without an expert; gathered [slots]: the token of col_sorted, -1 after the valid ones."""

    sizes: Tensor
    offsets: Tensor
    col_sorted: Tensor
    row_sorted: Tensor
    gathered: Tensor


def ragged(ids: Tensor, experts: int) -> Ragged:
    """Metadata of ids [tokens, top_k]; ids outside [0, experts) belong to nobody. All int64."""
    groups, slots = dispatch(ids, experts), ids.numel()
    valid = len(groups.order)
    col_sorted = torch.full((slots,), UNUSED, dtype=torch.int64, device=ids.device)
    row_sorted, gathered = col_sorted.clone(), col_sorted.clone()
    col_sorted[:valid] = groups.order
    row_sorted[groups.order] = torch.arange(valid, device=ids.device)
    gathered[:valid] = groups.order // max(1, ids.shape[1])
    return Ragged(groups.offsets.diff(), groups.offsets, col_sorted, row_sorted, gathered)


def block_offsets(sizes: Tensor, block: int) -> Tensor:
    """[experts + 1]: exclusive prefix sums of the blocks of `block` rows each expert needs."""
    blocks = (sizes + block - 1) // block
    return torch.cat((blocks.new_zeros(1), blocks.cumsum(0)))


def most_blocks(experts: int, slots: int, smallest: int = BLOCK_SIZES[0]) -> int:
    """Entries of a schedule: enough for any distribution of `slots` rows with the smallest block size."""
    return min(slots, experts - 1 + -(-(slots - experts + 1) // smallest))


def block_schedule(sizes: Tensor, block: int, entries: int) -> Tensor:
    """[entries] int64: (block within expert << 16) | expert, experts ascending, then -1."""
    blocks = (sizes + block - 1) // block
    owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(blocks)
    within = torch.arange(len(owner), device=sizes.device) - block_offsets(sizes, block)[owner]
    if len(owner) > entries:
        raise ValueError(f"{len(owner)} blocks of {block} rows do not fit a schedule of {entries}")
    schedule = torch.full((entries,), UNUSED, dtype=torch.int64, device=sizes.device)
    schedule[: len(owner)] = within << 16 | owner
    return schedule
