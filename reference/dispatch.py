"""Tokens to expert order and back: stable sort by expert, offsets, aligned blocks, finalize."""

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
