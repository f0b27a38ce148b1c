"""FlashInfer 0.7.2.post1's trtllm_*_moe, in torch: SM100 and SM103 kernels whose cubins nobody else can run.

The signatures are the library's (_trtllm_signatures.py); a finalized bf16 or FP8 layer is a tensor, everything else a list.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.twins.libs import _trtllm_checks as checks
from harness.twins.libs import _trtllm_layer as layer
from harness.twins.libs import _trtllm_routing as routing
from harness.twins.libs import _trtllm_weights as weights
from harness.twins.libs._signature import Function, signed
from harness.twins.libs._trtllm_checks import FP8
from harness.twins.libs._trtllm_layer import Epilogue
from harness.twins.libs._trtllm_routing import check, shared
from harness.twins.libs._trtllm_signatures import SIGNATURES
from harness.twins.libs.flashinfer_enums import ENUMS, ActivationType, Fp8QuantizationType, WeightLayout

A = ActivationType
TILE_K = 128  # intermediate sizes are multiples of it


def _routed(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The step's routing, and the caller's replay buffer written."""
    ids, expert_weights = routing.unpack(a) if hasattr(a, "topk_ids") else routing.route(a)
    replay = getattr(a, "routing_replay_out", None)
    if replay is not None:
        replay[: len(ids)] = ids[:, : a.top_k].to(torch.int16)  # fused shared experts are not recorded
    return ids, expert_weights


def _given(a: SimpleNamespace) -> dict[str, Any]:
    """The activation's parameters, as Epilogue names them."""
    return {"alpha": a.gemm1_alpha, "beta": a.gemm1_beta, "limit": a.gemm1_clamp_limit}


def bf16(a: SimpleNamespace) -> list[Tensor]:
    """bf16 activations and weights."""
    checks.arguments(a)
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        check(getattr(a, name).dtype == torch.bfloat16, f"BF16 MoE: {name} must be bfloat16.")
    activation = checks.activation(a, (A.Swiglu, A.SwigluStep, A.Relu2))
    check(a.weight_layout == WeightLayout.BlockMajorK, "BF16 Moe: weight_layout must be BlockMajorK")
    check(a.use_shuffled_weight, "BF16 MoE: no kernel for weights that are not shuffled")
    checks.matrices(a, activation.is_gated, a.weight_layout)
    checks.swiglu_parameters(a)
    check(a.intermediate_size % TILE_K == 0, "the second dimension of weights must be a multiple of 128.")
    epilogue = Epilogue(activation, layer.as_bf16, **_given(a))
    matrices = weights.bf16(a.gemm1_weights, a.gemm2_weights, activation.is_gated)
    return layer.run(a, a.hidden_states.float(), _routed(a), matrices, epilogue)


def fp8_per_tensor(a: SimpleNamespace) -> list[Tensor]:
    """E4M3 activations and weights, one scale per tensor, applied as three numbers per expert."""
    checks.arguments(a)
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        check(getattr(a, name).dtype == FP8, f"FP8 MoE: {name} must be float8_e4m3fn.")
    logits = getattr(a, "routing_logits", None)
    if a.use_routing_scales_on_input and logits is not None:
        check(logits.dtype == torch.bfloat16, "routing_logits must be bfloat16 when routing scales are applied on input.")
    activation = checks.activation(a, (A.Swiglu, A.Geglu, A.Relu2, A.SwigluStep, A.Identity))
    checks.per_expert(a, "output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar", required=True)
    checks.per_expert(a, "gemm1_clamp_limit")
    scales = (a.output1_scales_scalar, a.output1_scales_gate_scalar, a.output2_scales_scalar)
    epilogue = Epilogue(activation, layer.e4m3, *scales, limit=a.gemm1_clamp_limit)
    matrices = weights.fp8(a.gemm1_weights, a.gemm2_weights, activation.is_gated)
    return layer.run(a, weights.activations(a.hidden_states), _routed(a), matrices, epilogue)


def fp8_block(a: SimpleNamespace) -> list[Tensor]:
    """E4M3 with float32 scales per 128 (DeepSeekFp8) or E8M0 scales per 32 (MxFp8), of activations and weights."""
    checks.arguments(a)
    kind = Fp8QuantizationType(a.fp8_quantization_type)
    if kind not in (Fp8QuantizationType.DeepSeekFp8, Fp8QuantizationType.MxFp8):
        raise NotImplementedError("trtllm_fp8_block_scale_moe only supports DeepSeekFp8 or MxFp8.")
    tokens = a.hidden_states.shape[0]
    check(hasattr(a, "routing_logits") or tokens > 0, "Either routing_logits or expert_indices must be provided.")
    checks.fp8_routing(a)
    for name in ("hidden_states", "gemm1_weights", "gemm2_weights"):
        check(getattr(a, name).dtype == FP8, f"{name} must be fp8.")
    checks.swiglu_parameters(a)
    return _deepseek(a) if kind is Fp8QuantizationType.DeepSeekFp8 else _mxfp8(a)


def _deepseek(a: SimpleNamespace) -> list[Tensor]:
    """The scales of x are transposed; GEMM 1's output is quantised, then activated by a kernel of its own."""
    if ActivationType(a.activation_type) is not A.Swiglu:
        raise NotImplementedError("DeepSeekFp8 only supports ActivationType::Swiglu in this runner path.")
    tokens, hidden = a.hidden_states.shape
    inter, experts = a.intermediate_size, a.local_num_experts + shared(a)
    check(inter % TILE_K == 0, "intermediate_size must be a multiple of 128.")
    wanted = {
        "hidden_states_scale": (hidden // 128, tokens),
        "gemm1_weights_scale": (experts, 2 * inter // 128, hidden // 128),
        "gemm2_weights_scale": (experts, hidden // 128, inter // 128),
    }
    for name, shape in wanted.items():
        scales = getattr(a, name)
        check(scales.dtype == torch.float32, f"{name} must be float.")
        check(tuple(scales.shape) == shape, f"{name} has incorrect shape.")
    checks.matrices(a, True, a.weight_layout)
    epilogue = Epilogue(A.Swiglu, layer.through("fp8_group:trtllm"), narrow=layer.through("fp8_group"), **_given(a))
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    x = weights.activations(a.hidden_states, a.hidden_states_scale.T)
    return layer.run(a, x, _routed(a), weights.deepseek(data, scales, a.use_shuffled_weight), epilogue)


def _mxfp8(a: SimpleNamespace) -> list[Tensor]:
    for name in ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale"):
        check(getattr(a, name).dtype == torch.uint8, f"{name} must be uint8.")
    check(a.use_shuffled_weight, "use_shuffled_weight must be true for MxFp8.")
    check(a.weight_layout == WeightLayout.MajorK, "weight_layout must be MajorK for MxFp8.")
    activation = checks.activation(a, (A.Swiglu, A.Geglu, A.Relu2, A.SwigluStep, A.Identity))
    checks.matrices(a, activation.is_gated, a.weight_layout)
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    matrices = weights.block_scaled(data, scales, activation.is_gated, "mxfp8")
    x = weights.activations(a.hidden_states, a.hidden_states_scale)
    return layer.run(a, x, _routed(a), matrices, Epilogue(activation, layer.through("mxfp8"), **_given(a)))


def fp4(a: SimpleNamespace) -> list[Tensor]:
    """E2M1 weights with E4M3 scales per 16 and NVFP4 activations, or E8M0 scales per 32 and MXFP8 or bf16 activations; which,
    the dtypes and the number of scales say."""
    checks.arguments(a, biased=True)
    checks.linear_scales(a)
    gated = ActivationType(a.activation_type).is_gated
    for name in ("gemm1_weights", "gemm2_weights"):
        check(getattr(a, name).dtype == torch.uint8, f"{name} must be byte.")
        check(getattr(a, f"{name}_scale").dtype == FP8, f"{name}_scale must be fp8.")
    hidden = a.hidden_states.shape[1] * (2 if a.hidden_states.dtype == torch.uint8 else 1)
    count = (a.local_num_experts + shared(a)) * a.intermediate_size * (2 if gated else 1) * hidden
    vector = 32 if count // a.gemm1_weights_scale.numel() > 16 else 16
    check(a.gemm1_weights_scale.numel() >= count // vector, "weight scale tensor too small")
    known = (A.Swiglu, A.Geglu, A.Relu2, A.Identity, A.Situ) + ((A.SwigluStep,) if vector == 16 else ())
    activation = checks.activation(a, known)
    scales = (a.output1_scale_scalar, a.output1_scale_gate_scalar, a.output2_scale_scalar)
    names = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    checks.per_expert(a, *names, required=vector == 16)
    checks.per_expert(a, *checks.PARAMETERS)
    x, middle = _fp4_activations(a, vector, hidden)
    matrices = weights.block_scaled(
        (a.gemm1_weights, a.gemm2_weights),
        (a.gemm1_weights_scale, a.gemm2_weights_scale),
        activation.is_gated,
        "nvfp4" if vector == 16 else "mxfp4",
    ).with_biases(a.gemm1_bias, a.gemm2_bias, activation.is_gated)
    checks.biases(a, activation.is_gated, hidden)
    return layer.run(a, x, _routed(a), matrices, Epilogue(activation, middle, *scales, **_given(a)))


def _fp4_activations(a: SimpleNamespace, vector: int, hidden: int) -> tuple[Tensor, Any]:
    """(x float32 [tokens, hidden], how the middle is quantised), by the dtype of x."""
    x, scales = a.hidden_states, a.hidden_states_scale
    if x.dtype == torch.bfloat16:
        check(vector == 32, "Only MxE2m1 weights are supported by block scale MoE with Bfloat16 activation")
        return x.float(), layer.as_bf16
    check(scales is not None and scales.dtype == FP8, "hidden_states_scale must be provided, as fp8")
    per_scale = x.shape[0] * hidden // scales.numel() if scales.numel() else vector
    if x.dtype == torch.uint8:
        check(vector == per_scale == 16, "Only E2m1 weights are supported by block scale MoE with E2m1 activation")
        nvfp4 = layer.through("nvfp4", 1.0)
        return weights.activations(x, scales), lambda middle: nvfp4(layer.as_bf16(middle))
    check(x.dtype == FP8, "hidden_states must be bf16, fp8 or uint8 (packed fp4).")
    check(vector == per_scale == 32, "Unsupported hidden state scale shape.")
    return weights.activations(x, scales), layer.through("mxfp8")


def mxint4(a: SimpleNamespace) -> list[Tensor]:
    """bf16 activations, int4 weights with bf16 scales per 32."""
    checks.arguments(a)
    check(a.hidden_states.dtype == torch.bfloat16, "hidden_states must be bf16.")
    for name in ("gemm1_weights", "gemm2_weights"):
        check(getattr(a, name).dtype == torch.uint8, "weights must be int4 packed in uint8.")
        check(getattr(a, f"{name}_scale").dtype == torch.bfloat16, f"{name}_scale must be bf16.")
    count = a.local_num_experts * a.intermediate_size * 2 * a.hidden_states.shape[1]
    check(count // a.gemm1_weights_scale.numel() == 32, "unsupported weight_scale_vec_size.")
    checks.per_expert(a, *checks.PARAMETERS)
    data, scales = (a.gemm1_weights, a.gemm2_weights), (a.gemm1_weights_scale, a.gemm2_weights_scale)
    matrices = weights.block_scaled(data, scales, True, "mxint4")
    return layer.run(a, a.hidden_states.float(), _routed(a), matrices, Epilogue(A.Swiglu, layer.as_bf16, **_given(a)))


def _entry(name: str, compute: Any, tensor: bool) -> Function:
    """The twin called `name`; `tensor`: a finalized layer comes back bare."""

    def twin(a: SimpleNamespace) -> Any:
        done = compute(a)
        return done[0] if tensor and a.do_finalize else done

    twin.__name__ = twin.__qualname__ = name
    twin.__doc__ = compute.__doc__
    return signed(SIGNATURES[name], ENUMS)(twin)


FAMILIES = {
    "bf16": (bf16, True),
    "fp8_per_tensor_scale": (fp8_per_tensor, True),
    "fp8_block_scale": (fp8_block, True),
    "fp4_block_scale": (fp4, False),
    "mxint4_block_scale": (mxint4, False),
}
ENTRIES = {
    f"flashinfer.fused_moe.{name}": _entry(name, *family)
    for kind, family in FAMILIES.items()
    for name in (f"trtllm_{kind}_moe", f"trtllm_{kind}_routed_moe")
}
