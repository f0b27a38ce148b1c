"""DeepGEMM as the vLLM wheel bundles it: FP8 grouped GEMMs on a list padded to blocks (contiguous) or on slabs (masked)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import pack
from harness.backends._slabs import Places, in_blocks, in_slabs
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.inputs import Inputs
from reference.rounding import Rounding

MODULE = "vllm.third_party.deep_gemm"
CONTIGUOUS, MASKED = f"{MODULE}.m_grouped_fp8_gemm_nt_contiguous", f"{MODULE}.m_grouped_fp8_gemm_nt_masked"
QUANTISE = f"{_vllm.QUANT_UTILS}.fp8_utils.per_token_group_quant_fp8"
ACTIVATE = f"{_vllm.FUSED_MOE}.activation.apply_moe_activation"
GROUP = 128
BLOCK_M = 128  # rows: get_mk_alignment_for_contiguous_layout() on SM90. A tile that ends beyond a slab writes into the next
# expert's (scheduler.cuh: masked "must be aligned"); slabs of 33 or 63 rows gave NaN and other bits each time on an H200


def rounding(case: Case) -> Rounding:
    """Both GEMMs write bf16; activations quantised by vLLM's op with plain fp32 scales; weighted and added in fp32."""
    return Rounding(
        x="fp8_group:vllm",
        gate_up="bf16",
        activated=_vllm.halves(case),
        middle="bf16>fp8_group:vllm",
        row="bf16",
        out="bf16",
        accumulate="hopper_fp8",
    )


def prepare(case: Case, inputs: Inputs, masked: bool = False) -> Launch:
    """w13 [experts, 2 * inter, hidden] and w2 in E4M3, scales float32 [experts, rows / 128, columns / 128]."""
    w13, w2 = pack(case, inputs)
    assert w13.scales is not None
    assert w2.scales is not None
    buffers = {**_vllm.step(inputs), "w13": w13.data.view(torch.float8_e4m3fn), "w2": w2.data.view(torch.float8_e4m3fn)}
    buffers |= {"w13_scales": w13.scales, "w2_scales": w2.scales}
    gemm = masked_gemm(case, buffers) if masked else contiguous_gemm(buffers)
    return Launch(layer(case, buffers, gemm, masked), buffers, contract=_vllm.contract(case))


Gemm = Callable[[Tensor, Tensor, str, Places], Tensor]


def layer(case: Case, b: dict[str, Tensor], gemm: Gemm, masked: bool) -> Callable[[], Tensor]:
    """Quantise, spread, GEMM, activate, quantise, GEMM, weighted sum."""
    shape, quantise, activate = case.shape, _vllm.library(QUANTISE), _vllm.library(ACTIVATE)
    activation = _vllm.activation(case)

    def call() -> Tensor:
        places = in_slabs(b["ids"], shape.experts, slab(case)) if masked else in_blocks(b["ids"], shape.experts, BLOCK_M)
        x, scale = quantise(b["x"].contiguous(), GROUP, use_ue8m0=False)
        pre = gemm(places.spread(x), places.spread(scale), "w13", places)
        middle = pre.new_empty((len(pre), shape.inter))
        activate(activation, middle, pre)
        narrow, scale = quantise(middle, GROUP, use_ue8m0=False)
        return places.gathered(gemm(narrow, scale, "w2", places), b["topk_weights"])

    return call


def contiguous_gemm(b: dict[str, Tensor]) -> Gemm:
    """rows [size, K] and scales [size, K / 128] of a list whose blocks of 128 rows belong to one expert each."""
    kernel = _vllm.library(CONTIGUOUS)

    def gemm(rows: Tensor, scale: Tensor, name: str, places: Places) -> Tensor:
        weights = b[name]
        out = rows.new_empty((len(rows), weights.shape[1]), dtype=torch.bfloat16)
        kernel((rows, scale), (weights, b[f"{name}_scales"]), out, places.owner, disable_ue8m0_cast=True)
        return out

    return gemm


def slab(case: Case) -> int:
    """Rows of an expert's slab: room for every token, in whole tiles."""
    return -(-case.shape.tokens // BLOCK_M) * BLOCK_M


def masked_gemm(case: Case, b: dict[str, Tensor]) -> Gemm:
    """The same on slabs [experts, rows, K] with the count of live rows; the expected count only steers the tile choice."""
    kernel, shape = _vllm.library(MASKED), case.shape
    expected = max(1, shape.tokens * shape.top_k // shape.experts)

    def gemm(rows: Tensor, scale: Tensor, name: str, places: Places) -> Tensor:
        weights, slabs = b[name], (shape.experts, slab(case), -1)
        out = rows.new_empty((shape.experts, slab(case), weights.shape[1]), dtype=torch.bfloat16)
        kernel(
            (rows.view(slabs), scale.view(slabs)),
            (weights, b[f"{name}_scales"]),
            out,
            places.counts,
            expected,
            disable_ue8m0_cast=True,
        )
        return out.view(len(rows), -1)

    return gemm


def _backend(name: str, masked: bool) -> Backend:
    entry = MASKED if masked else CONTIGUOUS
    exempt = {"duplicate_expert": "a slab has room for each token once"} if masked else {}
    return Backend(
        name=name,
        library="vllm",
        deterministic=True,
        recipes=("fp8_block-fp8_group",),
        activations=_vllm.PLAIN_HALVES,  # SWIGLUOAI alternates rows of w13 that share a scale
        archs=("sm90",),
        rounding=rounding,
        probe=_vllm.needs(entry, QUANTISE, ACTIVATE),
        limits=(_vllm.SOME_TOKENS,),
        prepare=lambda case, inputs: prepare(case, inputs, masked),
        activation_format="batched" if masked else "standard",
        exempt=exempt,
        entries=(entry, QUANTISE, ACTIVATE),
        summary=f"DeepGEMM's {'masked' if masked else 'contiguous'} grouped FP8 GEMM, as vLLM bundles it (JIT by nvcc)",
    )


BACKENDS = (_backend("vllm_deepgemm", False), _backend("vllm_deepgemm_masked", True))
