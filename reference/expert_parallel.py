"""Expert parallelism: which slots are ours. Remote slots become -1, add nothing, and leave the other weights as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reference.routing.rule import Routing

REMOTE = -1


def local_ids(ids: Tensor, offset: int, count: int) -> Tensor:
    """ids - offset where this rank holds the expert (offset <= id < offset + count), -1 elsewhere; the shape of ids."""
    local = ids - offset
    return torch.where((local >= 0) & (local < count), local, REMOTE)


def mapped_ids(ids: Tensor, expert_map: Tensor) -> Tensor:
    """expert_map[ids] (global -> local, -1 if remote) where ids are experts, -1 elsewhere. Indexing with -1 unguarded
    reads the last expert's entry."""
    inside = (ids >= 0) & (ids < len(expert_map))
    return torch.where(inside, expert_map[ids.clamp(0, len(expert_map) - 1)].to(ids.dtype), REMOTE)


def on_rank(routing: Routing, offset: int, count: int) -> Routing:
    """The routing as one rank computes it: local ids, the weights of all slots unchanged."""
    return replace(routing, ids=local_ids(routing.ids, offset, count))
