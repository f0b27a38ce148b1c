"""What the routing kernels of trtllm-gen do, in fp32: scores, the best experts, weights in bf16.

Source: FlashInfer 0.7.2.post1 data/csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_{runner,deepseek,llama4}.cu and
data/include/flashinfer/trtllm/fused_moe/RoutingCustomPolicy.cuh.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from harness.twins.libs.flashinfer_enums import RoutingMethodType as Method

LOWEST = -torch.inf
EPSILON = 1e-20  # mSumEpsilon, and the floor of SumNormalizePostprocess
GROUP_BEST = 2  # NumTopGroupScores
# PolicyTraits::Pairs: the largest (experts, top_k) compiled; of more than one pair the widest that matters here
TIERS = {Method.Default: (256, 8), Method.SigmoidRenorm: (256, 8), Method.Sigmoid: (256, 8), Method.TopKSigmoid: (256, 8)}
TIERS |= {Method.TopK: (256, 8), Method.Llama4: (128, 1), Method.Renormalize: (2048, 32), Method.RenormalizeNaive: (2048, 32)}
TIERS |= {Method.MiniMax2: (1024, 32), Method.DeepSeekV3: (1024, 32)}
GROUPED = {"experts": 512, "top_k": 22, "groups": 8, "per_group": 32, "kept": 4}  # constants of routing_deepseek.cu


def shared(a: SimpleNamespace) -> int:
    """num_fused_shared_experts: rows of every tensor per expert and slots of a token behind the routed ones."""
    return getattr(a, "num_fused_shared_experts", None) or 0


def check(ok: bool, text: str) -> None:
    """RuntimeError with `text` unless `ok`, as TVM_FFI_ICHECK and FLASHINFER_CHECK raise it."""
    if not ok:
        raise RuntimeError(f"Check failed: {text}")


def route(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """(ids int64, weights bf16), both [tokens, top_k], best first; equal scores go to the lower expert."""
    method = Method(a.routing_method_type)
    check(method in TIERS, f"Unimplemented routing method {method.name}")
    logits = a.routing_logits.float()
    grouped = method is Method.DeepSeekV3 and (a.n_group or 0) > 1
    if method is Method.DeepSeekV3 and not grouped:
        check(shared(a) == 0, "DeepSeek no-groups routing path does not support fusing shared expert")
    if grouped:
        _check_groups(a)
    else:
        experts, top_k = TIERS[method]
        check(a.num_experts <= experts and a.top_k <= top_k, f"no compiled tier covers {a.num_experts} experts, top {a.top_k}")
    if method in (Method.DeepSeekV3, Method.MiniMax2):
        return _biased(a, logits, grouped)
    norm = method is Method.SigmoidRenorm and getattr(a, "norm_topk_prob", True)
    scores = logits.softmax(-1) if method is Method.Default else logits
    if method in (Method.Sigmoid, Method.SigmoidRenorm):
        scores = torch.sigmoid(logits)
    ids, best = _best(scores, a.top_k)
    if method in (Method.Renormalize, Method.RenormalizeNaive):
        best = best.softmax(-1)
    elif method in (Method.Llama4, Method.TopKSigmoid):
        best = torch.sigmoid(best)
    elif norm:
        best = best / best.sum(-1, keepdim=True).clamp(min=EPSILON)
    return ids, best.bfloat16()


def _biased(a: SimpleNamespace, logits: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """Selected by sigmoid + bias, weighed by the sigmoid alone. The kernel that knows groups rounds the bias to bf16."""
    sigmoid = torch.sigmoid(logits)
    bias = torch.zeros(a.num_experts) if a.routing_bias is None else a.routing_bias.float()
    selection = sigmoid + (bias.bfloat16().float() if grouped else bias)
    if grouped:
        groups = selection.unflatten(-1, (a.n_group, -1))
        totals = groups.topk(GROUP_BEST, dim=-1).values.sum(-1)
        kept = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, _best(totals, a.topk_group)[0], True)
        selection = groups.masked_fill(~kept.unsqueeze(-1), LOWEST).flatten(-2)
    ids = _best(selection, a.top_k)[0]
    chosen = sigmoid.gather(-1, ids)
    scale = 1.0 if a.routed_scaling_factor is None else a.routed_scaling_factor
    return _fused(a, ids, (chosen * scale / (chosen.sum(-1, keepdim=True) + EPSILON)).bfloat16())


def _fused(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """With the slots of fused shared experts, in which every token takes num_experts, num_experts + 1, ... with weight 1."""
    always = (a.num_experts + torch.arange(shared(a))).expand(len(ids), -1)
    return torch.cat((ids, always), 1), torch.cat((weights, torch.ones_like(always, dtype=weights.dtype)), 1)


def _check_groups(a: SimpleNamespace) -> None:
    limits = GROUPED
    total = a.num_experts + shared(a)
    check(total <= limits["experts"], f"Routing kernel expects total experts (routed + fused shared) <= 512, got {total}")
    check(
        a.num_experts <= limits["experts"], f"Routing kernel expects #experts {a.num_experts} <= #threads {limits['experts']}"
    )
    check(a.top_k <= limits["top_k"], "For DeepSeek routing method, must have topK <= 22")
    check(a.topk_group <= limits["kept"], "For DeepSeek routing method, must have topkGroup <= 4")
    check(a.n_group <= limits["groups"], f"Routing kernel expects #expert groups {a.n_group} to be <= max groups 8")
    check(a.num_experts % a.n_group == 0, f"#experts {a.num_experts} to be a multiple of #expert groups {a.n_group}")
    per_group = a.num_experts // a.n_group
    check(per_group <= limits["per_group"], f"Routing kernel expects #experts per group <= warp size (32), got {per_group}")
    check(a.num_experts % 4 == 0, f"Routing kernel expects #experts {a.num_experts} to be a multiple of 4.")


def _best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    ids = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return ids, scores.gather(-1, ids)


def unpack(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """(ids int64, weights), both [tokens, top_k], of routing that was decided elsewhere: one int32 a slot, the expert above
    the bits of a bf16 weight; or a pair of int32 ids and bf16 or float32 weights, which are used as they are."""
    if isinstance(a.topk_ids, tuple):
        ids, weights = a.topk_ids
        check(ids.dtype == torch.int32, "expert_indices must be int32.")
        check(weights.dtype in (torch.bfloat16, torch.float32), "expert_weights must be bfloat16 or float32")
        return ids.long(), weights
    check(a.topk_ids.dtype == torch.int32, "topk_ids must be an int32 tensor.")
    low = a.topk_ids.contiguous().view(torch.int16).view(*a.topk_ids.shape, 2)[..., 0]  # little-endian: the weight
    return a.topk_ids.long() >> 16, low.contiguous().view(torch.bfloat16)
