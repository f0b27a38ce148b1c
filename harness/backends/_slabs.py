"""Tokens sorted to their experts for kernels that want them so: slabs [experts, rows, ..] with counts, or one padded list.

Nothing waits for the device, so a CUDA graph can hold it all. Rows that no token fills keep what memory held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where each slot (token * top_k + k) goes: row `at` [slots] int64 of a buffer of `size` rows, `counts` [experts] int32
    rows of each expert in use, `owner` [size] int32: the expert of a row of the buffer, -1 where there is none."""

    at: Tensor
    counts: Tensor
    owner: Tensor
    top_k: int

    def spread(self, x: Tensor) -> Tensor:
        """x [tokens, ..] -> [size, ..], each row once for each of its slots."""
        rows = x.new_empty((len(self.owner), *x.shape[1:]))
        rows.view(torch.uint8)[self.at] = x.view(torch.uint8).repeat_interleave(self.top_k, 0)
        return rows

    def gathered(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows [size, hidden] -> [tokens, hidden]: sum over a token's slots of weight times row, in fp32, in rows' dtype."""
        taken = rows[self.at].float().view(*weights.shape, rows.shape[-1])
        return (taken * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def in_slabs(ids: Tensor, experts: int, rows: int) -> Places:
    """Places in [experts * rows]: expert e's slots from row e * rows on, in slot order. No expert may get more than `rows`."""
    return _placed(ids, experts, torch.arange(experts, device=ids.device) * rows, experts * rows)


def in_blocks(ids: Tensor, experts: int, block: int) -> Places:
    """Places in one list by expert, each expert starting at a multiple of `block`; as long as the worst routing needs."""
    counts = _counts(ids, experts)
    padded = (counts + block - 1) // block * block
    size = (ids.numel() + experts * (block - 1) + block - 1) // block * block
    return _placed(ids, experts, padded.cumsum(0) - padded, size)


def _counts(ids: Tensor, experts: int) -> Tensor:
    flat = ids.flatten().long()
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def _placed(ids: Tensor, experts: int, starts: Tensor, size: int) -> Places:
    flat, counts = ids.flatten().long(), _counts(ids, experts)
    order = flat.argsort(stable=True)
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=ids.device) - (counts.cumsum(0) - counts)[flat[order]]
    at = starts[flat] + rank
    owner = torch.full((size,), -1, dtype=torch.int32, device=ids.device).scatter_(0, at, flat.int())
    return Places(at, counts.int(), owner, ids.shape[1])
