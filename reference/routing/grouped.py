"""Rules that first choose groups of experts: DeepSeek-V2 and V3 and the variants of vLLM's grouped_topk."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.routing.flat import SIGMOID, SOFTMAX, as_scored, normalized, softmax
from reference.routing.rule import Rule, Slack

_V3 = "DeepSeek-V3 modeling code (MoEGate, noaux_tc); FlashInfer RoutingMethodType.DeepSeekV3"
_V2 = "DeepSeek-V2 config.json: n_group 8, topk_group 3, routed_scaling_factor 16, norm_topk_prob false"
_VLLM = "vLLM grouped_topk(scoring_func, renormalize, e_score_correction_bias)"
BIASED_SOFTMAX = Slack(absolute=2.0**-20, relative=2.0**-18)  # the sum with a bias near 1 is rounded to fp32


def normalized_bare(chosen: Tensor) -> Tensor:
    """s / sum s with nothing added: 0 / 0 is NaN, in vLLM too."""
    return chosen / chosen.sum(-1, keepdim=True)


def _variant(scoring: str, biased: bool, renormalize: bool) -> Rule:
    name = f"grouped_{scoring}" + "_bias" * biased + "_renorm" * renormalize
    score, slack = (torch.sigmoid, SIGMOID) if scoring == "sigmoid" else (softmax, BIASED_SOFTMAX if biased else SOFTMAX)
    weigh = normalized_bare if renormalize else as_scored
    return Rule(name, score, weigh, _VLLM, biased, groups=(8, 4), pairs=biased, slack=slack)


GROUPED = (
    Rule("deepseek_v3", torch.sigmoid, normalized, _V3, biased=True, groups=(8, 4), scale=2.5, slack=SIGMOID),
    Rule(
        "kimi_k2",
        torch.sigmoid,
        normalized,
        "Kimi-K2 config.json: n_group 1, routed_scaling_factor 2.827",
        biased=True,
        scale=2.827,
        slack=SIGMOID,
    ),
    Rule("deepseek_v2", softmax, as_scored, _V2, groups=(8, 3), pairs=False, scale=16.0, slack=SOFTMAX),
    *(_variant(s, b, r) for s in ("softmax", "sigmoid") for b in (False, True) for r in (False, True)),
)
