"""What the backends of FlashInfer's trtllm_*_moe share: the step's data, routing, weights in trtllm-gen's layouts, the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backends._packing import Stack
from harness.backends.base import Launch
from harness.case import Case
from harness.entry import resolve
from harness.guard import Argument, Entry, refuse
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS

MOE = "flashinfer.fused_moe"
TILE = 128  # epilogueTileM of every kernel but DeepSeek FP8's: trtllm_fused_moe_runner.cu, getOptions
BLOCK_BYTES = 128  # of BlockMajorK: core.py, weight_layout
NO_BIAS = ("trtllm_bf16_routed_moe", "trtllm_mxint4_block_scale_routed_moe")  # have no routing_bias; the other forms want it
UNROUTED = "Renormalize"  # of precomputed routing: any method with kernels, its scores are not computed


@dataclass(frozen=True)
class Method:
    """A routing rule as the library is asked for it: member of RoutingMethodType, groups and scale where it takes them."""

    member: str
    groups: tuple[int, int] | None = None
    scale: float | None = None


METHODS = {
    "default": Method("Default"),
    "renormalize": Method("Renormalize"),
    "renormalize_naive": Method("RenormalizeNaive"),
    "deepseek_v3": Method("DeepSeekV3", (8, 4), 2.5),  # DeepSeek-V3 config.json: n_group, topk_group, routed_scaling_factor
    "kimi_k2": Method("DeepSeekV3", (1, 1), 2.827),  # Kimi-K2 config.json
    "llama4": Method("Llama4"),
    "topk": Method("TopK"),
    "topk_sigmoid": Method("TopKSigmoid"),
    "sigmoid": Method("Sigmoid"),
    "sigmoid_renorm": Method("SigmoidRenorm"),
    "minimax2": Method("MiniMax2"),
}
FUSED = {"deepseek_v3_shared": METHODS["deepseek_v3"]}  # the only method whose kernel writes the shared slots
MEMBERS = {
    "swiglu": "Swiglu",
    "swiglu_oai": "Swiglu",  # with alpha, beta and a clamp
    "swiglu_step": "SwigluStep",
    "geglu": "Geglu",
    "situ": "Situ",
    "relu2": "Relu2",
    "identity": "Identity",
}


@dataclass(frozen=True)
class Library:
    """FlashInfer for tensors on `device`: the library itself on an accelerator, twins on a CPU."""

    device: str

    def member(self, enum: str, name: str) -> Any:
        """A member of one of its enums, by name: the values move between releases."""
        return resolve(f"flashinfer.tllm_enums.{enum}", self.device)[name]  # type: ignore[index]

    def function(self, name: str) -> Callable[..., Any]:
        """A function by the name behind `flashinfer.`."""
        return resolve(f"flashinfer.{name}", self.device)

    def shuffled(self, matrices: Tensor, gated: bool, tile: int = TILE) -> Tensor:
        """[experts, rows, columns] with rows [up; gate] reordered for the gate, then shuffled for the MMA."""
        reorder, shuffle = self.function("reorder_rows_for_gated_act_gemm"), self.function("shuffle_matrix_a")
        return torch.stack([shuffle(reorder(m) if gated else m, tile) for m in matrices])

    def shuffled_scales(self, scales: Tensor, gated: bool) -> Tensor:
        """Block scales [experts, rows, blocks] with the rows of their weights, in the 128x4 interleave; the same shape."""
        reorder, shuffle = self.function("reorder_rows_for_gated_act_gemm"), self.function("shuffle_matrix_sf_a")
        return torch.stack([shuffle(reorder(m) if gated else m, TILE) for m in scales]).view(scales.shape)

    def blocked(self, matrices: Tensor) -> Tensor:
        """uint8 [experts, rows, bytes] as BlockMajorK, [experts, bytes / 128, rows, 128]."""
        convert = self.function("fused_moe.convert_to_block_layout")
        return torch.stack([convert(m, BLOCK_BYTES) for m in matrices])


def gated(case: Case) -> bool:
    """Has w13 an up half?"""
    return ACTIVATIONS[case.activation].gated


def packed_topk(ids: Tensor, weights: Tensor) -> Tensor:
    """int32 [tokens, top_k]: the expert above the bits of its bf16 weight, masked: a negative weight's sign is no id's."""
    bits = weights.to(torch.bfloat16).contiguous().view(torch.int16).int() & 0xFFFF
    return (ids.int() << 16) | bits


def activation_parameters(case: Case, gate: Tensor | None, experts: int, device: str) -> dict[str, Tensor | None]:
    """gemm1_alpha, gemm1_beta, gemm1_clamp_limit: float32 [experts] or None. SwigluStep's limit is counted in accumulators of
    GEMM 1, so `gate`, what they are multiplied by, divides it; SiTU's alpha is the gate's and its beta the linear half's."""
    given = ACTIVATIONS[case.activation].parameters
    alpha, beta, limit = given.get("alpha"), given.get("beta"), given.get("limit")
    if case.activation == "situ":
        alpha, beta, limit = given["beta"], given["linear_beta"], None
    values = {"gemm1_alpha": alpha, "gemm1_beta": beta, "gemm1_clamp_limit": limit}
    full = {n: None if v is None else torch.full((experts,), v, device=device) for n, v in values.items()}
    if case.activation == "swiglu_step" and limit is not None and gate is not None:
        full["gemm1_clamp_limit"] = limit / gate
    return full


def epilogue_scales(w13: Stack, w2: Stack, x_scale: float, middle_scale: float, linear: bool) -> dict[str, Tensor]:
    """The three numbers per expert, float32 [experts], of weights with one factor a matrix: accumulator -> value of the gate,
    accumulator -> what GEMM 2's input is scaled by (`linear`: it dequantises the linear half too), GEMM 2's accumulator.

    Source: FlashInfer 0.7.2.post1 fused_moe/prepare.py, prepare_trtllm_fp8_per_tensor_weights.
    """
    assert w13.factors is not None
    assert w2.factors is not None
    gate = (w13.factors[:, 0] / x_scale).contiguous()
    first = gate * middle_scale if linear else torch.full_like(gate, middle_scale)
    return {"gate": gate, "first": first, "second": (w2.factors[:, 0] / middle_scale).contiguous()}


@dataclass(frozen=True)
class Packed:
    """A case packed for one entry point. weights: tensors by the names of its arguments; fixed: its other arguments that no
    step changes; activations(x): x [tokens, hidden] as it takes it, by the names of its arguments; contract: what it asks of
    its tensors; tactics: the same layer with other fixed arguments, made when asked for."""

    weights: Mapping[str, Tensor]
    fixed: Mapping[str, object]
    activations: Callable[[Tensor], dict[str, Tensor | None]]
    contract: tuple[Argument, ...]
    tactics: Mapping[str, Callable[[], Mapping[str, object]]]


def finalized(rows: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """What do_finalize=False leaves to the caller: bf16 [tokens, hidden], each token's rows times their weights summed in
    float32. index int32 [tokens * top_k]: the slot's row, -1 for another rank's."""
    at = index.view(weights.shape).long()
    picked = rows[at.clamp(min=0).flatten()].view(*at.shape, rows.shape[1]).float() * weights.float().unsqueeze(-1)
    return torch.where((at >= 0).unsqueeze(-1), picked, 0.0).sum(1).to(rows.dtype)


def unwrapped(result: object, case: Case, device: str) -> Tensor:
    """The finalized layer of a release that returns it bare or as a list of one (flashinfer#2548, and 0.8.0 again); Violation
    for anything else: the arguments meant something else there."""
    value = result[0] if isinstance(result, list | tuple) and len(result) == 1 else result
    refuse({"output": value}, (Argument("output", torch.bfloat16, (case.shape.tokens, case.shape.hidden)),), device)  # type: ignore[dict-item]
    return value  # type: ignore[return-value]


def step_buffers(inputs: Inputs, routed: bool) -> dict[str, Tensor]:
    """The step's data; contiguous, for the kernels look at no stride."""
    if routed:
        return {"x": inputs.x.contiguous(), "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
    bias = {} if inputs.bias is None else {"bias": inputs.bias}
    logits = inputs.logits.bfloat16() if inputs.case.weighting == "oninput" else inputs.logits  # check_routing asks for it
    return {"x": inputs.x.contiguous(), "logits": logits.contiguous(), **bias}


def layer_arguments(library: Library, case: Case, local: range, routed: bool) -> dict[str, object]:
    """Sizes, this rank's experts and the routing method."""
    method = Method(UNROUTED) if routed else {**METHODS, **FUSED}[case.routing]
    groups = method.groups or (None, None)
    shape = case.shape if routed else case.routed  # who routes counts no shared experts; who is handed ids counts all
    shared = case.shape.experts - shape.experts
    return {
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "n_group": groups[0],
        "topk_group": groups[1],
        "intermediate_size": shape.inter,
        "local_expert_offset": local.start,
        "local_num_experts": len(local) - shared,
        "routed_scaling_factor": method.scale,
        "routing_method_type": library.member("RoutingMethodType", method.member).value,
        **({"num_fused_shared_experts": shared} if shared else {}),
    }


def routing_arguments(buffers: Mapping[str, Tensor], routed: bool) -> dict[str, Tensor | None]:
    """topk_ids, or routing_logits and routing_bias, of this step."""
    if routed:
        return {"topk_ids": packed_topk(buffers["ids"], buffers["topk_weights"])}
    return {"routing_logits": buffers["logits"], "routing_bias": buffers.get("bias")}


def bind(name: str, packed: Packed, case: Case, inputs: Inputs) -> Launch:
    """The launch of the entry point `name`: by keyword throughout, since arguments are inserted in the middle
    (vllm#39315); unfinalized as a second tactic."""
    routed = name.endswith("_routed_moe")
    library = Library(inputs.device)
    buffers = {**step_buffers(inputs, routed), **packed.weights}
    fixed = {**layer_arguments(library, case, inputs.local, routed), **packed.fixed}
    if routed and name not in NO_BIAS:
        fixed["routing_bias"] = None
    output = Argument("output", torch.bfloat16, (case.shape.tokens, case.shape.hidden), contiguous=True, written=True)
    function = Entry(library.function(f"fused_moe.{name}"), (*packed.contract, output))

    def result(**other: object) -> Any:
        weights = {key: buffers[key] for key in packed.weights}
        step = {**routing_arguments(buffers, routed), **packed.activations(buffers["x"])}
        return function(**{**step, **weights, **fixed, **other})

    def call(other: Callable[[], Mapping[str, object]] = dict) -> Tensor:
        return unwrapped(result(**other()), case, inputs.device)

    def out(buffer: Tensor) -> Tensor:
        return call(lambda: {"output": buffer})

    tactics: dict[str, Callable[[], Tensor]] = {key: partial(call, make) for key, make in packed.tactics.items()}

    def unfinalized() -> Tensor:
        rows, weights, index = result(do_finalize=False)
        return finalized(rows, torch.ones_like(weights) if case.weighting == "oninput" else weights, index)

    tactics["unfinalized"] = unfinalized
    return Launch(call, buffers, out=out, tactics=tactics)
