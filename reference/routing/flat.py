"""Rules that look at every expert: softmax, raw logits and sigmoids, before or after the selection."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from reference.routing.rule import Rule, Slack

TINY = 1e-20  # what DeepSeek and FlashInfer keep a sum of sigmoids above
SOFTMAX = Slack(relative=2.0**-18)  # fp32 exp to a few ulp of an argument below 88, and one common divisor
# tanh.approx.f32 is good to 2**-11, so 0.5 * tanh(x / 2) + 0.5 to 2**-12; two experts may err in opposite directions.
SIGMOID = Slack(absolute=2.0**-11)


def raw(logits: Tensor) -> Tensor:
    """The logits themselves: compared in their own dtype, so a kernel may be off by the rounding to it at most."""
    return logits


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return logits.softmax(-1)


def as_scored(chosen: Tensor) -> Tensor:
    """Weights that are the scores."""
    return chosen


def normalized(chosen: Tensor) -> Tensor:
    """s / (sum s + 1e-20)."""
    return chosen / (chosen.sum(-1, keepdim=True) + TINY)


def normalized_floored(chosen: Tensor) -> Tensor:
    """s / max(sum s, 1e-20)."""
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=TINY)


_FI = "FlashInfer RoutingMethodType"
_RENORMALIZE = Rule("renormalize", raw, softmax, f"{_FI}.Renormalize: top-k, then softmax over the selected")
_BIASED = f"{_FI}.MiniMax2: sigmoid + bias, top-k, divided by the sum (scale 1)"
FLAT = (
    Rule("default", softmax, as_scored, f"{_FI}.Default: softmax over all, then top-k", slack=SOFTMAX),
    _RENORMALIZE,
    replace(_RENORMALIZE, name="renormalize_naive", source=f"{_FI}.RenormalizeNaive: computed as Renormalize"),
    Rule("topk", raw, as_scored, f"{_FI}.TopK: the logits are the weights"),
    Rule("topk_sigmoid", raw, torch.sigmoid, f"{_FI}.TopKSigmoid: top-k, then sigmoid"),
    Rule("llama4", raw, torch.sigmoid, f"{_FI}.Llama4 (top-1 there); Llama4Router of transformers (any top-k)"),
    Rule("sigmoid", torch.sigmoid, as_scored, f"{_FI}.Sigmoid: sigmoid, then top-k", slack=SIGMOID),
    Rule("sigmoid_renorm", torch.sigmoid, normalized_floored, f"{_FI}.SigmoidRenorm with norm_topk_prob", slack=SIGMOID),
    Rule("minimax2", torch.sigmoid, normalized, _BIASED, biased=True, slack=SIGMOID),
)
