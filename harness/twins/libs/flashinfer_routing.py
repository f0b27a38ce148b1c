"""What FlashInfer 0.7.2.post1's fused_topk_deepseek does: flashinfer/fused_moe/fused_routing_dsv3.py, default backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SMALL = 1e-20  # added to the sum of the chosen scores


def fused_topk_deepseek(  # noqa: PLR0913  the library's signature
    scores: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: Tensor,
    topk_indices: Tensor,
    launch_with_pdl: bool = True,
    routing_replay_out: Tensor | None = None,
    *,
    backend: str = "default",
) -> None:
    """scores [tokens, experts], bias [experts] -> topk_values, topk_indices [tokens, topk] in place, best expert first."""
    named = {"scores": scores, "bias": bias, "topk_values": topk_values, "topk_indices": topk_indices}
    _check({**named, "routing_replay_out": routing_replay_out}, n_group, topk_group, topk)
    sigmoid = torch.sigmoid(scores.float())
    biased = sigmoid + bias.float()
    if n_group > 1:
        grouped = biased.unflatten(1, (n_group, -1))
        best = grouped.topk(2, -1).values.sum(-1).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        keep = torch.zeros(len(scores), n_group, dtype=torch.bool).scatter(1, best, True)
        biased = grouped.masked_fill(~keep[:, :, None], -torch.inf).flatten(1)
    ids = biased.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    chosen = sigmoid.gather(1, ids)
    topk_values.copy_(chosen * routed_scaling_factor / (chosen.sum(-1, keepdim=True) + SMALL))
    topk_indices.copy_(ids)
    if routing_replay_out is not None:
        routing_replay_out[: len(scores)] = ids.to(torch.int16)


def _check(tensors: Mapping[str, Tensor | None], n_group: int, topk_group: int, topk: int) -> None:
    """_check_dsv3_fused_routing_supported."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    scores, replay = tensors["scores"], tensors["routing_replay_out"]
    assert scores is not None
    if replay is not None and (replay.dtype != torch.int16 or replay.shape[0] < len(scores) or replay.shape[1] != topk):
        raise ValueError(
            f"routing_replay_out must be int16 [{len(scores)}.., {topk}], got {replay.dtype} {tuple(replay.shape)}"
        )
    experts = scores.shape[1]
    if topk_group * n_group < topk or topk_group > n_group:
        raise ValueError(
            f"Invalid configuration: topk_group * n_group ({topk_group * n_group}) must be >= topk ({topk}) "
            f"and topk_group ({topk_group}) must be <= n_group ({n_group})"
        )
    if n_group > 1 and (topk > 8 or experts / n_group > 32 or experts / n_group * topk_group > 128):
        raise ValueError(f"Invalid configuration for n_group > 1: topk ({topk}), num_experts ({experts})")
    if n_group == 1 and (experts > 384 or topk > 8):
        raise ValueError(f"Invalid configuration for n_group = 1: topk ({topk}), num_experts ({experts})")


ENTRIES = {"flashinfer.fused_moe.fused_topk_deepseek": fused_topk_deepseek}
