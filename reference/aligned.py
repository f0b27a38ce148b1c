"""moe_align_block_size of vLLM and SGLang with its buffers, and its variant for batched activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.dispatch import align_blocks
from reference.expert_parallel import mapped_ids

REMOTE = -1


@dataclass(frozen=True)
class Aligned:
    """slots [buffer]: slots by expert, each expert padded to whole blocks, padding and tail being `sentinel`; experts
    [buffer / block, rounded up]: the expert of each block, -1 for a remote one; used: slots up to the last block in use.
    Blocks after it are unspecified in the libraries (0, -1 or what was there), -1 here."""

    slots: Tensor
    experts: Tensor
    used: int
    sentinel: int


def buffer_size(slots: int, experts: int, block: int, whole_blocks: bool = False) -> int:
    """Entries vLLM allocates: the worst distribution, rounded up to whole blocks on request, but never more than one
    block a slot where there are fewer slots than experts."""
    size = slots + experts * (block - 1)
    if whole_blocks:
        size = -(-size // block) * block
    return min(size, slots * block) if slots < experts else size


def align(ids: Tensor, experts: int, block: int, expert_map: Tensor | None = None, ignore_invalid: bool = False) -> Aligned:
    """ids [tokens, top_k] of global experts. expert_map [experts] int: global -> local, -1 if remote. Remote experts are
    counted and their blocks marked -1, or with `ignore_invalid` left out and the rest ordered by local expert. Ids
    outside [0, experts) are skipped (older small-batch kernels write out of bounds for them, all do for negative ones)."""
    early = expert_map is not None and ignore_invalid
    slots, owners = align_blocks(ids if expert_map is None or not early else mapped_ids(ids, expert_map), experts, block)
    if expert_map is not None and not early:
        owners = expert_map.long()[owners]
    return _padded(slots, owners, buffer_size(ids.numel(), experts, block), block, ids.numel())


def align_batched(counts: Tensor, max_tokens: int, block: int) -> Aligned:
    """counts [experts]: valid rows of activations [experts, max_tokens, hidden]; slot = expert * max_tokens + row, the
    sentinel is experts * max_tokens. The buffer holds every expert's max_tokens rounded up to whole blocks."""
    if int(counts.max()) > max_tokens:
        raise ValueError(f"an expert has {int(counts.max())} rows, more than max_tokens {max_tokens}")
    sentinel, slots, owners = len(counts) * max_tokens, [counts.new_empty(0, dtype=torch.int64)], []
    for expert, count in enumerate(counts.tolist()):
        rows = torch.full((-(-count // block) * block,), sentinel, dtype=torch.int64, device=counts.device)
        rows[:count] = expert * max_tokens + torch.arange(count, device=counts.device)
        slots.append(rows)
        owners += [expert] * (len(rows) // block)
    size = len(counts) * -(-max_tokens // block) * block
    return _padded(torch.cat(slots), torch.tensor(owners, dtype=torch.int64, device=counts.device), size, block, sentinel)


def _padded(slots: Tensor, owners: Tensor, size: int, block: int, sentinel: int) -> Aligned:
    full = torch.full((size,), sentinel, dtype=torch.int64, device=slots.device)
    full[: len(slots)] = slots
    experts = torch.full((-(-size // block),), REMOTE, dtype=torch.int64, device=slots.device)
    experts[: len(owners)] = owners
    return Aligned(full, experts, len(slots), sentinel)


def ordered(theirs: Aligned, block: int) -> Aligned:
    """The same alignment with each run of one expert's blocks in ascending order: the libraries fill a run in the order
    in which their threads arrive. Everything after the used part becomes sentinel and -1."""
    slots, owners = theirs.slots[: theirs.used].clone(), theirs.experts[: theirs.used // block]
    run = torch.cat((owners.new_zeros(1), (owners.diff() != 0).long().cumsum(0)))[: len(owners)].repeat_interleave(block)
    by_slot = slots.argsort(stable=True)
    slots = slots[by_slot[run[by_slot].argsort(stable=True)]]
    return _padded(slots, owners, len(theirs.slots), block, theirs.sentinel)
