"""FlashInfer's CuTe-DSL NVFP4 experts over batched tokens: quantise slabs, masked grouped GEMM, silu and quantise, GEMM.

The slabs [experts, rows, hidden] and the combine are torch, as vLLM's batched prepare and finalise are. A slab has as many
rows as the fullest expert; what lies beyond masked_m[e] was never written. gate rows above up rows, scales in the MMA view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.backends._cutedsl import CONVERT, FP4_TMA, alphas, mma_scales
from harness.backends._packing import pack
from harness.backends.base import Backend, Device, Launch, Support
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument, Entry
from harness.inputs import Inputs
from reference.rounding import Rounding

QUANTIZE = "flashinfer.scaled_fp4_grouped_quantize"
ACTIVATE = "flashinfer.silu_and_mul_scaled_nvfp4_experts_quantize"
GEMMS = ("flashinfer.gemm.grouped_gemm_nt_masked", "flashinfer.cute_dsl.blockscaled_gemm.grouped_gemm_nt_masked")
BLOCK = 16
FLOAT16 = (torch.bfloat16, torch.float16)
QUANTISER = (  # fp4Quantize.cpp counts the experts by a_global_sf
    Argument("a", FLOAT16, ("experts", "rows", "k"), contiguous=True),
    Argument("mask", torch.int32, ("experts",), contiguous=True),
    Argument("a_global_sf", torch.float32, ("experts",), contiguous=True),
)
SCALES = (torch.uint8, torch.float8_e4m3fn)
GEMM = (
    Argument("a", torch.uint8, ("m", "k / 2", "experts")),
    Argument("a_sf", SCALES, (32, 4, "m tiles", 4, "k tiles", "experts")),
    Argument("b", torch.uint8, ("n", "k / 2", "experts")),
    Argument("b_sf", SCALES, (32, 4, "n tiles", 4, "k tiles", "experts")),
    Argument("out", FLOAT16, ("m", "n", "experts"), written=True),
    Argument("masked_m", torch.int32, ("experts",)),
    Argument("alpha", torch.float32, (1, 1, "experts")),
)
Empty = Callable[..., Tensor]


def probe(device: Device) -> Support:
    """The quantisers, the scale helper, and the GEMM under its new name or the one it had up to 0.7."""
    answer = needs(QUANTIZE, ACTIVATE, CONVERT)(device)
    return answer if not answer.ok or needs(GEMMS[0])(device).ok else needs(GEMMS[1])(device)


@dataclass(frozen=True)
class Slabs:
    """Where the slots of this rank's experts lie: slot s (token * top_k + k) is row `row` of expert `owner`; masked_m int32
    [experts]; capacity: rows of a slab."""

    slot: Tensor
    owner: Tensor
    row: Tensor
    masked_m: Tensor
    capacity: int


def dispatch(ids: Tensor, local: range) -> Slabs:
    """ids [tokens, top_k] to the slabs of the experts `local`; other ranks' slots go nowhere."""
    key = ids.flatten().long() - local.start
    key = torch.where((key >= 0) & (key < len(local)), key, len(local))
    counts = torch.bincount(key, minlength=len(local) + 1)[: len(local)]
    slot = key.argsort(stable=True)[: int(counts.sum())]
    owner = key[slot]
    row = torch.arange(len(slot), device=ids.device) - (counts.cumsum(0) - counts)[owner]
    return Slabs(slot, owner, row, counts.to(torch.int32), max(1, int(counts.max())))


@dataclass(frozen=True)
class Functions:
    """The library's functions, each behind its contract."""

    quantize: Callable[..., Any]
    activate: Callable[..., Any]
    gemm: Callable[..., Any]

    @classmethod
    def of(cls, device: str) -> Functions:
        """As this release has them."""
        try:
            grouped = resolve(GEMMS[0], device)
        except (ImportError, AttributeError):
            grouped = resolve(GEMMS[1], device)

        def gemm(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, **given: Any) -> None:
            names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
            kinds = {"ab_dtype": "float4_e2m1fn", "sf_dtype": "float8_e4m3fn", "sf_vec_size": BLOCK, "alpha_dtype": "float32"}
            grouped((a, a_sf), (b, b_sf), **given, c_dtype=names[given["out"].dtype], **kinds)

        quantize, activate = (Entry(resolve(name, device), QUANTISER) for name in (QUANTIZE, ACTIVATE))
        return cls(quantize, activate, Entry(gemm, GEMM))


def masked_experts(functions: Functions, b: dict[str, Tensor], slabs: Tensor, masked_m: Tensor, out: Tensor) -> None:
    """vLLM's flashinfer_cutedsl_moe_masked: slabs [experts, rows, hidden] through both GEMMs into `out`, shaped alike; the
    rows from masked_m on are neither read nor written."""
    experts, rows, _ = slabs.shape
    a, a_sf = functions.quantize(slabs, masked_m, b["a1_gscale"])
    pre = torch.empty((experts, rows, b["w1"].shape[1]), dtype=slabs.dtype, device=slabs.device)
    functions.gemm(
        a, a_sf, b["w1"].permute(1, 2, 0), b["w1_sf"], out=pre.permute(1, 2, 0), masked_m=masked_m, alpha=b["w1_alpha"]
    )
    a, a_sf = functions.activate(pre, masked_m, b["a2_gscale"])
    functions.gemm(
        a, a_sf, b["w2"].permute(1, 2, 0), b["w2_sf"], out=out.permute(1, 2, 0), masked_m=masked_m, alpha=b["w2_alpha"]
    )


def prepare(case: Case, inputs: Inputs, empty: Empty = torch.empty) -> Launch:
    """Bind the pipeline to the packed weights; `empty` makes the buffer that GEMM 2 writes."""
    buffers, functions, local = _buffers(case, inputs), Functions.of(inputs.device), inputs.local

    def call() -> Tensor:
        x, weights = buffers["x"], buffers["topk_weights"]
        placed = dispatch(buffers["ids"], local)
        slabs = torch.empty((len(local), placed.capacity, x.shape[1]), dtype=x.dtype, device=x.device)
        slabs[placed.owner, placed.row] = x[placed.slot // case.shape.top_k]
        rows = empty(slabs.shape, dtype=x.dtype, device=x.device)
        masked_experts(functions, buffers, slabs, placed.masked_m, rows)
        weighted = rows[placed.owner, placed.row].float() * weights.flatten()[placed.slot, None]
        by_slot = torch.zeros((weights.numel(), x.shape[1]), device=x.device).index_copy_(0, placed.slot, weighted)
        return by_slot.view(*weights.shape, x.shape[1]).sum(1).to(x.dtype)

    contract = (
        Argument("x", FLOAT16, ("tokens", "hidden")),
        Argument("ids", torch.int64, ("tokens", "top_k")),
        Argument("topk_weights", torch.float32, ("tokens", "top_k")),
    )
    return Launch(call, buffers, contract=contract)


def _buffers(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    w13, w2 = pack(case, inputs, one_factor=True)
    experts, device = len(inputs.local), inputs.x.device
    x_scale, middle_scale = inputs.x_scale, inputs.middle_scale
    assert x_scale is not None
    assert middle_scale is not None
    return {
        "x": inputs.x,
        "ids": inputs.topk_ids,
        "topk_weights": inputs.topk_weights,
        "w1": w13.data,
        "w1_sf": mma_scales(w13, BLOCK, inputs.device).view(torch.float8_e4m3fn),
        "w1_alpha": alphas(w13, x_scale).view(1, 1, experts),
        "w2": w2.data,
        "w2_sf": mma_scales(w2, BLOCK, inputs.device).view(torch.float8_e4m3fn),
        "w2_alpha": alphas(w2, middle_scale).view(1, 1, experts),
        "a1_gscale": torch.full((experts,), x_scale, dtype=torch.float32, device=device),
        "a2_gscale": torch.full((experts,), middle_scale, dtype=torch.float32, device=device),
    }


def rounding(case: Case) -> Rounding:
    """GEMM 1 writes x's type, silu * up is rounded to it before it is quantised, GEMM 2 writes it."""
    out, middle = case.recipe.out, case.recipe.middle
    return Rounding(x=case.recipe.acts, gate_up=out, middle=f"{out}>{middle}", row=out, out=out)


def unaligned(case: Case) -> str | None:
    """grouped_gemm_masked_blackwell.py is_valid_tensor_alignment: rows of FP4 operands are multiples of 16 bytes."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % FP4_TMA:
            return f"{name} {size} is not a multiple of {FP4_TMA}: TMA wants 16-byte rows of FP4"
    return None


BACKENDS = (
    Backend(
        name="flashinfer_cutedsl_masked",
        library="flashinfer-python",
        deterministic=True,
        recipes=("nvfp4-nvfp4", "nvfp4-nvfp4-nvfp4-fp16"),
        activations=("swiglu",),
        archs=("sm100", "sm103"),
        rounding=rounding,
        probe=probe,
        limits=(Limit(("hidden", "inter"), unaligned),),
        prepare=prepare,
        exempt={"graph": "the adapter sizes its slabs by the fullest expert, on the host"},
        expert_parallel=True,
        activation_format="batched",
        entries=(QUANTIZE, ACTIVATE, *GEMMS, CONVERT),
        twinned=True,
        summary="masked grouped GEMM of FlashInfer's CuTe-DSL, NVFP4 weights and activations, batched tokens",
    ),
)
