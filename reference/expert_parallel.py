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


def with_shared(routing: Routing, experts: int, shared: int, weight: float = 1.0) -> Routing:
    """Fused shared experts as extra slots: ids experts, experts + 1, ... for every token. weight is 1, or
    1 / routed_scaling_factor where the whole output is scaled afterwards (vLLM) and in FlashInfer's hash_topk."""
    extra = torch.arange(experts, experts + shared, device=routing.ids.device).expand(len(routing.ids), shared)
    weights = routing.weights.new_full(extra.shape, weight)
    return replace(routing, ids=torch.cat((routing.ids, extra), -1), weights=torch.cat((routing.weights, weights), -1))
