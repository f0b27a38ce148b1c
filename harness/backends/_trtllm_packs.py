"""Cases packed for FlashInfer's trtllm_*_moe: rows [up; gate], reordered for the gate, shuffled for an epilogue tile of 128.

Source of every layout: FlashInfer 0.7.2.post1 fused_moe/prepare.py, prepare_trtllm_*_weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from harness.backends._packing import Stack, biases, pack
from harness.backends._trtllm import BLOCK_BYTES, MEMBERS, Library, Packed, activation_parameters, epilogue_scales, gated
from harness.case import Case
from harness.guard import Argument
from harness.inputs import Inputs
from reference.format import Quantized
from reference.formats import get
from reference.layouts.linear import pack_nibbles

FP8 = torch.float8_e4m3fn
NAMES = ("gemm1_weights", "gemm2_weights")


def activation_member(case: Case, library: Library) -> dict[str, object]:
    """activation_type of a case."""
    return {"activation_type": library.member("ActivationType", MEMBERS[case.activation]).value}


def quantised(case: Case, inputs: Inputs, x: Tensor) -> Quantized:
    """x in the recipe's acts format; a fixed point of it, so that any right quantiser gives these values."""
    fmt = get(case.recipe.acts)
    assert fmt.scaling is not None
    if not fmt.scaling.static:
        return fmt.encode(x)
    scale = torch.tensor(inputs.x_scale, device=x.device)
    if fmt.scaling.global_scale:
        return fmt.encode(x, scale)
    return Quantized(fmt, fmt.element.encode(x.float() * scale).to(torch.uint8), (1 / scale).view(1, 1))


def sizes(case: Case, local: range) -> tuple[int, int, int, int]:
    """(local experts, rows of w13, hidden, inter)."""
    rows = case.shape.inter * (2 if gated(case) else 1)
    return len(local), rows, case.shape.hidden, case.shape.inter


def parameters_of(case: Case, inputs: Inputs) -> dict[str, object]:
    """Activation parameters where accumulators are values: no scale per expert follows GEMM 1."""
    return dict(activation_parameters(case, None, len(inputs.local), inputs.device))


def bf16(case: Case, inputs: Inputs) -> Packed:
    """BlockMajorK: [experts, K / 64, rows, 64]."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    stacks = pack(case, inputs, up_first=True)
    weights = {}
    for name, stack, reorder in zip(NAMES, stacks, (gated(case), False), strict=True):
        weights[name] = library.blocked(library.shuffled(stack.data.view(torch.uint8), reorder)).view(torch.bfloat16)
    width = BLOCK_BYTES // 2
    contract = (
        Argument("hidden_states", torch.bfloat16, (case.shape.tokens, hidden), contiguous=True),
        Argument(NAMES[0], torch.bfloat16, (experts, hidden // width, rows, width), contiguous=True),
        Argument(NAMES[1], torch.bfloat16, (experts, inter // width, hidden, width), contiguous=True),
    )
    layout = {"use_shuffled_weight": True, "weight_layout": library.member("WeightLayout", "BlockMajorK").value}
    fixed = {**layout, **activation_member(case, library), **parameters_of(case, inputs)}
    return Packed(weights, fixed, lambda x: {"hidden_states": x}, contract, {})


def mxint4(case: Case, inputs: Inputs) -> Packed:
    """Nibbles in BlockMajorK, bf16 scales per 32 through the interleave; the activation is Swiglu, with its parameters."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    weights = {}
    for name, stack, reorder in zip(NAMES, pack(case, inputs, up_first=True), (True, False), strict=True):
        assert stack.scales is not None
        weights[name] = library.blocked(library.shuffled(stack.data, reorder))
        weights[f"{name}_scale"] = library.shuffled_scales(stack.scales.bfloat16(), reorder)
    contract = (
        Argument("hidden_states", torch.bfloat16, (case.shape.tokens, hidden), contiguous=True),
        Argument(NAMES[0], torch.uint8, (experts, hidden // 2 // BLOCK_BYTES, rows, BLOCK_BYTES), contiguous=True),
        Argument(NAMES[1], torch.uint8, (experts, inter // 2 // BLOCK_BYTES, hidden, BLOCK_BYTES), contiguous=True),
        Argument("gemm1_weights_scale", torch.bfloat16, (experts, rows, hidden // 32), contiguous=True),
        Argument("gemm2_weights_scale", torch.bfloat16, (experts, hidden, inter // 32), contiguous=True),
    )
    return Packed(weights, parameters_of(case, inputs), lambda x: {"hidden_states": x}, contract, {})


def fp8_tensor(case: Case, inputs: Inputs) -> Packed:
    """One scale per tensor, handed over as three numbers per expert."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    w13, w2 = pack(case, inputs, up_first=True, one_factor=True)
    assert inputs.x_scale is not None
    assert inputs.middle_scale is not None
    scales = epilogue_scales(w13, w2, inputs.x_scale, inputs.middle_scale, gated(case))
    weights = {
        NAMES[0]: library.shuffled(w13.data, gated(case)).view(FP8),
        NAMES[1]: library.shuffled(w2.data, False).view(FP8),
        "output1_scales_scalar": scales["first"],
        "output1_scales_gate_scalar": scales["gate"],
        "output2_scales_scalar": scales["second"],
    }
    contract = (
        Argument("hidden_states", FP8, (case.shape.tokens, hidden), contiguous=True),
        Argument(NAMES[0], FP8, (experts, rows, hidden), contiguous=True),
        Argument(NAMES[1], FP8, (experts, hidden, inter), contiguous=True),
        *(Argument(name, torch.float32, (experts,)) for name in weights if name.startswith("output")),
    )
    limit = activation_parameters(case, scales["gate"], experts, inputs.device)["gemm1_clamp_limit"]
    weights |= {} if limit is None else {"gemm1_clamp_limit": limit}  # counted in this layer's accumulators
    fixed = {**activation_member(case, library), "use_routing_scales_on_input": case.weighting == "oninput"}
    acts = partial(quantised, case, inputs)
    return Packed(weights, fixed, lambda x: {"hidden_states": acts(x).codes.view(FP8)}, contract, {})


def fp8_block(case: Case, inputs: Inputs) -> Packed:
    """DeepSeek's float32 scales or MXFP8's E8M0 scales."""
    return _deepseek(case, inputs) if case.recipe.weights == "fp8_block" else _mxfp8(case, inputs)


def _deepseek(case: Case, inputs: Inputs) -> Packed:
    """Rows [up; gate] as they are; x's scales transposed, [hidden / 128, tokens]. The tactic `shuffled`: BlockMajorK weights
    shuffled for the epilogue tile of 64 that these kernels have."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    w13, w2 = pack(case, inputs, up_first=True)
    assert w13.scales is not None
    assert w2.scales is not None
    weights = {NAMES[0]: w13.data.view(FP8), NAMES[1]: w2.data.view(FP8)}
    weights |= {"gemm1_weights_scale": w13.scales, "gemm2_weights_scale": w2.scales}
    acts = partial(quantised, case, inputs)

    def activations(x: Tensor) -> dict[str, Tensor | None]:
        q = acts(x)
        assert q.scales is not None
        return {"hidden_states": q.codes.view(FP8), "hidden_states_scale": q.scales.T.contiguous()}

    def shuffled() -> dict[str, object]:
        other = {n: library.blocked(library.shuffled(weights[n].view(torch.uint8), False, tile=64)).view(FP8) for n in NAMES}
        layout = library.member("WeightLayout", "BlockMajorK").value
        return {**other, "use_shuffled_weight": True, "weight_layout": layout}

    contract = (
        Argument("hidden_states", FP8, (case.shape.tokens, hidden), contiguous=True),
        Argument("hidden_states_scale", torch.float32, (hidden // 128, case.shape.tokens), contiguous=True),
        Argument("gemm1_weights_scale", torch.float32, (experts, rows // 128, hidden // 128), contiguous=True),
        Argument("gemm2_weights_scale", torch.float32, (experts, hidden // 128, inter // 128), contiguous=True),
    )
    fixed = {**activation_member(case, library), **parameters_of(case, inputs)}
    fixed["fp8_quantization_type"] = library.member("Fp8QuantizationType", "DeepSeekFp8")
    return Packed(weights, fixed, activations, contract, {"shuffled": shuffled})


def _mxfp8(case: Case, inputs: Inputs) -> Packed:
    """Shuffled MajorK; the scales of weights interleaved, those of x linear."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    weights = _block_scaled(library, pack(case, inputs, up_first=True), gated(case), torch.uint8)
    weights |= {name: weights[name].view(FP8) for name in NAMES}
    acts = partial(quantised, case, inputs)

    def activations(x: Tensor) -> dict[str, Tensor | None]:
        q = acts(x)
        return {"hidden_states": q.codes.view(FP8), "hidden_states_scale": q.scales}

    contract = (
        Argument("hidden_states", FP8, (case.shape.tokens, hidden), contiguous=True),
        Argument("hidden_states_scale", torch.uint8, (case.shape.tokens, hidden // 32), contiguous=True),
        Argument(NAMES[0], FP8, (experts, rows, hidden), contiguous=True),
        Argument(NAMES[1], FP8, (experts, hidden, inter), contiguous=True),
        Argument("gemm1_weights_scale", torch.uint8, (experts, rows, hidden // 32), contiguous=True),
        Argument("gemm2_weights_scale", torch.uint8, (experts, hidden, inter // 32), contiguous=True),
    )
    fixed = {**activation_member(case, library), **parameters_of(case, inputs), "use_shuffled_weight": True}
    fixed["weight_layout"] = library.member("WeightLayout", "MajorK").value
    fixed["fp8_quantization_type"] = library.member("Fp8QuantizationType", "MxFp8")
    return Packed(weights, fixed, activations, contract, {})


def _block_scaled(library: Library, stacks: tuple[Stack, Stack], reordered: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shuffled codes and interleaved scales, the scales' bytes as `dtype`; `reordered`: w13's rows, for the gate."""
    weights = {}
    for name, stack, reorder in zip(NAMES, stacks, (reordered, False), strict=True):
        assert stack.scales is not None
        weights[name] = library.shuffled(stack.data, reorder)
        weights[f"{name}_scale"] = library.shuffled_scales(stack.scales, reorder).view(dtype)
    return weights


def fp4(case: Case, inputs: Inputs) -> Packed:
    """NVFP4 x NVFP4 with three numbers per expert; MXFP4 x MXFP8 and MXFP4 x bf16 without."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    weights = _fp4_weights(case, inputs, library)
    vector = 16 if case.recipe.weights == "nvfp4" else 32
    tokens = case.shape.tokens
    contract = [
        Argument(NAMES[0], torch.uint8, (experts, rows, hidden // 2), contiguous=True),
        Argument(NAMES[1], torch.uint8, (experts, hidden, inter // 2), contiguous=True),
        Argument("gemm1_weights_scale", FP8, (experts, rows, hidden // vector), contiguous=True),
        Argument("gemm2_weights_scale", FP8, (experts, hidden, inter // vector), contiguous=True),
        *(Argument(name, torch.float32, (experts,)) for name in weights if name.startswith("output")),
    ]
    if case.recipe.acts != "bf16":
        contract.append(Argument("hidden_states_scale", FP8, (tokens, hidden // vector), contiguous=True))
    parameters = activation_parameters(case, weights.get("output1_scale_gate_scalar"), experts, inputs.device)
    weights |= _fp4_biases(inputs, library, gated(case), weights)
    lengths = {"gemm1_bias": rows, "gemm2_bias": hidden}
    contract += [Argument(name, torch.float32, (experts, n), contiguous=True) for name, n in lengths.items() if name in weights]
    absent = ("gemm1_bias", "gemm2_bias", "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    weights |= {name: value for name, value in parameters.items() if value is not None}
    missing = [name for name in (*absent, *parameters) if name not in weights]
    fixed = {**dict.fromkeys(missing), **activation_member(case, library)}
    fixed["hidden_states_scale_layout"] = library.member("SfLayout", "layout_linear")
    return Packed(weights, fixed, partial(_fp4_activations, case, inputs), tuple(contract), {})


def _fp4_biases(inputs: Inputs, library: Library, reorder: bool, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 [experts, rows] with the rows of their weights, in units of accumulators: they are added before NVFP4's numbers
    multiply both. Source: FlashInfer 0.7.2.post1 trace/templates/moe.py, _fp4_moe_run_experts."""
    added = biases(inputs, torch.float32, up_first=True)
    found = {}
    numbers = ("output1_scale_gate_scalar", "output2_scale_scalar")  # accumulator -> value: the gate's, for both halves
    for i, (number, bias) in enumerate(zip(numbers, added.values(), strict=False), 1):
        raw = bias / scales[number][:, None] if number in scales else bias
        rows = library.shuffled(raw.unsqueeze(-1), reorder and i == 1)
        found[f"gemm{i}_bias"] = rows.squeeze(-1).contiguous()
    return found


def _fp4_weights(case: Case, inputs: Inputs, library: Library) -> dict[str, Tensor]:
    if case.recipe.weights == "mxfp4":
        return _block_scaled(library, pack(case, inputs, up_first=True), gated(case), FP8)
    stacks = pack(case, inputs, up_first=True, one_factor=True)
    weights = _block_scaled(library, stacks, gated(case), FP8)
    assert inputs.x_scale is not None
    assert inputs.middle_scale is not None
    linear = gated(case) and case.activation != "situ"
    scales = epilogue_scales(*stacks, inputs.x_scale, inputs.middle_scale, linear)
    named = {"output1_scale_scalar": "first", "output1_scale_gate_scalar": "gate", "output2_scale_scalar": "second"}
    return weights | {name: scales[key] for name, key in named.items()}


def _fp4_activations(case: Case, inputs: Inputs, x: Tensor) -> dict[str, Tensor | None]:
    if case.recipe.acts == "bf16":
        return {"hidden_states": x, "hidden_states_scale": None}
    q = quantised(case, inputs, x)
    assert q.scales is not None
    codes = pack_nibbles(q.codes) if case.recipe.acts == "nvfp4" else q.codes.view(FP8)
    return {"hidden_states": codes, "hidden_states_scale": q.scales.view(FP8)}
