"""FlashInfer's b12x fused MoE on SM120 (RTX 50, RTX PRO Blackwell): NVFP4, tokens handed over in bf16.

Rows of w1: up above gate; weight scales in the MMA view; the scales of both inputs in the decode sense. Expert-parallel ranks
are asked through the documented meaning of a negative id: an unrouted slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from harness.backends._cutedsl import CONVERT, alphas, mma_scales
from harness.backends._packing import pack
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument, Entry
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.rounding import Rounding

B12X = "flashinfer.fused_moe.b12x_fused_moe"
BLOCK = 16
MICRO_TOKENS, DIRECT_SLOTS, DIRECT_INTER, MICRO_SLOTS, STATIC_SLOTS = 8, 32, 512, 40, 1024  # moe_dispatch.py, 0.7.2.post1
NAMES: Mapping[str, str] = MappingProxyType(
    {"swiglu": "silu", "geglu_tanh": "gelu_tanh", "relu2": "relu2", "swiglu_oai": "swigluoai_uninterleave"}
)
SCALES = (torch.uint8, torch.float8_e4m3fn)
CONTRACT = (
    Argument("x", torch.bfloat16, ("tokens", "hidden"), contiguous=True),
    Argument("w1_weight", torch.uint8, ("experts", "n", "packed hidden")),
    Argument("w1_weight_sf", SCALES, (32, 4, "tiles of n", 4, "tiles of hidden", "experts")),
    Argument("w2_weight", torch.uint8, ("experts", "hidden", "packed inter")),
    Argument("w2_weight_sf", SCALES, (32, 4, "tiles of hidden rows", 4, "tiles of inter", "experts")),
    Argument("token_selected_experts", torch.int32, ("tokens", "top_k")),
    Argument("token_final_scales", torch.float32, ("tokens", "top_k")),
    Argument("w1_alpha", torch.float32, ("experts",)),
    Argument("w2_alpha", torch.float32, ("experts",)),
    Argument("fc2_input_scale", torch.float32, (1,)),
    Argument("input_global_scale", torch.float32, (1,)),
    Argument("output", torch.bfloat16, ("tokens", "hidden"), written=True),
)


def prepare(case: Case, inputs: Inputs) -> Launch:
    """Pack the weights and bind the entry point to them."""
    b, local = buffers(case, inputs), inputs.local
    function = Entry(resolve(B12X, inputs.device), CONTRACT)
    weights = {name: tensor for name, tensor in b.items() if name not in ("ids", "topk_weights")}
    made = ACTIVATIONS[case.activation].parameters if case.activation == "swiglu_oai" else {}
    options = {"activation": NAMES[case.activation], **{f"swiglu_{name}": value for name, value in made.items()}}

    def call(out: Tensor | None = None) -> Tensor:
        mine = (b["ids"] >= local.start) & (b["ids"] < local.stop)
        result: Tensor = function(
            token_selected_experts=torch.where(mine, b["ids"] - local.start, -1),
            token_final_scales=b["topk_weights"],
            num_experts=len(local),
            top_k=case.shape.top_k,
            output=out,
            **weights,
            **options,
        )
        return result

    step = (Argument("x", torch.bfloat16, (case.shape.tokens, case.shape.hidden), contiguous=True),)
    return Launch(call, b, out=call, contract=step)


def buffers(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The step's tensors and the packed weights under the names of the entry point."""
    w13, w2 = pack(case, inputs, up_first=True, one_factor=True)
    found = {"x": inputs.x, "ids": inputs.topk_ids.to(torch.int32), "topk_weights": inputs.topk_weights}
    for name, stack in (("w1", w13), ("w2", w2)):
        found[f"{name}_weight"] = stack.data
        found[f"{name}_weight_sf"] = mma_scales(stack, BLOCK, inputs.device)
    found["w1_alpha"] = alphas(w13, None)  # the library multiplies input_global_scale in, of GEMM 2's input it does not
    found["w2_alpha"] = alphas(w2, inputs.middle_scale)
    for name, scale in (("input_global_scale", inputs.x_scale), ("fc2_input_scale", inputs.middle_scale)):
        assert scale is not None
        found[name] = torch.full((1,), 1 / scale, dtype=torch.float32, device=inputs.x.device)
    return found


def whole_blocks(case: Case) -> str | None:
    """prepare_b12x_nvfp4_weights: "b12x NVFP4 dimensions must be multiples of 16"."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % BLOCK:
            return f"{name} {size} is not a multiple of {BLOCK}: prepare_b12x_nvfp4_weights wants whole blocks"
    return None


def rounding(case: Case) -> Rounding:
    """By the kernel that moe_dispatch picks. The direct micro kernel stays in fp32; the static one writes rows in bf16, times
    bf16(routing weight * alpha), and sums in fp32; micro and dynamic add in bf16, once for every 128 neurons: of more than 128
    the declared points say less than they round."""
    tokens, slots = case.shape.tokens, case.shape.tokens * case.shape.top_k
    acts, out = case.recipe.acts, case.recipe.out
    middle = f"{out}>{case.recipe.middle}"
    if tokens <= MICRO_TOKENS and slots < DIRECT_SLOTS and case.shape.inter <= DIRECT_INTER and case.shape.hidden % 128 == 0:
        return Rounding(x=acts, middle=middle, out=out)
    micro = tokens <= MICRO_TOKENS and slots <= (MICRO_SLOTS if case.shape.top_k > 1 else MICRO_SLOTS // 2)
    if micro or slots > STATIC_SLOTS:
        return Rounding(x=acts, middle=middle, row=out, weighted=out, partial=out, out=out)
    return Rounding(x=acts, routing_weight=out, middle=middle, row=out, weighted=out, out=out)


BACKENDS = (
    Backend(
        name="flashinfer_b12x",
        library="flashinfer-python",
        deterministic=False,  # the micro and the dynamic kernel add in bf16 atomics
        recipes=("nvfp4-nvfp4",),
        activations=tuple(NAMES),
        archs=("sm120",),
        rounding=rounding,
        probe=needs(B12X, CONVERT),
        limits=(Limit(("hidden", "inter"), whole_blocks),),
        prepare=prepare,
        exempt={
            "graph": "b12x_fused_moe requires a pre-allocated output buffer and a warm workspace during capture (its errors)",
            "out_strided": "its kernels are compiled for dense rows (make_fake_compact_tensor) or take an address",
        },
        expert_parallel=True,
        entries=(B12X, CONVERT),
        twinned=True,
        summary="b12x_fused_moe on SM120, NVFP4 weights, tokens quantised inside",
    ),
)
