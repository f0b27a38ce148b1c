"""Memory as a kernel sees it: a base address and offsets that nobody checks until they leave what is mapped."""

from __future__ import annotations

import torch
from torch import Tensor


class IllegalAddress(RuntimeError):
    """What CUDA reports as "an illegal memory access was encountered"."""


def load(buffer: Tensor, offsets: Tensor, mask: Tensor | None = None, other: float = 0) -> Tensor:
    """buffer's memory at `offsets` (int64, in elements from its first one), `other` where `mask` is False.

    An offset outside the buffer but inside its storage reads the neighbourhood, as on a GPU; one outside the storage is an
    IllegalAddress.
    """
    memory, at = _resolve(buffer, offsets, mask)
    values = memory[at]
    return values if mask is None else torch.where(mask, values, torch.full_like(values, other))


def store(buffer: Tensor, offsets: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
    """Write `values` at `offsets` where `mask` is True; of equal offsets the last wins."""
    memory, at = _resolve(buffer, offsets, mask)
    values = values.to(memory.dtype).expand(at.shape)
    if mask is None:
        memory[at] = values
    else:
        keep = mask.expand(at.shape)
        memory[at[keep]] = values[keep]


def _resolve(buffer: Tensor, offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    memory = torch.empty(0, dtype=buffer.dtype).set_(buffer.untyped_storage())
    at: Tensor = offsets + int(buffer.storage_offset())
    if mask is not None:
        at = torch.where(mask, at, int(buffer.storage_offset()))
        if not bool(mask.any()):
            return (memory if memory.numel() else torch.zeros(1, dtype=buffer.dtype)), torch.zeros_like(at)
    if at.numel() and not (int(at.min()) >= 0 and int(at.max()) < memory.numel()):
        worst = int(at.min()) if int(at.min()) < 0 else int(at.max())
        raise IllegalAddress(f"an illegal memory access was encountered: element {worst} of {memory.numel()}")
    return memory, at


def wrapped(offsets: Tensor, bits: int) -> Tensor:
    """`offsets` as a signed integer of so many bits holds them: what index arithmetic in too narrow a type gives."""
    span = 1 << bits
    return (offsets + span // 2) % span - span // 2
