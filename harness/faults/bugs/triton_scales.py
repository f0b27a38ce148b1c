"""Patches of our Triton kernels: how weights and their scales are read."""

from __future__ import annotations

from harness.faults.patched import Patch

PATCHES = (
    Patch(
        "B093",
        "last_k_block_next_experts_scales",
        "https://github.com/flashinfer-ai/flashinfer/issues/5438",
        ("next_expert_scales", "scale_roll", "poison", "non_finite", "unexplained", "exception", "death"),
        "The last K block of a tile is scaled with the scales of the next expert (a descriptor updated too early).",
        (
            (
                "scale = tl.load(s_ptr + row * (K // 32) + (k // 32)",
                "last = tl.where((k // 32 == K // 32 - 1), N * (K // 32), 0)[:, None]\n            scale = tl.load(s_ptr + last + row * (K // 32) + (k // 32)",
            ),
            (
                "scale = tl.load(s_ptr + row * (K // 16) + (k // 16)",
                "last = tl.where((k // 16 == K // 16 - 1), N * (K // 16), 0)[:, None]\n            scale = tl.load(s_ptr + last + row * (K // 16) + (k // 16)",
            ),
        ),
    ),
    Patch(
        "B165",
        "logical_for_physical_stride",
        "https://github.com/ROCm/aiter/pull/4108",
        ("scale_roll", "poison", "non_finite", "unexplained", "exception", "death"),
        "Scales are addressed with the padded stride while they lie unpadded.",
        (
            ("s_ptr + row * (K // 32) +", "s_ptr + row * ((K + 127) // 128 * 4) +"),
            ("s_ptr + row * (K // 16) +", "s_ptr + row * ((K + 127) // 128 * 8) +"),
        ),
    ),
    Patch(
        "B048",
        "scales_read_in_another_layout",
        "https://github.com/vllm-project/vllm/pull/54773",
        ("scale_roll", "wrong_scales", "unexplained"),
        "Preparation and kernel disagree on the scale layout: the scales of a matrix are read column by column.",
        (
            (
                "scale = tl.load(s_ptr + row * (K // 32) + (k // 32)[:, None]",
                "scale = tl.load(s_ptr + expert * N * (K // 32) + n[None, :] + (k // 32)[:, None] * N",
            ),
            (
                "scale = tl.load(s_ptr + row * (K // 16) + (k // 16)[:, None]",
                "scale = tl.load(s_ptr + expert * N * (K // 16) + n[None, :] + (k // 16)[:, None] * N",
            ),
        ),
    ),
    Patch(
        "B063",
        "one_global_scale_for_both_halves",
        "https://github.com/sgl-project/sglang/pull/32430",
        ("constant_factor", "unexplained", "precision"),
        "w13's two halves were quantised apart, and the gate's global scale is applied to both.",
        (("column = tl.where(n < half, 0, FACTORS - 1)", "column = tl.where(n < half, 0, 0)"),),
    ),
    Patch(
        "B199",
        "e4m3_scale_overflow_to_nan",
        "https://github.com/NVIDIA/Model-Optimizer/pull/1397",
        ("non_finite",),
        "A block scale at the end of E4M3's range is read as NaN.",
        (
            (
                "bits = tl.where(mag == 127, 0x7FC00000, bits)\n    return (bits | ((code & 128)",
                "bits = tl.where(mag >= 96, 0x7FC00000, bits)\n    return (bits | ((code & 128)",
            ),
        ),
    ),
    Patch(
        "B228",
        "nibbles_exchanged",
        "https://github.com/NVIDIA/Megatron-LM/issues/7576",
        ("column_permutation", "unexplained"),
        "The two 4-bit codes of a byte are taken in the other order.",
        ((">> ((k & 1) * 4)[:, None])", ">> (4 - (k & 1) * 4)[:, None])"),),
    ),
)

FAULTS = tuple(patch.fault for patch in PATCHES)
