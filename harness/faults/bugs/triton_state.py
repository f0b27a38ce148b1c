"""Patches of our Triton kernels: what a call leaves behind and returns."""

from __future__ import annotations

from harness.faults.patched import Patch

PATCHES = (
    Patch(
        "B220",
        "returns_a_kept_workspace",
        "https://github.com/SJTU-DENG-Lab/Diffulex/pull/37",
        ("aliasing", "next_step", "stale"),
        "The result is a view of a buffer that the next call of the same shape overwrites.",
        (
            (
                "    out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)\n    tall, wide = (4, 256) if rows.is_cuda else (64,",
                "    out = KEPT.setdefault((tokens, hidden, rows.dtype), torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device))\n    tall, wide = (4, 256) if rows.is_cuda else (64,",
            ),
            ("CHUNK = 64  #", "KEPT = {}\nCHUNK = 64  #"),
        ),
    ),
    Patch(
        "B018",
        "writes_into_its_input",
        "https://github.com/vllm-project/vllm/pull/28942",
        ("input_mutated",),
        "The layer's result is written into the activations that the caller still needs.",
        (
            (
                "    return finalize(grouped_gemm(middle, w2, routed, 1, tiles), weights, ids, experts)",
                "    x.copy_(finalize(grouped_gemm(middle, w2, routed, 1, tiles), weights, ids, experts))\n    return x.clone()",
            ),
        ),
    ),
    Patch(
        "B120",
        "weights_cached_by_shape",
        "https://github.com/flashinfer-ai/flashinfer/pull/3066",
        ("other_weights", "stale", "wrong_expert", "expert_permutation", "constant_factor"),
        "Prepared factors are cached by shape: another layer of the same shapes gets the first one's.",
        (
            (
                "factors, columns = weights.factors.contiguous().to(torch.float32), weights.factors.shape[1]",
                "factors = KEPT.setdefault(weights.shape(), weights.factors.contiguous().to(torch.float32))\n        columns = weights.factors.shape[1]",
            ),
            ("CHUNK = 64  #", "KEPT = {}\nCHUNK = 64  #"),
        ),
    ),
    Patch(
        "B118",
        "stride_of_the_input_ignored",
        "https://github.com/flashinfer-ai/flashinfer/pull/4713",
        ("strided_inputs",),
        "The kernel indexes the activations as if they were contiguous; a slice of a wider tensor is misread.",
        (("        a.contiguous(), data,", "        a, data,"),),
    ),
    Patch(
        "B003",
        "returns_a_list",
        "https://github.com/vllm-project/vllm/pull/39315",
        ("output_type",),
        "The entry point returns a list where a tensor was promised.",
        (
            (
                "    return finalize(grouped_gemm(middle, w2, routed, 1, tiles), weights, ids, experts)",
                "    return [finalize(grouped_gemm(middle, w2, routed, 1, tiles), weights, ids, experts)]",
            ),
        ),
    ),
    Patch(
        "B061",
        "zero_tokens_refused",
        "https://github.com/sgl-project/sglang/issues/38773",
        ("exception", "output_shape"),
        "A batch of no tokens is refused instead of giving [0, hidden].",
        (
            (
                "    if routed.slots.numel() == 0 or x.numel() == 0:\n        return torch.zeros_like(x)\n",
                '    if routed.slots.numel() == 0 or x.numel() == 0:\n        raise RuntimeError("null pointer for the activations")\n',
            ),
        ),
    ),
    Patch(
        "B174",
        "output_in_float32",
        "https://github.com/ROCm/TransformerEngine/pull/161",
        ("output_dtype",),
        "The output's dtype is the accumulator's.",
        (
            (
                "out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)\n    tall, wide = (4, 256) if rows.is_cuda else (64,",
                "out = torch.empty((tokens, hidden), dtype=torch.float32, device=rows.device)\n    tall, wide = (4, 256) if rows.is_cuda else (64,",
            ),
        ),
    ),
    Patch(
        "B160",
        "id_beyond_the_experts",
        "https://github.com/ROCm/aiter/pull/2478",
        ("exception", "death", "non_finite", "wrong_expert", "expert_permutation", "poison", "red_zone"),
        "Expert ids are global where local ones are due: the block's expert lies beyond the weights.",
        (("expert = tl.load(experts_ptr + block).to(tl.int64)", "expert = tl.load(experts_ptr + block).to(tl.int64) + 1"),),
    ),
)

FAULTS = tuple(patch.fault for patch in PATCHES)
