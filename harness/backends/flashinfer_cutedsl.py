"""FlashInfer's CuTe-DSL fused MoE on Blackwell: NVFP4 (W4A4) with either finalize, MXFP4 weights with MXFP8 activations.

x goes in quantised, its scales row-major; rows of w1 are up and gate in turn, 64 at a time; weight scales in the MMA view.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backends._cutedsl import CONVERT, activation, alphas, mma_scales
from harness.backends._packing import Stack, pack
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument, Entry
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.formats import get
from reference.layout import per_expert
from reference.layouts import get as layout
from reference.layouts.linear import pack_nibbles
from reference.rounding import Rounding

FUSED, NVFP4 = "flashinfer.fused_moe.cute_dsl_fused_moe", "flashinfer.fused_moe.cute_dsl_fused_moe_nvfp4"
SCALE = (torch.uint8, torch.float8_e4m3fn)
ATOM = 128  # rows of a scale tile: finalize's can_implement wants hidden in whole ones, the gather GEMM its n
INTERLEAVE = per_expert(layout("gated_interleave_64"))


def contract(scaled: bool) -> tuple[Argument, ...]:
    """What the entry point wants; `scaled`: with fc2_input_scale, of which the kernel reads one value, whatever it holds."""
    weights = (
        Argument(name, kind, shape)
        for gemm, n, k in (("w1", "n", "hidden"), ("w2", "hidden rows", "inter"))
        for name, kind, shape in (
            (f"{gemm}_weight", torch.uint8, ("experts", n, f"packed {k}")),
            (f"{gemm}_weight_sf", SCALE, (32, 4, f"tiles of {n}", 4, f"tiles of {k}", "experts")),
            (f"{gemm}_alpha", torch.float32, ("experts",)),
        )
    )
    return (
        Argument("x", (torch.uint8, torch.float8_e4m3fn), ("tokens", "columns"), contiguous=True),
        Argument("x_sf", SCALE, ("tokens", "blocks"), contiguous=True),
        Argument("token_selected_experts", torch.int32, ("tokens", "top_k")),
        Argument("token_final_scales", torch.float32, ("tokens", "top_k")),
        *weights,
        *((Argument("fc2_input_scale", torch.float32, (1,)),) if scaled else ()),
        Argument("moe_output", torch.bfloat16, ("tokens", "hidden rows"), written=True),
    )


def prepare(case: Case, inputs: Inputs, entry: str = NVFP4, options: Mapping[str, Any] | None = None) -> Launch:
    """Pack the weights and bind `entry` to them, called with `options`."""
    b, acts, local = buffers(case, inputs), get(case.recipe.acts), inputs.local
    function = Entry(resolve(entry, inputs.device), contract("fc2_input_scale" in b))
    packed = [name for name in b if name.startswith(("w1", "w2", "fc2"))]
    fixed = {
        **activation(case, inputs.device),
        **(options or {}),
        **({} if "fc2_input_scale" in b else {"fc2_input_scale": None}),
    }
    shard = {"num_local_experts": len(local), "local_expert_offset": local.start}

    def call(out: Tensor | None = None) -> Tensor:
        quantised = acts.encode(b["x"], b.get("x_global_scale"))
        assert quantised.scales is not None
        fp4 = acts.element.bits == 4
        result: Tensor = function(
            x=pack_nibbles(quantised.codes) if fp4 else quantised.codes.to(torch.uint8).view(torch.float8_e4m3fn),
            x_sf=quantised.scales.to(torch.uint8),
            token_selected_experts=b["ids"],
            token_final_scales=b["topk_weights"],
            num_experts=case.shape.experts,
            top_k=case.shape.top_k,
            moe_output=out,
            **{name: b[name] for name in packed},
            **shard,
            **fixed,
        )
        return result

    step = (
        Argument("x", torch.bfloat16, (case.shape.tokens, case.shape.hidden)),
        Argument("ids", torch.int32, (case.shape.tokens, case.shape.top_k)),
    )
    return Launch(call, b, out=call, contract=step)


def buffers(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The step's tensors and the packed weights under the names of the entry point."""
    w13, w2 = pack(case, inputs, up_first=True, one_factor=True)
    found = {"x": inputs.x, "ids": inputs.topk_ids.to(torch.int32), "topk_weights": inputs.topk_weights}
    if ACTIVATIONS[case.activation].gated:
        assert w13.scales is not None
        w13 = Stack(INTERLEAVE.pack(w13.data), INTERLEAVE.pack(w13.scales), None, w13.factors)
    block = get(case.recipe.weights).scaling.group[1]  # type: ignore[union-attr]
    for name, stack, scale in (("w1", w13, inputs.x_scale), ("w2", w2, inputs.middle_scale)):
        found[f"{name}_weight"] = stack.data
        found[f"{name}_weight_sf"] = mma_scales(stack, block, inputs.device)
        found[f"{name}_alpha"] = alphas(stack, scale)
    for name, scale in (("x_global_scale", inputs.x_scale), ("fc2_input_scale", inputs.middle_scale)):
        if scale is not None:
            found[name] = torch.full((1,), scale, dtype=torch.float32, device=inputs.x.device)
    return found


def whole_tiles(case: Case) -> str | None:
    """GEMM 1's n and GEMM 2's n in whole scale tiles; of a W4A8 layer both k as well (can_implement of both kernels)."""
    n = case.shape.inter * (2 if ACTIVATIONS[case.activation].gated else 1)
    if case.shape.hidden % ATOM:
        return f"hidden {case.shape.hidden} is not a multiple of {ATOM}: finalize's can_implement, whole scale tiles"
    if n % ATOM:
        return f"GEMM1 output dim n={n} must be a multiple of {ATOM}"
    if case.recipe.weights == "mxfp4" and case.shape.inter % ATOM:
        return f"inter {case.shape.inter} is not a multiple of {ATOM}: FP4 beside FP8 is unpacked by TMA in such steps"
    return None


def atomic(case: Case) -> Rounding:
    """Fused finalize: alpha * routing weight * row is rounded and added to the bf16 output in memory. The activation goes
    from fp32 to the middle's format (sf from the fp32 maximum, gather GEMM's epilogue)."""
    out = case.recipe.out
    return Rounding(x=case.recipe.acts, middle=case.recipe.middle, weighted=out, partial=out, out=out)


def two_stage(case: Case) -> Rounding:
    """moe_unpermute: rows in bf16, weighted and summed in fp32."""
    return Rounding(x=case.recipe.acts, middle=case.recipe.middle, row=case.recipe.out, out=case.recipe.out)


COMMON: dict[str, Any] = {
    "library": "flashinfer-python",
    "archs": ("sm100", "sm103"),
    "limits": (Limit(("recipe", "activation", "hidden", "inter"), whole_tiles),),
    "exempt": {
        "graph": "the functional API makes its streams and events in the call; graphs want CuteDslMoEWrapper (its docstring)",
        "out_strided": "the finalize kernel raises 'out must be contiguous'",
    },
    "expert_parallel": True,
    "twinned": True,
}
SILU = ("swiglu", "swiglu_oai", "geglu_tanh", "relu2")

BACKENDS = (
    Backend(
        name="flashinfer_cutedsl",
        deterministic=False,  # atomics in an order of their own
        recipes=("nvfp4-nvfp4",),
        activations=(*SILU, "situ"),
        rounding=atomic,
        probe=needs(NVFP4, CONVERT),
        prepare=prepare,
        entries=(NVFP4, CONVERT),
        summary="cute_dsl_fused_moe_nvfp4, fused finalize: atomic adds in bf16",
        **COMMON,
    ),
    Backend(
        name="flashinfer_cutedsl_two_stage",
        deterministic=True,
        recipes=("nvfp4-nvfp4",),
        activations=(*SILU, "situ"),
        rounding=two_stage,
        probe=needs(NVFP4, CONVERT),
        prepare=partial(prepare, options={"use_fused_finalize": False}),
        entries=(NVFP4, CONVERT),
        summary="cute_dsl_fused_moe_nvfp4(use_fused_finalize=False): rows stored, summed in order in fp32",
        **COMMON,
    ),
    Backend(
        name="flashinfer_cutedsl_w4a8",
        deterministic=False,
        recipes=("mxfp4-mxfp8",),
        activations=SILU,
        rounding=atomic,
        probe=needs(FUSED, CONVERT),
        prepare=partial(prepare, entry=FUSED, options={"quant_mode": "w4a8"}),
        entries=(FUSED, CONVERT),
        summary="cute_dsl_fused_moe(quant_mode='w4a8'): MXFP4 weights, MXFP8 activations",
        **COMMON,
    ),
)
