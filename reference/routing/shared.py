"""Rules with a fused shared expert: the last expert is every token's, in a slot of its own with weight 1.

A layer with a shared expert gives scale * sum(w_k expert_k(x)) + shared(x). A kernel that fuses it sees one expert more, which
nothing selects, and one slot more a token, which no renormalisation counts and no scaling factor multiplies. All experts of a
kernel have one intermediate size: a shared expert can be fused only if it is as wide as a routed one (moe_intermediate_size),
or, n times as wide, as n of them. Experts and top_k of a case count it: 8 routed experts, 2 of them a token, are e9.k3.
"""

from __future__ import annotations

from dataclasses import replace

from reference.routing.flat import FLAT
from reference.routing.grouped import GROUPED
from reference.routing.rule import Rule

_BASES = {rule.name: rule for rule in (*FLAT, *GROUPED)}


def _fused(base: str, source: str) -> Rule:
    return replace(_BASES[base], name=f"{base}_shared", source=source, shared=1)


SHARED = (
    _fused(
        "deepseek_v3",
        "DeepSeek-V3 config.json: n_shared_experts 1; FlashInfer >= 0.6.15 num_fused_shared_experts: id num_experts, weight 1 "
        "(trtllm_fused_moe_routing_deepseek.cu)",
    ),
    _fused("kimi_k2", "Kimi-K2 config.json: n_shared_experts 1, n_group 1; vLLM: weight 1 unless the output is scaled"),
    _fused("renormalize", "HunYuanMoEV1Moe of transformers: softmax over the selected, shared_mlp of the experts' size"),
)
