"""FlashInfer's fused_topk_deepseek picks wrong experts, and its `sigmoid_accurate` is not (0.7.2.post1, NVIDIA H200).

1. One group, more than 128 experts: each warp writes top_k of its 8 shared-memory slots (noAuxTcKernels.cu,
   smemInterTopScores) and all 8 are compared. What was in the others wins when every selection score (sigmoid + bias) is
   smaller, as with biases below -1. Expected: the top_k largest scores. (The Python check lets one group have top_k 1 only.)
2. The module is compiled with -use_fast_math: tanhf becomes tanh.approx.f32. Expected: weights within 8 ulp of fp32.
3. No tokens: the launch of an empty grid leaves an error for whoever comes next. Expected: nothing to do, no error.
Needs a GPU and flashinfer-python. One JSON line a question. Exit 1: a defect is here, 0: all gone, 2: cannot tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

TOKENS, SCALE, ULPS = 4096, 2.5, 8 * 2.0**-23


def routed(logits: Tensor, bias: Tensor, groups: tuple[int, int], top_k: int) -> tuple[Tensor, Tensor]:
    """(ids, weights) [tokens, top_k] of the library, experts ascending."""
    from flashinfer.fused_moe import fused_topk_deepseek

    weights = torch.empty(len(logits), top_k, device="cuda")
    ids = torch.empty(len(logits), top_k, dtype=torch.int32, device="cuda")
    fused_topk_deepseek(logits, bias, *groups, top_k, SCALE, weights, ids)
    torch.cuda.synchronize()
    order = ids.long().argsort(-1)
    return ids.long().gather(1, order), weights.double().gather(1, order)


def picks(shift: float, experts: int, top_k: int = 1) -> dict[str, object]:
    """Rows whose experts are not the top_k largest of sigmoid + bias, though the next one is 0.001 away."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(TOKENS, experts, device="cuda", generator=generator) * 2
    bias = torch.rand(experts, device="cuda", generator=generator) * 0.1 + shift
    scores = torch.sigmoid(logits.double()) + bias.double()
    best = scores.topk(top_k + 1)
    clear = best.values[:, top_k - 1] - best.values[:, top_k] > 1e-3
    ids, _ = routed(logits, bias, (1, 1), top_k)
    wrong = (ids != best.indices[:, :top_k].sort(-1).values).any(-1) & clear
    outside = int(((ids < 0) | (ids >= experts)).any(-1).sum())
    about = {"experts": experts, "top_k": top_k, "bias_from": shift, "clear_rows": int(clear.sum())}
    return {"question": "picks", **about, "wrong_rows": int(wrong.sum()), "rows_with_ids_outside": outside}


def precision() -> dict[str, object]:
    """Largest relative error of a weight, beside the same formula in torch's fp32."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(TOKENS, 256, device="cuda", generator=generator) * 2
    ids, weights = routed(logits, torch.zeros(256, device="cuda"), (8, 4), 8)
    scores = torch.sigmoid(logits.double()).gather(1, ids)
    due = scores / scores.sum(1, keepdim=True) * SCALE
    plain = (0.5 * torch.tanh(0.5 * logits) + 0.5).gather(1, ids)
    plain = plain / plain.sum(1, keepdim=True) * SCALE
    off, torch_off = (float(((w.double() - due) / due).abs().max()) for w in (weights, plain))
    return {"question": "precision", "largest_error": off, "torch_fp32": torch_off, "wrong_rows": int(off > ULPS)}


def no_tokens() -> dict[str, object]:
    """What the next launch hears after a call without tokens."""
    try:
        routed(torch.empty(0, 256, device="cuda"), torch.zeros(256, device="cuda"), (8, 4), 8)
        torch.zeros(8, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return {"question": "no tokens", "wrong_rows": 1, "says": str(error).splitlines()[0]}
    return {"question": "no tokens", "wrong_rows": 0}


def main() -> int:
    """Ask them all."""
    if not torch.cuda.is_available():
        print("needs a GPU")
        return 2
    asked: list[Callable[[], dict[str, object]]] = [precision, no_tokens]
    asked += [partial(picks, shift, experts) for shift in (0.0, -1.1) for experts in (128, 160, 256, 384)]
    found = 0
    for question in asked:  # an illegal address ends the process: each answer is printed at once
        row = question()
        print(json.dumps(row), flush=True)
        found += bool(row["wrong_rows"])
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
