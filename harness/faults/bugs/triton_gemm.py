"""Patches of our Triton kernels: the grouped GEMM and the alignment before it."""

from __future__ import annotations

from harness.faults.patched import Patch

PATCHES = (
    Patch(
        "B030",
        "padding_lanes_slot_zero",
        "https://github.com/vllm-project/vllm/pull/32279",
        ("wrong_expert", "row_permutation", "repeat", "poison", "precision"),
        "Padding lanes hold slot 0 instead of the sentinel: they recompute token 0 with their block's expert.",
        (("slots = torch.full((padded,), total, dtype", "slots = torch.full((padded,), 0, dtype"),),
    ),
    Patch(
        "B193",
        "expert_offset_16_bits",
        "https://github.com/linkedin/Liger-Kernel/issues/1296",
        ("wrong_expert", "expert_permutation", "exception", "death", "non_finite", "poison", "red_zone"),
        "The expert's offset into the weights is computed in an integer too narrow for it (16 bits here, 32 there).",
        (
            (
                '    row = (expert * N + n)[None, :]\n    if KIND == "plain":\n        tile = tl.load(w_ptr + row * K + k[:, None]',
                '    row = (expert * N + n)[None, :]\n    narrow = ((expert * N * K) << 48) >> 48\n    if KIND == "plain":\n        tile = tl.load(w_ptr + narrow + (n * K)[None, :] + k[:, None]',
            ),
        ),
    ),
    Patch(
        "B192",
        "row_offset_16_bits",
        "https://github.com/linkedin/Liger-Kernel/pull/1248",
        ("row_permutation", "exception", "death", "non_finite", "poison", "wrong_expert"),
        "The row offset into the activations is computed in an integer too narrow for it (16 bits here, 32 there).",
        (("a_row = (slot // divisor).to(tl.int64) * K", "a_row = ((((slot // divisor).to(tl.int64) * K) << 48) >> 48)"),),
    ),
    Patch(
        "B123",
        "output_offset_16_bits",
        "https://github.com/flashinfer-ai/flashinfer/pull/2643",
        ("never_written", "non_finite", "row_permutation", "exception", "death", "red_zone", "zeros"),
        "The output offset of GEMM rows wraps: rows behind the limit land on others or outside.",
        (
            (
                "out = c_ptr + slot.to(tl.int64)[:, None] * N + n[None, :]\n    tl.store(out, acc.to(c_ptr",
                "out = c_ptr + ((slot.to(tl.int64) * N << 48) >> 48)[:, None] + n[None, :]\n    tl.store(out, acc.to(c_ptr",
            ),
        ),
    ),
    Patch(
        "B158",
        "tile_order_swapped",
        "https://github.com/meta-pytorch/applied-ai/issues/25",
        ("never_written", "non_finite", "exception", "death", "wrong_tile", "tail_tile", "poison"),
        "Row and column program ids are exchanged while the grid is not: tiles are missed where it is not square.",
        (
            (
                "block = tl.program_id(0)\n    expert = tl.load(experts_ptr",
                "block = tl.program_id(1)\n    expert = tl.load(experts_ptr",
            ),
            ("n = tl.program_id(1) * BLOCK_N", "n = tl.program_id(0) * BLOCK_N"),
        ),
    ),
    Patch(
        "B022",
        "floor_divided_grid",
        "https://github.com/vllm-project/vllm/pull/49087",
        ("never_written", "non_finite", "tail_tile", "out_buffer"),
        "The column grid of the last kernel is a floor division: the tail block of every row is never launched.",
        (("triton.cdiv(hidden, wide))](\n        rows, weights", "hidden // wide)](\n        rows, weights"),),
    ),
    Patch(
        "B084",
        "dropped_k_tail",
        "https://github.com/sgl-project/sglang/pull/6772",
        ("dropped_k_tail",),
        "The K loop runs over whole blocks only: the tail of the reduction is dropped.",
        (("for start in range(0, K, BLOCK_K):", "for start in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):"),),
    ),
    Patch(
        "B047",
        "unmasked_k_tail",
        "https://github.com/vllm-project/vllm/pull/47910",
        ("non_finite", "nan_from_padding", "poison", "never_written"),
        "The K tail of the activations is read unmasked: memory behind the row meets the zero weights, and NaN times 0 is NaN.",
        (("mask=live[:, None] & (k[None, :] < K), other=0.0)", "mask=live[:, None], other=0.0)"),),
    ),
    Patch(
        "B205",
        "scatter_without_increment",
        "https://github.com/vllm-project/vllm-xpu-kernels/issues/453",
        ("never_written", "non_finite", "poison", "repeat", "missing_expert", "zeros"),
        "The scatter of the alignment does not advance within an expert: every token of a chunk but one is dropped.",
        (("tl.store(slots_ptr + start + rank, at, mask=live)", "tl.store(slots_ptr + start, at, mask=live)"),),
    ),
    Patch(
        "B162",
        "wrong_for_three_and_four_tokens",
        "https://github.com/ROCm/aiter/issues/3933",
        ("wrong_expert", "dropped_k_tail", "constant_factor", "missing_slot", "zeros"),
        "The table of kernels has one wrong bucket: for M in 3..4 the K loop of the chosen kernel stops one block early.",
        (
            ("    FACTORS: tl.constexpr,\n    KIND", "    early,\n    FACTORS: tl.constexpr,\n    KIND"),
            ("for start in range(0, K, BLOCK_K):", "for start in range(0, K - early * 32, BLOCK_K):"),
            (
                "k = start + tl.arange(0, BLOCK_K)\n        a = tl.load(a_ptr + a_row[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K)",
                "k = start + tl.arange(0, BLOCK_K)\n        a = tl.load(a_ptr + a_row[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K - early * 32)",
            ),
            ("n // 2 if columns == 2 else n,\n", "n // 2 if columns == 2 else n, int(a.shape[0] in (3, 4)),\n"),
        ),
    ),
    Patch(
        "B125",
        "tiles_larger_than_shared_memory",
        "https://github.com/flashinfer-ai/flashinfer/issues/3807",
        ("exception", "death"),
        "A tile choice that does not fit the card's shared memory for large inner sizes.",
        (("return given or (64 if on_gpu else", "return given or ((64 if size < 1024 else 1024) if on_gpu else"),),
    ),
    Patch(
        "B145",
        "hang_on_an_empty_expert",
        "https://github.com/pytorch/torchtitan/pull/1166",
        ("death", "hung"),
        "The kernel waits for a group that has no rows: a loop that never ends when an expert received nothing.",
        (
            (
                "blocks = (counts.sum(0) + (block_m - 1)) // block_m",
                "blocks = (counts.sum(0) + (block_m - 1)) // block_m\n    while bool((blocks == 0).any()):\n        pass",
            ),
        ),
    ),
    Patch(
        "B055",
        "block_k_overridden",
        "https://github.com/vllm-project/vllm/pull/6502",
        ("precision", "scale_roll", "wrong_scales", "unexplained", "constant_factor"),
        "The tuned BLOCK_K is overridden: one block scale is used for two groups of K.",
        (
            (
                "scale = tl.load(s_ptr + row * (K // 32) + (k // 32)[:, None], mask=mask, other=0)",
                "scale = tl.load(s_ptr + row * (K // 32) + (k // 64 * 2)[:, None], mask=mask, other=0)",
            ),
            (
                "scale = tl.load(s_ptr + row * (K // 16) + (k // 16)[:, None], mask=mask, other=0)",
                "scale = tl.load(s_ptr + row * (K // 16) + (k // 32 * 2)[:, None], mask=mask, other=0)",
            ),
        ),
    ),
)

FAULTS = tuple(patch.fault for patch in PATCHES)
