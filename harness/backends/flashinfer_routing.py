"""FlashInfer's fused_topk_deepseek: sigmoid, bias, groups, top-k and normalisation in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.backends._ops import packed, some_tokens
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = "flashinfer.fused_moe.fused_topk_deepseek"
# rule -> (n_group, topk_group, routed_scaling_factor): config.json of DeepSeek-V3 and Kimi-K2
RULES = {"deepseek_v3": (8, 4, 2.5), "kimi_k2": (1, 1, 2.827)}
# FlashInfer compiles with -use_fast_math: tanhf is tanh.approx.f32, off by 2**-11 at most (PTX ISA), a score by half of that
SCORE = "fp16"
# _check_dsv3_fused_routing_supported, 0.7.2.post1
MOST_TOP_K, MOST_IN_GROUP, MOST_KEPT, MOST_UNGROUPED = 8, 32, 128, 384


def prepare(case: Case, inputs: Inputs) -> Launch:
    """Weights and ids go into buffers that are made for each call."""
    function, logits, bias = resolve(ENTRY, inputs.device), inputs.logits, inputs.bias
    assert bias is not None
    groups, kept, scale = RULES[case.routing]
    tokens, experts, top_k = case.shape.tokens, case.shape.experts, case.shape.top_k

    def call() -> Tensor:
        weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
        function(logits, bias, groups, kept, top_k, scale, weights, ids)
        return packed(ids, weights)

    contract = (Argument("logits", torch.float32, (tokens, experts)), Argument("bias", torch.float32, (experts,)))
    return Launch(call, {"logits": logits, "bias": bias}, contract=contract)


def _shapes(case: Case) -> str | None:
    groups, kept, _ = RULES[case.routing]
    experts, top_k = case.shape.experts, case.shape.top_k
    if kept * groups < top_k:
        return f"topk_group * n_group ({kept * groups}) must be >= topk ({top_k})"
    if top_k > MOST_TOP_K:
        return f"topk ({top_k}) must be <= {MOST_TOP_K}"
    if groups > 1 and (experts / groups > MOST_IN_GROUP or experts / groups * kept > MOST_KEPT):
        return f"{experts} experts: num_experts / n_group must be <= {MOST_IN_GROUP}, times topk_group <= {MOST_KEPT}"
    return f"num_experts ({experts}) must be <= {MOST_UNGROUPED}" if groups == 1 and experts > MOST_UNGROUPED else None


BACKENDS = (
    Backend(
        name="flashinfer_fused_topk_deepseek",
        op="route",
        library="flashinfer-python",
        deterministic=True,
        recipes=("fp32",),
        activations=(),
        routings=tuple(RULES),
        archs=("sm89", "sm90", "sm100", "sm103", "sm107", "sm120", "sm121"),
        rounding=lambda case: Rounding(activated=SCORE),
        probe=needs(ENTRY),
        prepare=prepare,
        limits=(Limit(("routing", "experts", "top_k"), _shapes), some_tokens("noAuxTcKernels.cu, config.gridDim")),
        entries=(ENTRY,),
        twinned=True,
        summary="DeepSeek-V3 routing in one kernel",
    ),
)
