"""Batched (masked) activations: [experts, max_tokens, hidden], of which the first masked_m[e] rows of expert e are real.

Rows beyond are whatever the buffer held, NaN included: a kernel must mask them, never multiply them by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.dispatch import dispatch

EMPTY = -1


@dataclass(frozen=True)
class Batched:
    """rows [experts, max_tokens, hidden]; masked_m [experts] int64: real rows of each expert; slots [experts,
    max_tokens] int64: the slot (token * top_k + k) of each row, -1 beyond."""

    rows: Tensor
    masked_m: Tensor
    slots: Tensor


def to_batched(x: Tensor, ids: Tensor, experts: int, max_tokens: int, poison: float = torch.nan) -> Batched:
    """Copy x [tokens, hidden] to its experts ids [tokens, top_k], in slot order; the rest of the buffer is `poison`."""
    groups = dispatch(ids, experts)
    counts = groups.offsets.diff()
    if int(counts.max()) > max_tokens:
        raise ValueError(f"an expert has {int(counts.max())} tokens, more than max_tokens {max_tokens}")
    owner = torch.arange(experts, device=ids.device).repeat_interleave(counts)
    row = torch.arange(len(owner), device=ids.device) - groups.offsets[owner]
    slots = torch.full((experts, max_tokens), EMPTY, dtype=torch.int64, device=ids.device)
    slots[owner, row] = groups.order
    rows = torch.full((experts, max_tokens, x.shape[1]), poison, dtype=x.dtype, device=x.device)
    rows[owner, row] = x[groups.order // max(1, ids.shape[1])]
    return Batched(rows, counts, slots)


def from_batched(batched: Batched, tokens: int, top_k: int) -> Tensor:
    """Rows back to [tokens, top_k, hidden]; slots that went nowhere are zero. The inverse of `to_batched`, row by row:
    from_batched(to_batched(x, ids, ...))[t, k] is x[t] wherever ids[t, k] is an expert."""
    out = batched.rows.new_zeros(tokens * top_k, batched.rows.shape[-1])
    filled = batched.slots != EMPTY
    out[batched.slots[filled]] = batched.rows[filled]
    return out.view(tokens, top_k, out.shape[-1])
