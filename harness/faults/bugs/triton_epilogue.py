"""Patches of our Triton kernels: activation, weighting and sum."""

from __future__ import annotations

from harness.faults.patched import Patch

PATCHES = (
    Patch(
        "B170",
        "gate_and_up_exchanged",
        "https://github.com/NVIDIA/Megatron-LM/pull/6045",
        ("gate_up_swap",),
        "The kernel takes the first half for up, the preparation stored gate first.",
        (
            (
                "        up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)\n",
                "        up = tl.load(source, mask=mask, other=0.0).to(tl.float32)\n        source = source + width\n",
            ),
        ),
    ),
    Patch(
        "B068",
        "oai_without_plus_one",
        "https://github.com/sgl-project/sglang/pull/28092",
        ("wrong_activation",),
        "The clamped SwiGLU loses the +1 (beta) of its linear half.",
        (("y = g * _sigmoid(1.702 * g) * (up + 1.0)", "y = g * _sigmoid(1.702 * g) * up"),),
    ),
    Patch(
        "B068",
        "oai_without_alpha",
        "https://github.com/sgl-project/sglang/pull/28092",
        ("wrong_activation", "precision"),
        "The clamped SwiGLU loses its alpha: a plain sigmoid.",
        (("y = g * _sigmoid(1.702 * g) * (up + 1.0)", "y = g * _sigmoid(g) * (up + 1.0)"),),
    ),
    Patch(
        "B026",
        "routing_weight_twice",
        "https://github.com/vllm-project/vllm/pull/43694",
        ("unweighted", "constant_factor", "precision"),
        "The routing weight is applied by GEMM 2's epilogue and again by the sum.",
        (("acc += weight[:, None] * row.to(tl.float32)", "acc += weight[:, None] * weight[:, None] * row.to(tl.float32)"),),
    ),
    Patch(
        "B232",
        "first_weight_for_all_slots",
        "https://github.com/vllm-project/vllm-xpu-kernels/pull/66",
        ("unweighted",),
        "Every slot is weighted with the token's first routing weight.",
        (("weight = tl.load(weights_ptr + slot,", "weight = tl.load(weights_ptr + t.to(tl.int64) * top_k,"),),
    ),
    Patch(
        "B213",
        "weight_of_the_previous_row",
        "https://github.com/vllm-project/vllm/issues/48895",
        ("unweighted", "poison", "non_finite", "exception", "death"),
        "A row is weighted with the weight of the row before it.",
        (("weight = tl.load(weights_ptr + slot,", "weight = tl.load(weights_ptr + slot - 1,"),),
    ),
    Patch(
        "B231",
        "sum_in_bf16",
        "https://github.com/vllm-project/vllm/pull/46643",
        ("precision",),
        "The sum over a token's slots is kept in the output's 16-bit type.",
        (
            (
                "acc += weight[:, None] * row.to(tl.float32)",
                "acc = (acc + weight[:, None] * row.to(tl.float32)).to(out_ptr.dtype.element_ty).to(tl.float32)",
            ),
        ),
    ),
    Patch(
        "B217",
        "accumulates_onto_the_output",
        "https://github.com/flagos-ai/FlagGems/issues/5123",
        ("non_finite", "never_written", "poison"),
        "The sum starts from what the output buffer holds before the call.",
        (
            (
                "acc = tl.full((BLOCK_T, BLOCK_H), 0.0, dtype=tl.float32)\n    for j",
                "start = out_ptr + t.to(tl.int64)[:, None] * hidden + h[None, :]\n    acc = tl.load(start, mask=(t < tokens)[:, None] & (h[None, :] < hidden), other=0.0).to(tl.float32)\n    for j",
            ),
        ),
    ),
)

FAULTS = tuple(patch.fault for patch in PATCHES)
