"""FlashInfer's TRT-LLM-gen MoE (SM100, SM103): bf16, FP8, NVFP4, MXFP4 and MXINT4, with routing in the kernel or decided before.

Weights are [up; gate], reordered for the gate, shuffled for an epilogue tile of 128 rows. Twins: harness/twins/libs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.backends._packing import pack
from harness.backends._trtllm import (
    BLOCK_BYTES,
    MEMBERS,
    METHODS,
    MOE,
    Library,
    Packed,
    activation_parameters,
    bind,
    epilogue_scales,
    gated,
)
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs
from harness.guard import Argument
from harness.inputs import Inputs
from reference.format import Quantized
from reference.formats import get
from reference.layouts.linear import pack_nibbles
from reference.rounding import Rounding

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


def no_parameters(case: Case, inputs: Inputs) -> dict[str, object]:
    """Activation parameters in physical units."""
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
    fixed = {**layout, **activation_member(case, library), **no_parameters(case, inputs)}
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
    return Packed(weights, no_parameters(case, inputs), lambda x: {"hidden_states": x}, contract, {})


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
    fixed = {**activation_member(case, library), "use_routing_scales_on_input": False, "gemm1_clamp_limit": limit}
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
    fixed = {**activation_member(case, library), **no_parameters(case, inputs)}
    fixed["fp8_quantization_type"] = library.member("Fp8QuantizationType", "DeepSeekFp8")
    return Packed(weights, fixed, activations, contract, {"shuffled": shuffled})


def _mxfp8(case: Case, inputs: Inputs) -> Packed:
    """Shuffled MajorK; the scales of weights interleaved, those of x linear."""
    library, (experts, rows, hidden, inter) = Library(inputs.device), sizes(case, inputs.local)
    weights = _block_scaled(case, inputs, library, torch.uint8)
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
    fixed = {**activation_member(case, library), **no_parameters(case, inputs), "use_shuffled_weight": True}
    fixed["weight_layout"] = library.member("WeightLayout", "MajorK").value
    fixed["fp8_quantization_type"] = library.member("Fp8QuantizationType", "MxFp8")
    return Packed(weights, fixed, activations, contract, {})


def _block_scaled(case: Case, inputs: Inputs, library: Library, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shuffled codes and interleaved scales, the scales' bytes as `dtype`."""
    weights = {}
    for name, stack, reorder in zip(NAMES, pack(case, inputs, up_first=True), (gated(case), False), strict=True):
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
    absent = ("gemm1_bias", "gemm2_bias", "output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    fixed = {**dict.fromkeys(name for name in absent if name not in weights), **activation_member(case, library), **parameters}
    fixed["hidden_states_scale_layout"] = library.member("SfLayout", "layout_linear")
    return Packed(weights, fixed, partial(_fp4_activations, case, inputs), tuple(contract), {})


def _fp4_weights(case: Case, inputs: Inputs, library: Library) -> dict[str, Tensor]:
    if case.recipe.weights == "mxfp4":
        return _block_scaled(case, inputs, library, FP8)
    weights = {}
    stacks = pack(case, inputs, up_first=True, one_factor=True)
    for name, stack, reorder in zip(NAMES, stacks, (gated(case), False), strict=True):
        assert stack.scales is not None
        weights[name] = library.shuffled(stack.data, reorder)
        weights[f"{name}_scale"] = library.shuffled_scales(stack.scales, reorder).view(FP8)
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


MIDDLE = {"nvfp4": "bf16>nvfp4"}  # tests of FlashInfer model the epilogue so: reference/recipes.py


def rounding(case: Case) -> Rounding:
    """reference/recipes.py, rows flashinfer_trtllm_*: the activation is in GEMM 1's epilogue, weights of the routing are bf16."""
    acts = case.recipe.acts
    x, narrow = (None, None) if acts == "bf16" else (acts, "fp8_group" if acts == "fp8_group" else None)
    middle = "fp8_group:trtllm" if acts == "fp8_group" else MIDDLE.get(acts, acts)
    return Rounding(x=x, gate_up=narrow, middle=middle, row="bf16", routing_weight="bf16", out="bf16")


@dataclass(frozen=True)
class Family:
    """An entry point and its `_routed_` form. activations: by recipe; multiple: of (hidden, inter), with its source."""

    name: str
    kind: str
    pack: Callable[[Case, Inputs], Packed]
    activations: dict[str, tuple[str, ...]]
    multiple: dict[str, tuple[int, int]]
    source: str


def aligned(family: Family, case: Case) -> str | None:
    """Sizes that the layouts and kernels have room for."""
    shape = case.shape
    hidden, inter = family.multiple[str(case.recipe)]
    for axis, size, unit in (("hidden", shape.hidden, hidden), ("inter", shape.inter, inter)):
        if size % unit:
            return f"{axis} {size} is not a multiple of {unit}: {family.source}"
    rows = shape.inter * (2 if gated(case) else 1)
    return f"{rows} rows of w13 are not a multiple of 128: get_shuffle_matrix_sf_a_row_indices" if rows % 128 else None


def activated(family: Family, case: Case) -> str | None:
    """Which activations the kernels of a recipe have."""
    known = family.activations[str(case.recipe)]
    return None if case.activation in known else f"{case.recipe} takes {', '.join(known)}: docstring of trtllm_{family.kind}_moe"


COMPILED = {"default": (256, 8), "sigmoid": (256, 8), "sigmoid_renorm": (256, 8), "topk": (256, 8), "topk_sigmoid": (256, 8)}
COMPILED |= {"renormalize": (2048, 32), "renormalize_naive": (2048, 32), "minimax2": (1024, 32), "kimi_k2": (1024, 32)}
COMPILED |= {"llama4": (128, 1), "deepseek_v3": (512, 22)}  # their own kernels: MaxSupportedExperts, MaxNumTopExperts
TIER = "no compiled tier: PolicyTraits::Pairs of RoutingCustomPolicy.cuh"


def tier(case: Case) -> str | None:
    """The routing kernels are compiled for pairs of (experts, top_k)."""
    experts, top_k = COMPILED[case.routing]
    if case.shape.experts > experts or case.shape.top_k > top_k:
        return f"{case.routing} routes up to {experts} experts, top {top_k}; {TIER}"
    return None


def grouped(case: Case) -> str | None:
    """The routing kernel that knows groups: trtllm_fused_moe_routing_deepseek.cu."""
    if case.routing != "deepseek_v3":
        return None
    experts = case.shape.experts
    if experts % 4 or experts // 8 > 32:
        return f"{experts} experts: grouped routing wants a multiple of 4 and at most 32 a group (trtllm_fused_moe_routing_deepseek.cu)"
    if case.fill == "real":
        return "grouped routing rounds the bias to bf16 (trtllm_fused_moe_routing_deepseek.cu, biasVal): other experts may win"
    return None


def fp8_block_routing(case: Case) -> str | None:
    """Fp8BlockScaleLauncher::check_routing."""
    experts, top_k = case.shape.experts, case.shape.top_k
    if experts % 4 or experts <= top_k:
        return f"{experts} experts, top {top_k}: wants a multiple of 4 and more than top_k (Fp8BlockScaleLauncher::check_routing)"
    return None


def fp8_block_logits(case: Case) -> str | None:
    """The same, of routing by the method DeepSeekV3; half of 8 groups are selected, or the only one there is."""
    if METHODS[case.routing].groups is None:
        return None
    selectable = case.shape.experts // (2 if case.routing == "deepseek_v3" else 1)
    if case.shape.top_k > 8 or case.shape.top_k >= selectable:
        return "top_k must be at most 8 and less than the experts of selected groups (Fp8BlockScaleLauncher::check_routing)"
    return None


def some_tokens(case: Case) -> str | None:
    """Routed FP8 block scales take no empty batch."""
    return None if case.shape.tokens else "no tokens: 'Either routing_logits or expert_indices must be provided'"


SWIGLUS = ("swiglu", "swiglu_oai")
BLOCK_ACTIVATIONS = (*SWIGLUS, "geglu", "swiglu_step", "relu2", "identity")
MXFP4_ACTIVATIONS = (*SWIGLUS, "geglu", "situ", "relu2", "identity")
FAMILIES = (
    Family(
        "bf16",
        "bf16",
        bf16,
        {"bf16": (*SWIGLUS, "swiglu_step", "relu2")},
        {"bf16": (128, 128)},
        "Bf16MoeLauncher::check_moe, K in steps of the tile's 128 (trtllm_fused_moe_runner.cu)",
    ),
    Family(
        "fp8_tensor",
        "fp8_per_tensor_scale",
        fp8_tensor,
        {"fp8_tensor-fp8_tensor": ("swiglu", "geglu", "swiglu_step", "relu2", "identity")},
        {"fp8_tensor-fp8_tensor": (128, 128)},
        "Fp8PerTensorStagedMoeLauncher::check_moe",
    ),
    Family(
        "fp8_block",
        "fp8_block_scale",
        fp8_block,
        {"fp8_block-fp8_group": SWIGLUS, "mxfp8-mxfp8": BLOCK_ACTIVATIONS},
        {"fp8_block-fp8_group": (128, 128), "mxfp8-mxfp8": (128, 128)},
        "prepare_trtllm_fp8_block_weights",
    ),
    Family(
        "fp4",
        "fp4_block_scale",
        fp4,
        {
            "nvfp4-nvfp4": ("swiglu", "geglu", "swiglu_step", "situ", "relu2", "identity"),
            "mxfp4-mxfp8": MXFP4_ACTIVATIONS,
            "mxfp4": MXFP4_ACTIVATIONS,
        },
        # of NVFP4 prepare asks 16; the scale buffers' views ask 64 of a K, 128 of w2's rows
        {"nvfp4-nvfp4": (128, 64), "mxfp4-mxfp8": (128, 128), "mxfp4": (128, 128)},
        "prepare_trtllm_fp4_weights, get_shuffle_matrix_sf_a_row_indices",
    ),
    Family("mxint4", "mxint4_block_scale", mxint4, {"mxint4": SWIGLUS}, {"mxint4": (256, 256)}, "prepare_trtllm_mxint4_weights"),
)
HELPERS = tuple(f"flashinfer.{n}" for n in ("reorder_rows_for_gated_act_gemm", "shuffle_matrix_a", "shuffle_matrix_sf_a"))
HELPERS += (f"{MOE}.convert_to_block_layout",)
HELPERS += tuple(f"flashinfer.tllm_enums.{n}" for n in ("ActivationType", "RoutingMethodType", "WeightLayout"))
HELPERS += tuple(f"flashinfer.tllm_enums.{n}" for n in ("Fp8QuantizationType", "SfLayout"))


def prepare(name: str, family: Family, case: Case, inputs: Inputs) -> Launch:
    """Pack the weights of this rank and bind the call."""
    return bind(name, family.pack(case, inputs), case, inputs)


def limits(family: Family, routed: bool) -> tuple[Limit, ...]:
    """What this form of the entry point refuses."""
    found = [
        Limit(("recipe", "hidden", "inter", "activation"), partial(aligned, family)),
        Limit(("recipe", "activation"), partial(activated, family)),
    ]
    if family.name == "fp8_block":
        found += [Limit(("experts", "top_k"), fp8_block_routing)]
        found += [Limit(("tokens",), some_tokens)] if routed else [Limit(("routing", "experts", "top_k"), fp8_block_logits)]
    if not routed:
        found += [Limit(("routing", "experts", "top_k"), tier), Limit(("routing", "experts", "fill"), grouped)]
    return tuple(found)


def backend(family: Family, routed: bool) -> Backend:
    """The backend of one form of an entry point."""
    name = f"trtllm_{family.kind}_{'routed_' if routed else ''}moe"
    entries = (f"{MOE}.{name}", *HELPERS)
    exempt = {"out_strided": "finalize writes rows one after another whatever the strides (trtllm_fused_moe_dev_kernel.cu)"}
    if any(get(recipe.split("-")[-1]).scaling is not None for recipe in family.activations if "-" in recipe):
        exempt["graph"] = "x is quantised by torch operators that read the host's answer"
    return Backend(
        name=f"flashinfer_trtllm_{family.name}{'_routed' if routed else ''}",
        library="flashinfer-python",
        deterministic=True,
        recipes=tuple(family.activations),
        activations=tuple(dict.fromkeys(a for known in family.activations.values() for a in known)),
        routings=() if routed else tuple(METHODS),
        archs=("sm100", "sm103"),
        rounding=rounding,
        probe=needs(*entries),
        limits=limits(family, routed),
        prepare=partial(prepare, name, family),
        exempt=exempt,
        expert_parallel=True,
        entries=entries,
        twinned=True,
        summary=f"{name}: {'routing decided before, packed' if routed else 'routing in the kernel'}; TRT-LLM-gen cubins",
    )


BACKENDS = tuple(backend(family, routed) for family in FAMILIES for routed in (False, True))
