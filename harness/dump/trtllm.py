"""A recorded call of trtllm_*_moe, routed or with routing in the kernel: weights unshuffled by its twin's helpers, routing by
the reference's rule of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.backends._trtllm import METHODS, MOE
from harness.backends.flashinfer_trtllm import rounding
from harness.case import Recipe
from harness.dump.layer import HANDED, SAME, Layer, Routed, Triple, activation, bound, handed, uniform
from harness.twins.libs import _trtllm_checks as checks
from harness.twins.libs import _trtllm_routing as routing
from harness.twins.libs import _trtllm_weights as weights
from harness.twins.libs.flashinfer_enums import ActivationType, Fp8QuantizationType, RoutingMethodType
from harness.twins.libs.flashinfer_trtllm import ENTRIES
from reference.rounding import Rounding
from reference.routing import RULES, Rule

SWIGLU_STEP = 7.0  # its limit of values, as the reference has it; the argument's is of accumulators
LINEAR = ("Swiglu", "Geglu", "SwigluStep")  # the first scale multiplies the linear half too; with the others GEMM 2's input


@dataclass(frozen=True)
class Given:
    """What the dtypes and shapes of a call say. x float32; recipe: whose rounding points its kernels have; scales: what the
    epilogues multiply by, float32 [experts] each: GEMM 2's input, the gate, the output."""

    x: Tensor
    weights: weights.Weights
    recipe: str
    scales: tuple[Tensor, Tensor, Tensor] | None = None


def _bf16(a: SimpleNamespace, gated: bool) -> Given:
    return Given(weights.activations(a.hidden_states), weights.bf16(a.gemm1_weights, a.gemm2_weights, gated), "bf16")


def _fp8_tensor(a: SimpleNamespace, gated: bool) -> Given:
    scales = (a.output1_scales_scalar, a.output1_scales_gate_scalar, a.output2_scales_scalar)
    matrices = weights.fp8(a.gemm1_weights, a.gemm2_weights, gated)
    return Given(weights.activations(a.hidden_states), matrices, "fp8_tensor-fp8_tensor", scales)


def _fp8_block(a: SimpleNamespace, gated: bool) -> Given:
    kind = Fp8QuantizationType(a.fp8_quantization_type)
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    if kind is Fp8QuantizationType.DeepSeekFp8:
        x = weights.activations(a.hidden_states, a.hidden_states_scale.T)
        return Given(x, weights.deepseek(data, scales, a.use_shuffled_weight), "fp8_block-fp8_group")
    if kind is not Fp8QuantizationType.MxFp8:
        raise NotImplementedError(f"fp8_quantization_type {kind.name}")
    x = weights.activations(a.hidden_states, a.hidden_states_scale)
    return Given(x, weights.block_scaled(data, scales, gated, "mxfp8"), "mxfp8-mxfp8")


def _fp4(a: SimpleNamespace, gated: bool) -> Given:
    """NVFP4 where a scale stands for 16 weights, MXFP4 where for 32: the library tells them apart so."""
    checks.linear_scales(a)
    per_scale = 2 * a.gemm2_weights.numel() // a.gemm2_weights_scale.numel()
    if per_scale not in (16, 32):
        raise ValueError(f"a weight scale for {per_scale} weights: wanted 16 or 32")
    kind = "nvfp4" if per_scale == 16 else "mxfp4"
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    matrices = weights.block_scaled(data, scales, gated, kind).with_biases(a.gemm1_bias, a.gemm2_bias, gated)
    acts = {torch.bfloat16: "", torch.uint8: f"-{kind}"}.get(a.hidden_states.dtype, "-mxfp8")
    x = weights.activations(a.hidden_states, a.hidden_states_scale)
    epilogue = (a.output1_scale_scalar, a.output1_scale_gate_scalar, a.output2_scale_scalar)
    given = [scale for scale in epilogue if scale is not None]
    if len(given) not in (0, 3):
        raise NotImplementedError("some of output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, not all")
    return Given(x, matrices, f"{kind}{acts}", epilogue if given else None)


def _mxint4(a: SimpleNamespace, gated: bool) -> Given:
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    return Given(weights.activations(a.hidden_states), weights.block_scaled(data, scales, gated, "mxint4"), "mxint4")


KINDS: dict[str, Callable[[SimpleNamespace, bool], Given]] = {
    "bf16": _bf16,
    "fp8_per_tensor_scale": _fp8_tensor,
    "fp8_block_scale": _fp8_block,
    "fp4_block_scale": _fp4,
    "mxint4_block_scale": _mxint4,
}
NAMES = tuple(f"trtllm_{kind}{form}_moe" for kind in KINDS for form in ("", "_routed"))


def read_trtllm(name: str, arguments: Mapping[str, Any]) -> Layer:
    """The layer of the call of `name` with these arguments; the exceptions of its twin for what the library refuses."""
    kind = name.removeprefix("trtllm_").removesuffix("_moe").removesuffix("_routed")
    a = bound(ENTRIES[f"{MOE}.{name}"], arguments)
    checks.arguments(a, biased=kind == "fp4_block_scale")
    if routing.shared(a):
        raise NotImplementedError("num_fused_shared_experts")
    member = ActivationType(getattr(a, "activation_type", ActivationType.Swiglu))
    checks.per_expert(a, *(n for n in vars(a) if n.startswith("output") and n.endswith("_scalar")), *_parameters(a))
    given = KINDS[kind](a, member.is_gated)
    factors = _factors(given.scales, member.name, a.local_num_experts)
    routed, weight = _routed(a)
    layer = Layer(
        x=given.x,
        matrices=partial(_matrices, given.weights, factors, member.is_gated),
        routed=routed,
        local=range(a.local_expert_offset, a.local_expert_offset + a.local_num_experts),
        experts=a.num_experts,
        inter=a.intermediate_size,
        activation=_activation(a, member.name, given.scales),
        out=torch.bfloat16,
        rounding=Rounding(),
        middle_scale=factors.unit if given.recipe in ("fp8_tensor-fp8_tensor", "nvfp4-nvfp4") else None,
        biases=None if given.weights.biases == (None, None) else partial(_biases, given.weights, factors, member.is_gated),
        on_input=getattr(a, "use_routing_scales_on_input", False),
    )
    declared = rounding(replace(layer.case, recipe=Recipe.parse(given.recipe)))
    return replace(layer, rounding=replace(declared, x=None, routing_weight=weight))


@dataclass(frozen=True)
class Factors:
    """What accumulators are multiplied by, [experts] each, to be the gate, the linear half and the output; unit: what GEMM 2's
    input is a multiple of."""

    gate: Tensor
    up: Tensor
    down: Tensor
    unit: float


def _factors(scales: tuple[Tensor, Tensor, Tensor] | None, member: str, experts: int) -> Factors:
    """Source: `Epilogue.activate` of the twin, from KernelRunner.h. ValueError for weights scaled to nothing."""
    if scales is None:
        one = torch.ones(experts)
        return Factors(one, one, one, 1.0)
    first, gate, second = (scale.double() for scale in scales)
    for name, scale in zip(("first", "gate"), (first, gate), strict=True):
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"GEMM 1's {name} scale is not positive for every expert: {scale.tolist()[:4]}")
    unit = uniform(
        "the scale of GEMM 2's input, the first of GEMM 1's over the gate's,", first / gate if member in LINEAR else first
    )
    up = first / unit if member in LINEAR else gate
    return Factors(gate.float(), up.float(), (second * unit).float(), unit)


def _matrices(given: weights.Weights, factors: Factors, gated: bool, e: int) -> tuple[Tensor | None, Tensor, Tensor]:
    first, down = given.first(e), given.second(e) * factors.down[e]
    if not gated:
        return None, first * factors.gate[e], down
    up, gate = first.chunk(2)
    return gate * factors.gate[e], up * factors.up[e], down


def _biases(given: weights.Weights, factors: Factors, gated: bool, e: int) -> Triple:
    """They are in units of accumulators; what is not given is 0."""
    first, second = (None if bias is None else bias(e) for bias in given.biases)
    if first is None:
        first = torch.zeros(given.first(e).shape[0])
    if second is None:
        second = torch.zeros(given.second(e).shape[0])
    up, gate = first.chunk(2) if gated else (first, None)
    down = second * factors.down[e] / factors.unit
    return (None, up * factors.gate[e], down) if gate is None else (gate * factors.gate[e], up * factors.up[e], down)


def _parameters(a: SimpleNamespace) -> list[str]:
    return [name for name in checks.PARAMETERS if getattr(a, name, None) is not None]


def _activation(a: SimpleNamespace, member: str, scales: tuple[Tensor, Tensor, Tensor] | None) -> str:
    """Our name of the activation and the constants given with it."""
    given = {name: getattr(a, name) for name in _parameters(a)}
    if member == "SwigluStep" and scales is not None and "gemm1_clamp_limit" in given:
        given["gemm1_clamp_limit"] = given["gemm1_clamp_limit"] * scales[1]
        limit = uniform("gemm1_clamp_limit times the gate's scale", given["gemm1_clamp_limit"])
        if abs(limit - SWIGLU_STEP) <= SAME * SWIGLU_STEP:
            given["gemm1_clamp_limit"] = torch.tensor([SWIGLU_STEP])
    elif scales is not None and given and member != "Situ":
        raise NotImplementedError(f"{', '.join(given)} with scales of accumulators: clamped there, which the reference is not")
    ours = {"gemm1_alpha": "alpha", "gemm1_beta": "beta", "gemm1_clamp_limit": "limit"}
    if member == "Situ":
        ours |= {"gemm1_alpha": "beta", "gemm1_beta": "linear_beta"}
    return activation(member, {ours[name]: uniform(name, value) for name, value in given.items()})


def _routed(a: SimpleNamespace) -> tuple[Routed, str | None]:
    """The routing, and what the kernel rounds its weights to: recorded ones are what they are."""
    if hasattr(a, "topk_ids"):
        return handed(*routing.unpack(a), a.num_experts), None
    name, rule = _rule(a)
    bias = None
    if rule.biased:
        bias = torch.zeros(a.num_experts) if a.routing_bias is None else a.routing_bias.float()
    known = name != HANDED
    found = rule(a.routing_logits, bias, a.top_k)
    return Routed(found, name, a.routing_logits if known else None, bias if known else None), "bf16"


def _rule(a: SimpleNamespace) -> tuple[str, Rule]:
    """The rule, and its name where it has the reference's constants."""
    member = RoutingMethodType(a.routing_method_type).name
    if member == "SigmoidRenorm" and not getattr(a, "norm_topk_prob", True):
        member = "Sigmoid"
    names = [name for name, method in METHODS.items() if method.member == member]
    if not names:
        raise NotImplementedError(f"routing method {member}")
    rules = [RULES[name] for name in names]
    if member not in ("DeepSeekV3", "MiniMax2"):
        return names[0], rules[0]
    grouped = member == "DeepSeekV3" and (a.n_group or 0) > 1
    groups, scale = (
        (a.n_group, a.topk_group) if grouped else (1, 1),
        1.0 if a.routed_scaling_factor is None else a.routed_scaling_factor,
    )
    same = next((rule for rule in rules if (rule.groups, rule.scale) == (groups, scale)), None)
    rule = replace(same or rules[0], groups=groups, scale=scale, bias_dtype=torch.bfloat16 if grouped else None)
    if problem := rule.problem(a.num_experts, a.top_k):
        raise ValueError(problem)
    return (HANDED if same is None else same.name), rule
