"""FlashInfer's CuTe-DSL fused MoE of Hopper, bf16 and fp16 (0.7.0 on): `cute_dsl_fused_moe_bf16` with either finalize.

Its contract is the docstring of fused_moe/cute_dsl/sm90_fused_moe.py, release 0.7.2.post1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backends._flashinfer import ACTIVATION_TYPE, MEMBERS, built, whole
from harness.backends._packing import pack
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.entry import resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.formats import get
from reference.rounding import Rounding

ENTRY = "flashinfer.fused_moe.cute_dsl_fused_moe_bf16"
KERNEL = "flashinfer.fused_moe.cute_dsl.sm90_contiguous_gather_grouped_gemm_act_fusion"
INTERLEAVE = f"{KERNEL}.interleave_up_gate_sm90"
FUNCTIONS = ("swiglu", "swiglu_oai", "situ", "geglu_tanh", "relu2")
WHY = "32 rows of each half in turn, and 16 bytes of a row (I % 32 == 0, hidden % 8 == 0)"


def rounding(fused: bool, case: Case) -> Rounding:
    """Activated on the fp32 sums of GEMM 1. The fused finalize adds weighted rows in the output's dtype; the other keeps rows
    in it and sums in fp32."""
    out = case.recipe.out
    return Rounding(middle=out, weighted=out, partial=out, out=out) if fused else Rounding(middle=out, row=out, out=out)


def _constants(case: Case) -> dict[str, float]:
    """The clamped SwiGLU and SiTU are Swiglu with constants."""
    values = ACTIVATIONS[case.activation].parameters
    if case.activation == "situ":
        return {"situ_beta": values["beta"], "situ_linear_beta": values["linear_beta"]}
    return {f"swiglu_{name}": value for name, value in values.items()} if case.activation == "swiglu_oai" else {}


def prepare(fused: bool, case: Case, inputs: Inputs) -> Launch:
    """w13 through the library's own interleave, where there is a gate; experts of the rank at any offset."""
    stacks = pack(case, inputs)
    w2 = stacks[1].data
    w13 = resolve(INTERLEAVE, inputs.device)(stacks[0].data) if ACTIVATIONS[case.activation].gated else stacks[0].data
    b = {"x": inputs.x, "ids": inputs.topk_ids.int(), "topk_weights": inputs.topk_weights, "w13": w13, "w2": w2}
    member = "Swiglu" if case.activation == "situ" else MEMBERS[case.activation]
    options: dict[str, Any] = {
        "num_experts": case.shape.experts,
        "top_k": case.shape.top_k,
        "num_local_experts": len(inputs.local),
        "local_expert_offset": inputs.local.start,
        "use_fused_finalize": fused,
        "activation_type": int(getattr(resolve(ACTIVATION_TYPE, inputs.device), member)),
        **_constants(case),
    }
    moe = resolve(ENTRY, inputs.device)

    def call(output: Tensor | None = None) -> Tensor:
        return moe(b["x"], b["ids"], b["topk_weights"], w13, w2, moe_output=output, **options)  # type: ignore[no-any-return]

    return Launch(call, b, out=call, contract=contract(case, len(inputs.local)))


def contract(case: Case, experts: int) -> tuple[Argument, ...]:
    """x and the output dense, weights of x's dtype."""
    shape, dtype = case.shape, get(case.recipe.acts).torch_dtype
    return (
        Argument("x", dtype, (shape.tokens, shape.hidden), contiguous=True),
        Argument("ids", torch.int32, (shape.tokens, shape.top_k), contiguous=True),
        Argument("topk_weights", torch.float32, (shape.tokens, shape.top_k), contiguous=True),
        Argument("w13", dtype, (experts, "rows", shape.hidden), align=16, stride_align=16),
        Argument("w2", dtype, (experts, shape.hidden, shape.inter), align=16, stride_align=16),
        Argument("out", dtype, (shape.tokens, shape.hidden), contiguous=True, written=True),
    )


def backend(fused: bool) -> Backend:
    """The subject with this finalize."""
    how = "adds in the output's dtype, by atomics" if fused else "sums in fp32, in a fixed order"
    return Backend(
        name="flashinfer_cute_sm90" + ("_fused" if fused else ""),
        library="flashinfer-python",
        deterministic=not fused,
        recipes=("bf16", "fp16"),
        activations=FUNCTIONS,
        archs=("sm90",),
        rounding=partial(rounding, fused),
        probe=built("moe_utils", ENTRY, INTERLEAVE, ACTIVATION_TYPE),
        limits=(whole(8, 32, WHY),),
        prepare=partial(prepare, fused),
        summary=f"FlashInfer cute_dsl_fused_moe_bf16; the finalize {how}",
        exempt={"out_strided": "the finalize is handed an address: no stride of moe_output is looked at"},
        expert_parallel=True,
        entries=(ENTRY, INTERLEAVE, ACTIVATION_TYPE),
        twinned=True,
    )


BACKENDS = (backend(False), backend(True))
