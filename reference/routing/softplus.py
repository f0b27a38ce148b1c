"""DeepSeek-V4: scores sqrt(softplus(logit)), selected by score and bias or looked up by token id."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.routing.rule import Routing, Rule, Slack

NAN_SCORE = -1e30  # a NaN score never wins
# log(1 + exp(x)) with 1 + exp(x) rounded to fp32 is off by 2**-24, its root by up to 2**-12 where it should be tiny.
SQRT_SOFTPLUS = Slack(absolute=2.0**-11, relative=2.0**-18)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x))), x above 20 standing for its softplus; NaN becomes NAN_SCORE."""
    scores = torch.nn.functional.softplus(logits).sqrt()
    return scores.masked_fill(scores.isnan(), NAN_SCORE)


def normalized_positive(chosen: Tensor) -> Tensor:
    """s / sum s; where nothing is positive the denominator is 1. NAN_SCORE counts as 0."""
    chosen = chosen.clamp(min=0)
    total = chosen.sum(-1, keepdim=True)
    return chosen / torch.where(total > 0, total, 1.0)


def hash_topk(logits: Tensor, token_ids: Tensor, table: Tensor, scale: float = 1.0) -> Routing:
    """Experts table[token_ids] (table [vocabulary, top_k] int, token_ids [tokens]), weighted by their scores in logits
    [tokens, experts]. Nothing competes: the margin is inf. FlashInfer's hash_topk leaves the weights unscaled (scale 1)
    and appends shared experts with 1 / scale; DeepSeek's own code and vLLM scale the weights."""
    ids = table[token_ids].long()
    weights = normalized_positive(sqrt_softplus(logits.double()).gather(-1, ids)) * scale
    return Routing(ids, weights, weights.new_full((len(weights),), torch.inf))


SOFTPLUS = (
    Rule(
        "deepseek_v4",
        sqrt_softplus,
        normalized_positive,
        "transformers DeepseekV4TopKRouter and routed_scaling_factor; vLLM RoutingMethodType.DeepseekV4",
        biased=True,
        scale=1.5,
        slack=SQRT_SOFTPLUS,
    ),
)
