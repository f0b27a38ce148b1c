"""The acceptance rules in use, as data: what FlashInfer, vLLM, DeepGEMM, AITER, triton_kernels and PyTorch call right.

Compiled from the tests of FlashInfer fb28d724, vLLM 0.33.0, flashinfer-bench 40e6ca78, DeepGEMM 54e2261, AITER 029455b4.
None of them decides a verdict here. Where a source gives one number for a tolerance, it is both atol and rtol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Accepts = Callable[[Tensor, Tensor, Tensor | None], bool]
SAME_TOL, SAME_SMALL = 1e-4, 1000  # torch same(): default tol; below so many elements the multiplier is 3, not 2
TINY = 1e-30  # triton_kernels assert_close: keeps the norm of an all-zero reference above zero
BENCH_TINY = 1e-8  # flashinfer-bench compute_error_stats: the same for a relative error


@dataclass(frozen=True)
class Rule:
    """`accepts(got, reference, baseline)`: got, reference float64 [tokens, hidden]; baseline: what a plain implementation
    in the output dtype writes, float64, for the rules that measure against its error. source: file or thread."""

    name: str
    source: str
    accepts: Accepts
    needs_baseline: bool = False


def matched(got: Tensor, reference: Tensor, atol: float, rtol: float, of: str = "reference") -> Tensor:
    """bool [tokens, hidden]: |got - reference| <= atol + rtol * |reference| (`of` "got": of |got|); false for NaN."""
    base = got if of == "got" else reference
    return (got == reference) | (((got - reference).abs() <= atol + rtol * base.abs()) & got.isfinite())


def close(atol: float, rtol: float, percent: float = 1.0, of: str = "reference") -> Accepts:
    """At least the share `percent` of the elements within atol + rtol * |reference|: torch.isclose's formula."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        return float(matched(got, reference, atol, rtol, of).double().mean()) >= percent

    return accepts


def finite_close(atol: float, rtol: float, percent: float, of: str = "got") -> Accepts:
    """FlashInfer's check_accuracy(reference, actual): `close`, with any value not finite an error. Its isclose is called
    with the kernel's output second, so the relative part grows with the *output*."""
    inner = close(atol, rtol, percent, of)

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        return bool(got.isfinite().all()) and inner(got, reference, baseline)

    return accepts


def cosine(least: float) -> Accepts:
    """Cosine of the two outputs as one vector each, above `least`; NaN (a zero vector) is a refusal."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        norm = got.norm() * reference.norm()
        return bool(norm > 0) and float((got * reference).sum() / norm) > least

    return accepts


def every(*parts: Accepts) -> Accepts:
    """All of them accept."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        return all(part(got, reference, baseline) for part in parts)

    return accepts


def fuzzer(atol_fraction: float, rtol: float) -> Accepts:
    """atol = fraction * max|reference| + 1e-3, every element: the unified fuzzer's bar."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        atol = atol_fraction * float(reference.abs().max()) + 1e-3
        return bool(matched(got, reference, atol, rtol).all())

    return accepts


def bench(atol: float, rtol: float, percent: float) -> Accepts:
    """An element is wrong only if the absolute *and* the relative error are too large."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        error = (got - reference).abs()
        wrong = (error > atol) & (error / (reference.abs() + BENCH_TINY) > rtol)
        return bool(got.isfinite().all()) and 1 - float(wrong.double().mean()) >= percent

    return accepts


def calc_diff(limit: float) -> Accepts:
    """1 - 2 <x, y> / (|x|^2 + |y|^2) < limit, over the whole output."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        return bool(1 - 2 * (got * reference).sum() / (got.square() + reference.square()).sum() < limit)

    return accepts


def max_and_rms(maxtol: float, rmstol: float) -> Accepts:
    """e = |got - reference| / max(rms(reference), |reference|): its maximum and its root mean square."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        rms = reference.square().mean().sqrt() + TINY
        relative = (got - reference).abs() / torch.maximum(rms, reference.abs())
        return bool(relative.max() <= maxtol) and bool(relative.square().mean().sqrt() <= rmstol)

    return accepts


def same(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
    """torch._dynamo.utils.same: close to the baseline, or rmse to float64 <= multiplier * the baseline's + tol / 10."""
    assert baseline is not None
    if bool(matched(got, baseline, SAME_TOL, SAME_TOL).all()):
        return True
    multiplier = 3.0 if reference.numel() < SAME_SMALL else 2.0
    allowed = multiplier * _rmse(baseline, reference) + SAME_TOL / 10
    return _rmse(got, reference) <= allowed


def twice_the_worst(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
    """FlashAttention: max error <= 2 * the plain implementation's max error + 1e-5."""
    assert baseline is not None
    return bool((got - reference).abs().max() <= 2 * (baseline - reference).abs().max() + 1e-5)


def catastrophic(inner: Accepts) -> Accepts:
    """AITER's catastrophic_check=True beside `inner`: finite, and max error <= 0.5 * max(max|reference|, 1)."""

    def accepts(got: Tensor, reference: Tensor, baseline: Tensor | None) -> bool:
        cap = 0.5 * max(float(reference.abs().max()), 1.0)
        whole = bool(got.isfinite().all()) and float((got - reference).abs().max()) <= cap
        return whole and inner(got, reference, baseline)

    return accepts


def _rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


_FI, _VLLM, _AITER = "FlashInfer tests/moe", "vLLM tests/kernels/moe", "AITER aiter/test_common.py checkAllclose"
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("flashinfer_fp4", f"{_FI}/test_trtllm_gen_fused_moe.py (fp4, fp8 tensor)", finite_close(0.1, 0.85, 0.92)),
        Rule("flashinfer_bf16", f"{_FI}/test_trtllm_gen_fused_moe.py (bf16, mxint4)", finite_close(0.1, 0.85, 0.925)),
        Rule("flashinfer_fp8_block", f"{_FI}/test_trtllm_gen_fused_moe.py (fp8 block)", finite_close(0.1, 0.85, 0.79)),
        Rule("flashinfer_fp8_080", "flashinfer-bench PR #178, table of FlashInfer's own bars", finite_close(0.1, 0.85, 0.80)),
        Rule("flashinfer_dpsk", f"{_FI}/test_dpsk_fused_moe_fp8.py", finite_close(0.1, 0.2, 0.85)),
        Rule("flashinfer_unified_fp8", f"{_FI}/test_unified_moe_fp8.py", finite_close(0.05, 0.3, 0.99)),
        Rule("flashinfer_fuzz_nvfp4", f"{_FI}/test_unified_moe_fuzz.py (NVFP4)", fuzzer(0.15, 0.1)),
        Rule("flashinfer_fuzz_fp8", f"{_FI}/test_unified_moe_fuzz.py (fp8 variants)", fuzzer(0.15, 0.85)),
        Rule("flashinfer_fuzz_bf16", f"{_FI}/test_unified_moe_fuzz.py (bf16)", fuzzer(0.05, 0.05)),
        Rule("flashinfer_cutlass_bf16", f"{_FI}/test_trtllm_cutlass_fused_moe.py (bf16)", close(1e-2, 1e-2)),
        Rule("flashinfer_cutlass_fp8", f"{_FI}/test_trtllm_cutlass_fused_moe.py (fp8, mxfp)", close(1e-1, 1e-1)),
        Rule("flashinfer_cutlass_nvfp4", f"{_FI}/test_trtllm_cutlass_fused_moe.py (nvfp4)", close(2e-1, 2e-1)),
        Rule("flashinfer_replay", "FlashInfer flashinfer replay, _compare_results", close(1e-3, 1e-3)),
        Rule("flashinfer_bench_moe", "flashinfer-bench evaluators/lowbit.py", bench(0.01, 0.01, 0.95)),
        Rule("deepgemm_fp8", "DeepGEMM tests/test_fp8.py calc_diff", calc_diff(1e-3)),
        Rule("deepgemm_fp8_fp4", "DeepGEMM tests/test_fp8.py calc_diff, fp8 x fp4", calc_diff(1e-2)),
        Rule("deepgemm_fp4", "DeepGEMM tests/test_fp8.py calc_diff, fp4", calc_diff(2e-2)),
        Rule("torch_same", "torch/_dynamo/utils.py same(), multiplier 2", same, needs_baseline=True),
        Rule("torch_assert_close_bf16", "torch.testing.assert_close defaults of bf16", close(1e-5, 1.6e-2)),
        Rule("triton_kernels", "triton_kernels/testing.py assert_close", max_and_rms(2e-2, 4e-3)),
        Rule("flash_attention", "FlashAttention tests, quoted in its issue #1849", twice_the_worst, needs_baseline=True),
        Rule("kernelbench", "KernelBench issue #165", close(1e-2, 1e-2)),
        Rule("aiter_ratio", f"{_AITER}, tol_err_ratio 0.05", close(1e-2, 1e-2, 0.95)),
        Rule("aiter_ratio_catastrophic", f"{_AITER}, catastrophic_check", catastrophic(close(1e-2, 1e-2, 0.95))),
        Rule("vllm_cutedsl_masked", f"{_VLLM}/test_cutedsl_moe.py", close(0.2, 0.2)),
        Rule("vllm_nvfp4", f"{_VLLM}/test_nvfp4_moe.py, test_flashinfer_moe.py", close(0.1, 0.1, of="got")),
        Rule("vllm_cutedsl_nvfp4", f"{_VLLM}/test_flashinfer_cutedsl_nvfp4_moe.py", every(close(3e-2, 0.2), cosine(0.99))),
        Rule("vllm_trtllm_nvfp4", f"{_VLLM}/test_trtllm_nvfp4_moe.py", every(close(0.2, 0.2), cosine(0.99))),
        Rule("vllm_b12x", f"{_VLLM}/test_b12x.py", every(close(0.2, 0.2), cosine(0.99))),
        Rule("vllm_trtllm_bf16", f"{_VLLM}/test_trtllm_bf16_moe.py", close(0.1, 0.2)),
        Rule("vllm_mxint4", f"{_VLLM}/test_marlin_vs_trtllm_mxint4.py, against bf16", close(0.3, 1.0)),
        Rule("vllm_mxint4_pair", f"{_VLLM}/test_marlin_vs_trtllm_mxint4.py, kernel against kernel", close(0.3, 6.0)),
        Rule("vllm_modular", f"{_VLLM}/test_modular_kernel_combinations.py", close(3e-2, 3e-2)),
        Rule("vllm_modular_fp4", f"{_VLLM}/test_modular_kernel_combinations.py (fp4)", close(0.1, 0.2)),
        Rule("vllm_moe", f"{_VLLM}/test_moe.py (Triton)", close(2e-2, 0.0)),
        Rule("vllm_marlin", f"{_VLLM}/test_moe.py (Marlin, the widest of 4e-2, 5e-2, 1e-1)", close(1e-1, 0.0)),
        Rule("vllm_batched", f"{_VLLM}/test_batched_moe.py (fp8)", close(6e-2, 6e-2)),
        Rule("vllm_block_fp8", f"{_VLLM}/test_block_fp8.py", close(0.035, 0.035)),
        Rule("vllm_block_int8", f"{_VLLM}/test_block_int8.py", close(0.065, 0.065)),
        Rule("vllm_cutlass_fp8", f"{_VLLM}/test_cutlass_moe.py", close(5.5e-2, 1e-2)),
        Rule("vllm_cutlass_w4a8", f"{_VLLM}/test_cutlass_moe.py (W4A8)", close(9e-2, 1e-2)),
        Rule("vllm_layer_bf16", f"{_VLLM}/test_moe_layer.py (bf16)", close(3.5e-2, 7.6e-2)),
        Rule("vllm_layer_fp4", f"{_VLLM}/test_moe_layer.py (fp4, k 2048)", close(0.3048, 0.3048)),
        Rule("vllm_ocp_mx", f"{_VLLM}/test_ocp_mx_moe.py", finite_close(0.0, 0.3, 0.8)),
        Rule("vllm_flashinfer", f"{_VLLM}/test_flashinfer.py", finite_close(0.1, 0.85, 0.925)),
        Rule("vllm_deepgemm_fp4", f"{_VLLM}/test_deepgemm.py (fp4)", calc_diff(0.05)),
        Rule("vllm_gpt_oss", f"{_VLLM}/test_gpt_oss_triton_kernels.py", max_and_rms(2.5e-2, 5e-3)),
    )
}


def verdicts(
    got: Tensor, expected_value: Tensor, baseline: Tensor | None = None, rules: Iterable[Rule] = RULES.values()
) -> dict[str, bool]:
    """Rule name -> accepted. got [tokens, hidden] in any float dtype; expected_value float64; baseline in any float dtype:
    without one the rules that need it are left out. ValueError for an empty output, of which no rule says anything."""
    if got.shape != expected_value.shape or not got.numel():
        raise ValueError(f"shapes {tuple(got.shape)} and {tuple(expected_value.shape)}: wanted equal ones with elements")
    plain = None if baseline is None else baseline.double()
    chosen = [rule for rule in rules if plain is not None or not rule.needs_baseline]
    return {rule.name: rule.accepts(got.double(), expected_value, plain) for rule in chosen}
