"""vLLM's CUTLASS FP8 MoE (run_cutlass_moe_fp8): grouped GEMMs between its permute, activation, quantise and unpermute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import Stack, pack
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = f"{_vllm.FUSED_MOE}.experts.cutlass_moe.run_cutlass_moe_fp8"
QUANTISE = "vllm._custom_ops.scaled_fp8_quant"
ALIGNMENT = 16  # bytes of a TMA row: csrc moe_mm_c3x, elements of FP8; moe_permute wants whole 16 bytes of hidden as well
PER_TOKEN = "fp8_channel-fp8_token"


def rounding(case: Case) -> Rounding:
    """mm1_out, act_out and mm2_out are bf16; moe_unpermute multiplies and adds in fp32."""
    out, rule = case.recipe.out, _vllm.RULES.get(case.recipe.acts, case.recipe.acts)
    return Rounding(
        x=rule,
        gate_up=out,
        activated=_vllm.halves(case),
        middle=f"{out}>{rule}",
        row=out,
        out=out,
        accumulate="hopper_fp8_fast",  # FP8FastAccum kernel schedules
    )


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden] and w2 [experts, hidden, inter] in E4M3; scales [experts, rows, 1] or [experts, 1]."""
    w13, w2 = pack(case, inputs, one_factor=True)
    e4m3 = torch.float8_e4m3fn
    buffers = {**_vllm.step(inputs), "w13": _vllm.ordered(case, w13.data).view(e4m3), "w2": w2.data.view(e4m3)}
    scales13 = _scales(w13)
    buffers["w13_scales"] = _vllm.ordered(case, scales13) if str(case.recipe) == PER_TOKEN else scales13
    buffers |= {"w2_scales": _scales(w2), **_vllm.static_scales(inputs), **_vllm.expert_map(inputs)}
    return Launch(_call(case, buffers), buffers, contract=_vllm.contract(case))


def _scales(stack: Stack) -> Tensor:
    """float32 [experts, rows, 1] per channel, [experts, 1] per tensor."""
    if stack.scales is not None:
        return stack.scales
    assert stack.factors is not None
    return stack.factors[:, :1].contiguous()


def strides(case: Case, held: int, device: str) -> dict[str, Tensor]:
    """int64 [experts held]: row strides of both GEMMs' operands, as CutlassExpertsFp8Base makes them."""
    hidden, inter = case.shape.hidden, case.shape.inter
    sizes = {"ab_strides1": hidden, "ab_strides2": inter, "c_strides1": 2 * inter, "c_strides2": hidden}
    return {name: torch.full((held,), size, device=device, dtype=torch.int64) for name, size in sizes.items()}


def _call(case: Case, b: dict[str, Tensor]) -> Callable[[], Tensor]:
    run, quantise = _vllm.library(ENTRY), _vllm.library(QUANTISE)
    activation, per_token = _vllm.activation(case), str(case.recipe) == PER_TOKEN
    shape, dtype = case.shape, _vllm.carrier(case)
    fixed = strides(case, b["w13"].shape[0], str(b["x"].device))
    slots = shape.tokens * shape.top_k

    def call() -> Tensor:
        x, scale = quantise(b["x"], b.get("a1_scale"), use_per_token_if_dynamic=per_token)
        output = torch.empty_like(b["x"])
        run(
            output,
            x,
            b["w13"],
            b["w2"],
            b["ids"],
            activation,
            shape.experts,
            b.get("expert_map"),
            b["w13_scales"],
            b["w2_scales"],
            scale,
            b.get("a2_scale"),
            **fixed,
            workspace13=x.new_empty((slots, max(2 * shape.inter, shape.hidden)), dtype=dtype),
            workspace2=x.new_empty((slots, max(shape.inter, shape.hidden)), dtype=dtype),
            expert_num_tokens=None,
            out_dtype=dtype,
            per_act_token=per_token,
            per_out_ch=per_token,
            use_batched_format=False,
            topk_weights=b["topk_weights"],
            permute_scratch=None,
        )
        return output

    return call


def unaligned(case: Case) -> str | None:
    """Rows of both operands in whole 16 bytes."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % ALIGNMENT:
            return f"{name} {size} is not a multiple of {ALIGNMENT}: TMA reads rows of whole 16 bytes"
    return None


BACKENDS = (
    Backend(
        name="vllm_cutlass_fp8",
        library="vllm",
        deterministic=True,
        recipes=(PER_TOKEN, "fp8_tensor-fp8_tensor"),
        activations=_vllm.GATED,
        archs=("sm90", "sm100"),
        rounding=rounding,
        probe=_vllm.needs(ENTRY, QUANTISE, _vllm.ACTIVATION),
        limits=(_vllm.SOME_TOKENS, Limit(("hidden", "inter"), unaligned)),
        prepare=prepare,
        expert_parallel=True,
        entries=(ENTRY, QUANTISE),
        summary="vLLM's CUTLASS FP8 experts: per token and channel, or static per tensor",
    ),
)
