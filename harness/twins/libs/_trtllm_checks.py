"""What FlashInfer 0.7.2.post1 refuses before a trtllm_*_moe runs: its launcher's checks, in its words.

Source: data/csrc/trtllm_fused_moe_kernel_launcher.cu (check_routing, check_moe), fused_moe/core.py and
fused_moe/shared/validation.py. What this twin does not compute is a NotImplementedError.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from torch import Tensor

from harness.twins.libs._trtllm_routing import check, shared
from harness.twins.libs.flashinfer_enums import ActivationType, RoutingMethodType, SfLayout, WeightLayout

ABSENT: tuple[str, ...] = ("gemm1_lora_delta", "per_token_scale")
BIASES = ("gemm1_bias", "gemm2_bias")
ABSENT += ("valid_hidden_size", "valid_intermediate_size")
PARAMETERS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
MAX_TOP_K = 8  # of FP8 block scales with DeepSeekV3 routing and up to 384 experts
FP8 = torch.float8_e4m3fn


def arguments(a: SimpleNamespace, biased: bool = False) -> None:
    """What holds for every entry point: sizes, routing inputs, the caller's buffers. biased: it takes biases here."""
    for name in () if biased else BIASES:
        if getattr(a, name, None) is not None:
            raise NotImplementedError(f"this twin does not take {name}")
    for name in ABSENT:
        if getattr(a, name, None):
            raise NotImplementedError(f"this twin does not take {name}")
    _fused(a)
    tokens = a.hidden_states.shape[0]
    check(a.hidden_states.dim() == 2, "hidden_states must be 2D.")
    check(0 < a.top_k <= a.num_experts, "top_k must be between 1 and num_experts")
    check(0 < a.local_num_experts <= a.num_experts, "local_num_experts must be between 1 and num_experts")
    inside = a.local_expert_offset >= 0 and a.local_expert_offset + a.local_num_experts <= a.num_experts
    check(inside, "expert offset and count must be within valid range")
    logits, bias = getattr(a, "routing_logits", None), getattr(a, "routing_bias", None)
    if logits is not None:
        check(logits.dtype in (torch.float32, torch.bfloat16), "routing_logits must be float or bfloat16.")
        check(logits.shape[0] == tokens, "routing_logits and hidden_states must have the same number of tokens.")
        check(logits.shape[1] == a.num_experts, "routing_logits dim1 must match num_experts.")
    if bias is not None:
        check(bias.dtype in (torch.float32, torch.bfloat16), "routing_bias must be bfloat16 or float.")
        check(tuple(bias.shape) == (a.num_experts,), "routing_bias has incorrect shape.")
    if hasattr(a, "topk_ids"):
        ids = a.topk_ids[0] if isinstance(a.topk_ids, tuple) else a.topk_ids
        check(tuple(ids.shape) == (tokens, a.top_k), "expert_indices dim1 must match top_k.")
    _replay(a, tokens)
    if a.output is not None and a.do_finalize:
        hidden = a.hidden_states.shape[1] * (2 if a.hidden_states.dtype == torch.uint8 else 1)
        if tuple(a.output.shape) != (tokens, hidden) or a.output.dtype is not torch.bfloat16:
            raise ValueError(f"output: wanted bf16 {(tokens, hidden)}, got {a.output.dtype} {tuple(a.output.shape)}")


def _fused(a: SimpleNamespace) -> None:
    """_validate_fused_shared_experts: the routing kernel counts from local_expert_offset to the shared experts' rows."""
    if not shared(a):
        return
    if hasattr(a, "topk_ids"):
        raise NotImplementedError("this twin does not take num_fused_shared_experts where routing was decided before")
    if a.local_expert_offset != 0 or a.local_num_experts != a.num_experts:
        text = "Fused shared experts (num_fused_shared_experts > 0) do not yet support expert parallelism"
        raise ValueError(f"{text}: require local_expert_offset == 0 and local_num_experts == num_experts.")
    if a.routing_method_type != RoutingMethodType.DeepSeekV3:
        text = "Fused shared experts (num_fused_shared_experts > 0) are only supported with DeepSeekV3 routing_method_type."
        raise ValueError(text)


def _replay(a: SimpleNamespace, tokens: int) -> None:
    replay = getattr(a, "routing_replay_out", None)
    if replay is None:
        return
    if replay.dtype is not torch.int16:
        raise ValueError(f"routing_replay_out must be int16, got {replay.dtype}")
    if replay.dim() != 2 or replay.shape[1] != a.top_k or replay.shape[0] < tokens:
        raise ValueError(f"routing_replay_out must be [num_tokens, top_k], got {tuple(replay.shape)}")


def activation(a: SimpleNamespace, known: tuple[ActivationType, ...]) -> ActivationType:
    """The activation asked for, one of `known`; its parameters are taken with Swiglu only, a limit with SwigluStep too."""
    given = ActivationType(a.activation_type)
    check(given in known, f"Unsupported activation type {given.name}")
    named = [name for name in ("gemm1_alpha", "gemm1_beta") if getattr(a, name, None) is not None]
    if given is ActivationType.SwigluStep and named:
        raise ValueError("ActivationType.SwigluStep accepts gemm1_clamp_limit only.")
    return given


def swiglu_parameters(a: SimpleNamespace) -> None:
    """float32 [local experts] each, for Swiglu; for SwigluStep a limit. FP4 does not ask."""
    per_expert(a, *PARAMETERS)
    given = any(getattr(a, name) is not None for name in PARAMETERS)
    if given and a.activation_type not in (ActivationType.Swiglu, ActivationType.SwigluStep):
        raise ValueError(f"{', '.join(PARAMETERS)} are only supported for ActivationType.Swiglu.")


def per_expert(a: SimpleNamespace, *names: str, required: bool = False) -> None:
    """float32 [local experts, fused shared ones among them] each, where given."""
    for name in names:
        value = getattr(a, name)
        check(value is not None or not required, f"{name} is required")
        if value is not None:
            check(value.dtype == torch.float32, f"{name} must be float.")
            check(tuple(value.shape) == (a.local_num_experts + shared(a),), f"{name} has incorrect dim 0.")


def biases(a: SimpleNamespace, gated: bool, hidden: int) -> None:
    """FP4BlockScaleLauncher::check_moe: float32 [local experts, rows of the weights], where given."""
    for name, rows in zip(BIASES, (a.intermediate_size * (2 if gated else 1), hidden), strict=True):
        bias = getattr(a, name)
        if bias is not None:
            what = "GEMM1_M" if name == "gemm1_bias" else "hidden_size"
            check(bias.dtype == torch.float32, f"{name} must be float32.")
            shape = (a.local_num_experts + shared(a), rows)
            check(tuple(bias.shape) == shape, f"{name} must have shape [local_num_experts, {what}].")


def matrices(a: SimpleNamespace, gated: bool, layout: int) -> None:
    """check_weights_shape of both weights: [experts, rows, K], or [experts, K / block, rows, block]."""
    hidden = a.hidden_states.shape[1]
    wanted = {"gemm1": (a.intermediate_size * (2 if gated else 1), hidden), "gemm2": (hidden, a.intermediate_size)}
    for name, (rows, k) in wanted.items():
        stored: Tensor = getattr(a, f"{name}_weights")
        blocked = layout == WeightLayout.BlockMajorK
        check(
            stored.dim() == (4 if blocked else 3),
            f"{name} weights must be [experts, {'K/block_k, M, block_k' if blocked else 'M, K'}].",
        )
        given = (stored.shape[2], stored.shape[1] * stored.shape[3]) if blocked else tuple(stored.shape[1:])
        check(given[0] == rows, f"{name} weights M dimension: intermediate_size or hidden_size has incorrect shape.")
        check(given[1] == k, f"{name} weights K dimension must be equal to {k}.")
        experts = a.local_num_experts + shared(a)
        text = f"{name} weights dim 0 must be local_num_experts + num_fused_shared_experts."
        check(not shared(a) or stored.shape[0] == experts, text)


def fp8_routing(a: SimpleNamespace) -> None:
    """What only Fp8BlockScaleLauncher asks of the routing."""
    method = RoutingMethodType(a.routing_method_type)
    if method is RoutingMethodType.DeepSeekV3:
        check(bool(a.n_group and a.topk_group), "n_group should not be zero for DeepSeekV3 routing")
        check(
            a.top_k <= MAX_TOP_K or a.num_experts > 384,
            f"Current routing kernel (with groups) only supports top_k<={MAX_TOP_K}",
        )
        selectable = a.topk_group * a.num_experts // a.n_group
        check(a.top_k < selectable, "top_k must be less than total number of experts in selected groups")
    else:
        check((a.n_group or 0) <= 1, "Current routing kernel (no groups) only supports n_group <= 1")
    check(a.num_experts % 4 == 0, "Routing kernel expects that num_experts must be divisible by 4")
    check(a.num_experts > a.top_k, "num_experts must be greater than top_k")


def linear_scales(a: SimpleNamespace) -> None:
    """The layout of the activations' scales: only the linear one is taken, and leaving it out is deprecated."""
    layout = a.hidden_states_scale_layout
    if layout is None and a.hidden_states_scale is not None:
        text = "Calling a trtllm-gen block-scale MoE op with a `hidden_states_scale` but without `hidden_states_scale_layout`"
        warnings.warn(f"{text} is deprecated", DeprecationWarning, stacklevel=4)
    elif layout is not None and layout != SfLayout.layout_linear:
        raise NotImplementedError(f"hidden_states_scale_layout={layout!r} is not supported by the trtllm-gen MoE path")
