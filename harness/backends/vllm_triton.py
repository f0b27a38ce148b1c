"""vLLM's Triton fused_experts: bf16 and fp16, FP8 per tensor, per channel and in blocks, int8, int4 weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import Stack, biases, group_of, pack
from harness.backends._vllm_schemes import FP8, INT8, Scheme, blocks, interleaved_blocks
from harness.backends.base import Backend, Launch
from harness.case import BIASES, WEIGHTINGS, Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = f"{_vllm.FUSED_MOE}.fused_moe.fused_experts"
CONFIG = f"{_vllm.FUSED_MOE}.config"
PAIR = 0x88  # uint4b8: a nibble is the code plus 8 (fused_moe_kernel_gptq_awq, b_zp_num); both nibbles of a byte
SLOTS = 6  # an expert: should_moe_wna16_use_cuda


PLAIN = ("bf16", "fp16")
WNA16 = tuple(f"int4_g{size}-fp16" for size in (32, 64, 128))


def rounding(case: Case) -> Rounding:
    """fused_experts_impl: both GEMMs, the activation and the output in the dtype of x; the routing weight multiplies the
    fp32 accumulator of GEMM 2; moe_sum adds in fp32 (moe_sum_vec_kernel of 0.25.1). Quantised acts by vLLM's own rules."""
    out, acts, middle = case.recipe.out, case.recipe.acts, case.recipe.middle
    quantised = acts != case.recipe.carrier
    few = str(case.recipe) in WNA16 and few_tokens(case)
    scheme = FP8.get(str(case.recipe))
    return Rounding(
        x=_vllm.RULES.get(acts, acts) if quantised else None,
        gate_up=out,
        activated=_vllm.halves(case),
        middle=f"{out}>{_vllm.RULES.get(middle, middle)}" if quantised else out,
        weighted=out,
        out=out,
        accumulate="fp16" if few else "fp32" if scheme is None else scheme.accumulate,
    )


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden], w2 [experts, hidden, inter] and what the scheme wants of scales."""
    recipe = str(case.recipe)
    w13, w2 = pack(case, inputs, one_factor=True)
    buffers = {**_vllm.step(inputs), "w13": _vllm.ordered(case, _codes(case, w13)), "w2": _codes(case, w2)}
    added = _biases(case, inputs)
    scheme = (FP8 | INT8).get(recipe)
    quant = None
    if scheme is not None:
        buffers |= {"w13_scales": _scales(case, scheme, w13), "w2_scales": scheme.scales(w2).contiguous()}
        buffers |= _vllm.static_scales(inputs)
        quantised = case.recipe.acts != case.recipe.carrier
        named = {name: buffers.get(name) for name in ("a1_scale", "a2_scale")} if quantised else {}
        config = _vllm.library(f"{CONFIG}.{scheme.config}")
        quant = config(buffers["w13_scales"], buffers["w2_scales"], **named, **scheme.options, **_named(added))
    elif recipe in WNA16:
        buffers |= {"w13_scales": _vllm.ordered(case, blocks(w13).half()), "w2_scales": blocks(w2).half()}
        config = _vllm.library(f"{CONFIG}.int4_w4a16_moe_quant_config")
        quant = config(buffers["w13_scales"], buffers["w2_scales"], block_shape=[0, group_of(case)])
    elif added:
        quant = _vllm.library(f"{CONFIG}.biased_moe_quant_config")(**_named(added))
    buffers |= _vllm.expert_map(inputs) | added
    return Launch(_call(case, buffers, quant), buffers, contract=_vllm.contract(case))


def _biases(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """In the dtype of x, as vLLM's layers keep them; the kernel adds them to the dequantised fp32 sums."""
    found = biases(inputs, _vllm.carrier(case))
    return found | {"w13_bias": _vllm.ordered(case, found["w13_bias"])} if found else found


def _named(added: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of vLLM's descriptions."""
    return {"w1_bias": added["w13_bias"], "w2_bias": added["w2_bias"]} if added else {}


def _call(case: Case, b: dict[str, Tensor], quant: Any) -> Callable[[], Tensor]:
    function, activation = _vllm.library(ENTRY), _vllm.activation(case)

    def call() -> Tensor:
        output: Tensor = function(
            b["x"],
            b["w13"],
            b["w2"],
            b["topk_weights"],
            b["ids"],
            activation=activation,
            apply_router_weight_on_input=case.weighting == "oninput",
            global_num_experts=case.shape.experts,
            expert_map=b.get("expert_map"),
            quant_config=quant,
        )
        return output

    return call


def _codes(case: Case, stack: Stack) -> Tensor:
    """Weights in the dtype that the kernel reads."""
    weights = case.recipe.weights
    if weights.startswith("int4"):
        return stack.data ^ PAIR  # two's complement plus 8, modulo 16
    dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(weights.split("_")[0])
    return stack.data if dtype is None else stack.data.view(dtype)


def _scales(case: Case, scheme: Scheme, w13: Stack) -> Tensor:
    scales = scheme.scales(w13)
    return scales if scales.dim() == 1 or "block_shape" in scheme.options else _vllm.ordered(case, scales).contiguous()


SCRIPT = """\
from vllm.model_executor.layers.fused_moe import config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts


def call(b):
    quant = {quant}
    return fused_experts(
        b["x"],
        b["w13"],
        b["w2"],
        b["topk_weights"],
        b["ids"],
        activation=MoEActivation.{activation},
        apply_router_weight_on_input={on_input},
        global_num_experts={experts},
        expert_map=b.get("expert_map"),
        quant_config=quant,
    )
"""


def script(case: Case) -> str:
    """The call as text."""
    scheme, quant = (FP8 | INT8).get(str(case.recipe)), "None"
    added = 'w1_bias=b["w13_bias"], w2_bias=b["w2_bias"]' if case.bias == "bias" else ""
    if scheme is not None:
        options = "".join(f", {name}={value!r}" for name, value in scheme.options.items())
        static = ', a1_scale=b.get("a1_scale"), a2_scale=b.get("a2_scale")' if case.recipe.acts != case.recipe.carrier else ""
        options += f", {added}" if added else ""
        quant = f'config.{scheme.config}(b["w13_scales"], b["w2_scales"]{static}{options})'
    elif str(case.recipe) in WNA16:
        options = f"block_shape=[0, {group_of(case)}]"
        quant = f'config.int4_w4a16_moe_quant_config(b["w13_scales"], b["w2_scales"], {options})'
    elif added:
        quant = f"config.biased_moe_quant_config({added})"
    activation = _vllm.ACTIVATIONS[case.activation]
    return SCRIPT.format(quant=quant, activation=activation, experts=case.shape.experts, on_input=case.weighting == "oninput")


def lone_weight(case: Case) -> str | None:
    """vLLM's layers ask for it so: FusedMoE prepares assert topk == 1."""
    if case.weighting == "oninput" and case.shape.top_k > 1:
        return "apply_router_weight_on_input is only implemented for topk=1 (vLLM 0.25.1 prepare_finalize/*.py)"
    return None


def whole_groups(axis: str) -> Limit:
    """moe_wna16.py of vLLM refuses a group that straddles the end of a row."""

    def refuses(case: Case) -> str | None:
        size, group = int(case.axes[axis]), group_of(case)
        return f"{axis} {size} is not a multiple of {group}, the group of {case.recipe.weights}" if size % group else None

    return Limit(("recipe", axis), refuses)


def few_tokens(case: Case) -> bool:
    """should_moe_wna16_use_cuda: at most 6 slots an expert go to moe_wna16_gemm."""
    return case.shape.tokens * case.shape.top_k <= SLOTS * case.shape.experts


def sums_in_fp16(case: Case) -> str | None:
    """moe_wna16.cu: four products are added in fp16, splits of K by fp16 atomics. Integers survive that."""
    if case.fill == "real" and few_tokens(case):
        return "at most 6 slots an expert run in moe_wna16_gemm, which adds in fp16: no bound is known, asked exactly only"
    return None


def groups_of_32(case: Case) -> str | None:
    """docs/findings.md, vllm-wna16-few-tokens-groups-of-32: it was refused at every width that was tried on an H200."""
    if str(case.recipe).startswith("int4_g32") and few_tokens(case):
        return "moe_wna16_gemm: BLOCK_SIZE_K // group_size must be one of [1, 2, 4, 8] (moe_wna16.cu of 0.25.1)"
    return None


def fewest(case: Case) -> str | None:
    """The same where top_k <= experts decides it already, so that a plan does not look for such pairs."""
    return sums_in_fp16(case) if case.shape.tokens <= SLOTS else None


def _backend(
    name: str, recipes: tuple[str, ...], summary: str, limits: tuple[Limit, ...] = (), added: tuple[str, ...] = BIASES
) -> Backend:
    return Backend(
        name=name,
        library="vllm",
        deterministic=recipes != WNA16,  # moe_wna16_gemm adds with atomics
        recipes=recipes,
        activations=tuple(_vllm.ACTIVATIONS),
        archs=("sm90", "sm100", "sm103", "sm120"),
        rounding=rounding,
        probe=_vllm.needs(ENTRY, _vllm.ACTIVATION),
        limits=(_vllm.SOME_TOKENS, Limit(("weighting", "top_k"), lone_weight), *limits),
        biases=added,
        weightings=WEIGHTINGS,
        prepare=prepare,
        script=script,
        expert_parallel=True,
        entries=(ENTRY,),
        summary=summary,
    )


BACKENDS = (
    _backend("vllm_triton", PLAIN, "vLLM fused_experts in Triton, bf16 and fp16"),
    _backend(
        "vllm_triton_fp8",
        tuple(FP8),
        "vLLM fused_experts in Triton, FP8 x FP8: static per tensor, per token and channel, blocks of 128",
        (Limit(("recipe", "activation"), interleaved_blocks),),
    ),
    _backend("vllm_triton_int8", tuple(INT8), "vLLM fused_experts in Triton, int8 weights, activations int8 per token or bf16"),
    _backend(
        "vllm_triton_wna16",
        WNA16,
        "vLLM fused_experts in Triton or moe_wna16_gemm in CUDA (few tokens an expert), int4 weights in groups",
        (
            whole_groups("hidden"),
            whole_groups("inter"),
            Limit(("fill", "tokens"), fewest),
            Limit(("fill", "tokens", "top_k", "experts"), sums_in_fp16),
            Limit(("recipe", "tokens", "top_k", "experts"), groups_of_32),
        ),
        added=("nobias",),  # dispatch_fused_moe_kernel asserts it
    ),
)
