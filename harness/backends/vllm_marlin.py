"""vLLM's Marlin MoE (fused_marlin_moe): NVFP4, MXFP4, int4 in groups and FP8 weights times 16-bit activations.

The weights go through vLLM's own repack on the GPU; `scales` and `codes` below are the parts of its
prepare_*_moe_layer_for_marlin that need no layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import Stack, biases, pack
from harness.backends.base import Backend, Launch
from harness.case import BIASES, Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = f"{_vllm.FUSED_MOE}.experts.marlin_moe.fused_marlin_moe"
REPACK = "vllm._custom_ops.gptq_marlin_repack"
PERMUTE = f"{_vllm.QUANT_UTILS}.marlin_utils.marlin_permute_scales"
PERMUTE_BIAS = f"{_vllm.QUANT_UTILS}.marlin_utils.marlin_permute_bias"
FP4 = f"{_vllm.QUANT_UTILS}.marlin_utils_fp4"
FP8_BIAS = f"{_vllm.QUANT_UTILS}.marlin_utils_fp8.fp8_fused_exponent_bias_into_scales"
TYPES = "vllm.scalar_type.scalar_types"
BIASED = 0x88  # uint4b8: a nibble is the code plus 8, so the top bit of both nibbles flips
NARROW, WIDE = 64, 128  # a thread tile is 64 columns of N by 128 of K or the reverse: marlin_utils.marlin_padded_nk
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Kind:
    """A weight format as Marlin takes it: the attribute of vLLM's scalar_types, bits of a code, columns of a scale."""

    scalar: str
    bits: int
    group: int


KINDS = {
    "nvfp4": Kind("float4_e2m1f", 4, 16),
    "mxfp4": Kind("float4_e2m1f", 4, 32),
    "int4_g32": Kind("uint4b8", 4, 32),
    "int4_g64": Kind("uint4b8", 4, 64),
    "int4_g128": Kind("uint4b8", 4, 128),
    "mxint4": Kind("uint4b8", 4, 32),
    "fp8_channel": Kind("float8_e4m3fn", 8, -1),
}
KNOWN = tuple(_vllm.ACTIVATIONS)
INTEGERS = ("int4_g32", "int4_g64", "int4_g128", "mxint4")


def rounding(case: Case) -> Rounding:
    """marlin_template.h, write_result: the GEMMs round to 16 bits and add the bias in 16 bits, then GEMM 2 multiplies by the
    routing weight, itself rounded to 16 bits; torch.sum adds in fp32. Of NVFP4 the weight is rounded after it took up the
    global scale, by which the kernel as it is written multiplies the bias of GEMM 2 too: that is not expected here."""
    out = case.recipe.out
    wide = Rounding(gate_up=out, activated=_vllm.halves(case), middle=out, routing_weight=out, row=out, weighted=out, out=out)
    return replace(wide, product=out) if case.bias == "bias" else wide


def prepare(case: Case, inputs: Inputs) -> Launch:
    """Repacked weights [experts, K / 16, ..], permuted scales [experts, K / group, N], NVFP4's global scales [experts],
    permuted biases [experts, N] in the dtype of x."""
    kind, dtype = KINDS[case.recipe.weights], _vllm.carrier(case)
    buffers = {**_vllm.step(inputs), **_vllm.expert_map(inputs)}
    for name, stack in zip(("w13", "w2"), pack(case, inputs, one_factor=True), strict=True):
        stack = lifted(stack) if case.recipe.weights == "nvfp4" else stack
        logical = (codes(case, stack), scales(stack))
        if name == "w13":
            logical = (_vllm.ordered(case, logical[0]), _vllm.ordered(case, logical[1]))
        weights, factors = padded(name, logical, case)
        buffers[name] = repacked(weights, kind)
        buffers[f"{name}_scales"], shift = permuted(case, factors, dtype)
        if stack.factors is not None:
            process = _vllm.library(f"{FP4}.nvfp4_marlin_process_global_scale")
            buffers[f"{name}_global"] = process(stack.factors[:, 0].contiguous(), dtype) / shift
    buffers |= _biases(case, inputs, dtype)
    return Launch(_call(case, buffers, kind), buffers, contract=_vllm.contract(case))


def lifted(stack: Stack) -> Stack:
    """The same values with each expert's largest E4M3 scale in the top binade, as calibrated checkpoints have it: Marlin keeps
    no subnormal scale (nvfp4_marlin_process_scales flushes what is below 2**-6 after one shift for the whole layer)."""
    assert stack.scales is not None
    assert stack.factors is not None
    values = stack.scales.view(torch.float8_e4m3fn).float()
    shift = torch.exp2((E4M3_MAX / values.amax((1, 2))).log2().floor())
    moved = (values * shift[:, None, None]).to(torch.float8_e4m3fn)
    assert torch.equal(moved.float(), values * shift[:, None, None]), "a scale does not fit"
    return replace(stack, scales=moved.view(torch.uint8), factors=stack.factors / shift[:, None])


def codes(case: Case, stack: Stack) -> Tensor:
    """uint8 [experts, rows, columns (/ 2)] as the kernel's scalar type has them."""
    return stack.data ^ BIASED if case.recipe.weights in INTEGERS else stack.data


def scales(stack: Stack) -> Tensor:
    """[experts, rows, groups] as the format keeps them: codes or float32."""
    assert stack.scales is not None
    return stack.scales


def padding(case: Case) -> int:
    """What the intermediate size lacks to a whole thread tile."""
    return -case.shape.inter % max(WIDE if case.shape.hidden % WIDE else NARROW, KINDS[case.recipe.weights].group)


def padded(name: str, logical: tuple[Tensor, Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Intermediate size up to a whole thread tile, with zero codes and scales: rows of both halves of w13, columns of w2."""
    kind, missing, (weights, factors) = KINDS[case.recipe.weights], padding(case), logical
    if name == "w2":
        more = missing * kind.bits // 8
        groups = missing // kind.group if kind.group > 0 else 0
        return torch.nn.functional.pad(weights, (0, more)), torch.nn.functional.pad(factors, (0, groups))
    return padded_rows(weights, case), padded_rows(factors, case)


def padded_rows(rows: Tensor, case: Case) -> Tensor:
    """[experts, rows of w13, columns] with zeros behind either half; where rows alternate both end together."""
    parts = 2 if case.activation in _vllm.GATED and case.activation != "swiglu_oai" else 1
    ends = padding(case) * (2 if case.activation == "swiglu_oai" else 1)
    done: Tensor = torch.nn.functional.pad(rows.unflatten(1, (parts, -1)), (0, 0, 0, ends))
    return done.flatten(1, 2)


def _biases(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    found = biases(inputs, dtype)
    if not found:
        return {}
    permute = _vllm.library(PERMUTE_BIAS)
    found["w13_bias"] = padded_rows(_vllm.ordered(case, found["w13_bias"]).unsqueeze(-1), case).squeeze(-1)
    return {name: torch.stack([permute(one) for one in bias]) for name, bias in found.items()}


def repacked(weights: Tensor, kind: Kind) -> Tensor:
    """int32: each expert's codes [N, K] as words along K, [K / pack, N], through gptq_marlin_repack."""
    repack, none = _vllm.library(REPACK), torch.empty(0, dtype=torch.int32, device=weights.device)
    columns = weights.shape[2] * 8 // kind.bits
    return torch.stack(
        [
            repack(
                b_q_weight=words(one),
                perm=none,
                size_k=columns,
                size_n=weights.shape[1],
                num_bits=kind.bits,
                is_a_8bit=False,
            )
            for one in weights
        ]
    )


def words(codes: Tensor) -> Tensor:
    """uint8 [N, bytes of K] -> int32 [bytes / 4, N]: little-endian words along K, as GPTQ packs them."""
    return codes.contiguous().view(torch.int32).T.contiguous()


def permuted(case: Case, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The scales [experts, N, groups] as Marlin reads them, and what NVFP4's were multiplied by to use their whole range."""
    kind = KINDS[case.recipe.weights]
    permute = _vllm.library(PERMUTE)
    values, shift = as_numbers(case, factors, dtype), 1.0
    rows = values.shape[1]
    columns = values.shape[2] * abs(kind.group)
    if case.recipe.weights == "nvfp4":
        shift = _vllm.library(f"{FP4}._nvfp4_compute_scale_factor")(values, dtype)
    found = []
    for one in values:
        done = permute(s=one.T, size_k=columns, size_n=rows, group_size=kind.group)
        if case.recipe.weights == "nvfp4":
            done, _ = _vllm.library(f"{FP4}.nvfp4_marlin_process_scales")(done, scale_factor=shift, a_dtype=dtype)
        elif case.recipe.weights == "mxfp4":
            done = _vllm.library(f"{FP4}.mxfp4_marlin_process_scales")(done)
        elif kind.bits == 8:
            done = _vllm.library(FP8_BIAS)(done)
        found.append(done)
    stored = torch.stack([one.view(torch.uint8) if one.element_size() == 1 else one for one in found])
    return (stored.view(found[0].dtype) if stored.dtype == torch.uint8 else stored), shift


def as_numbers(case: Case, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale codes as numbers in the dtype of the activations."""
    if case.recipe.weights == "nvfp4":
        return factors.view(torch.float8_e4m3fn).to(dtype)
    if case.recipe.weights == "mxfp4":
        return factors.view(torch.float8_e8m0fnu).to(dtype)
    return factors.to(dtype)


def _call(case: Case, b: dict[str, Tensor], kind: Kind) -> Callable[[], Tensor]:
    function: Any = _vllm.library(ENTRY)
    scalar, activation = getattr(_vllm.library(TYPES), kind.scalar), _vllm.activation(case)

    def call() -> Tensor:
        output: Tensor = function(
            b["x"],
            b["w13"],
            b["w2"],
            b.get("w13_bias"),
            b.get("w2_bias"),
            b["w13_scales"],
            b["w2_scales"],
            b["topk_weights"],
            b["ids"],
            quant_type_id=scalar.id,
            global_num_experts=case.shape.experts,
            activation=activation,
            expert_map=b.get("expert_map"),
            global_scale1=b.get("w13_global"),
            global_scale2=b.get("w2_global"),
        )
        return output

    return call


SCRIPT = """\
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
from vllm.scalar_type import scalar_types


def call(b):
    return fused_marlin_moe(
        b["x"],
        b["w13"],
        b["w2"],
        b.get("w13_bias"),
        b.get("w2_bias"),
        b["w13_scales"],
        b["w2_scales"],
        b["topk_weights"],
        b["ids"],
        quant_type_id=scalar_types.{scalar}.id,
        global_num_experts={experts},
        activation=MoEActivation.{activation},
        expert_map=b.get("expert_map"),
        global_scale1=b.get("w13_global"),
        global_scale2=b.get("w2_global"),
    )
"""


def script(case: Case) -> str:
    """The call as text, on buffers that are repacked already."""
    scalar, activation = KINDS[case.recipe.weights].scalar, _vllm.ACTIVATIONS[case.activation]
    return SCRIPT.format(scalar=scalar, experts=case.shape.experts, activation=activation)


def tiles(case: Case) -> str | None:
    """Whole thread tiles of hidden, which is never padded: prepare_nvfp4_moe_layer_.., check_moe_marlin_supports_layer."""
    least = NARROW if case.recipe.weights in ("nvfp4", "mxfp4") else WIDE
    return f"hidden {case.shape.hidden} is not a multiple of {least}, a thread tile" if case.shape.hidden % least else None


def whole_groups(case: Case) -> str | None:
    """A group that straddles the padded end of a row is refused."""
    group = KINDS[case.recipe.weights].group
    if group > 0 and case.shape.inter % group:
        return f"inter {case.shape.inter} is not a multiple of {group}, the group of {case.recipe.weights}"
    return None


def sixteen_bit_scales(case: Case) -> str | None:
    """Scales are handed over in the dtype of the activations, products with codes are formed in it."""
    if case.fill == "real" and case.recipe.weights == "fp8_channel":
        return "its scales are cast to 16 bits (prepare_fp8_moe_layer_for_marlin): only powers of two arrive as they are"
    if case.fill == "real" and case.recipe.weights in INTEGERS and case.recipe.acts == "bf16":
        return "code times scale is rounded to bf16, a rounding of the weights: asked exactly only, and with fp16"
    return None


_LIMITS = (
    _vllm.SOME_TOKENS,
    Limit(("recipe", "hidden"), tiles),
    Limit(("recipe", "inter"), whole_groups),
    Limit(("fill", "recipe"), sixteen_bit_scales),
)


def _backend(name: str, recipes: tuple[str, ...], summary: str, activations: tuple[str, ...] = KNOWN) -> Backend:
    return Backend(
        name=name,
        library="vllm",
        deterministic=True,
        recipes=recipes,
        activations=activations,
        archs=("sm90", "sm100", "sm103", "sm120"),
        rounding=rounding,
        probe=_vllm.needs(ENTRY, REPACK, PERMUTE, PERMUTE_BIAS, TYPES, _vllm.ACTIVATION),
        limits=_LIMITS,
        biases=BIASES,
        prepare=prepare,
        script=script,
        expert_parallel=True,
        entries=(ENTRY, REPACK, PERMUTE),
        summary=summary,
    )


BACKENDS = (
    _backend("vllm_marlin_nvfp4", ("nvfp4",), "vLLM Marlin MoE, NVFP4 weights alone"),
    _backend("vllm_marlin_mxfp4", ("mxfp4",), "vLLM Marlin MoE, MXFP4 weights alone"),
    _backend(
        "vllm_marlin_int4",
        ("int4_g32", "int4_g32-fp16", "int4_g64-fp16", "int4_g128-fp16", "mxint4", "mxint4-fp16"),
        "vLLM Marlin MoE, int4 weights in groups (GPTQ, compressed-tensors, MXINT4)",
    ),
    _backend(
        "vllm_marlin_fp8",
        ("fp8_channel",),
        "vLLM Marlin MoE, FP8 weights per channel times bf16",
        tuple(name for name in KNOWN if name not in ("swiglu_oai", "relu2")),  # it is asked exactly only
    ),
)
