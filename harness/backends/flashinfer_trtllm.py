"""FlashInfer's TRT-LLM-gen MoE (SM100, SM103): bf16, FP8, NVFP4, MXFP4, MXINT4, with routing in the kernel or decided before.

What each entry point is handed is packed in _trtllm_packs.py; its twins are in harness/twins/libs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from harness.backends._flashinfer import accepting
from harness.backends._trtllm import FUSED, METHODS, MOE, Packed, bind, gated
from harness.backends._trtllm_packs import bf16, fp4, fp8_block, fp8_tensor, mxint4
from harness.backends.base import Backend, Launch
from harness.case import BIASES, WEIGHTINGS, Case, Limit
from harness.entry import needs
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.formats import get
from reference.rounding import Rounding

MIDDLE = {"nvfp4": "bf16>nvfp4"}  # tests of FlashInfer model the epilogue so: reference/recipes.py


def rounding(case: Case) -> Rounding:
    """reference/recipes.py, rows flashinfer_trtllm_*: the activation is in GEMM 1's epilogue, routing weights are bf16."""
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
    biases: tuple[str, ...] = ("nobias",)
    weightings: tuple[str, ...] = ("onoutput",)


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
    return (
        None if case.activation in known else f"{case.recipe} takes {', '.join(known)}: docstring of trtllm_{family.kind}_moe"
    )


COMPILED = {"default": (256, 8), "sigmoid": (256, 8), "sigmoid_renorm": (256, 8), "topk": (256, 8), "topk_sigmoid": (256, 8)}
COMPILED |= {"renormalize": (2048, 32), "renormalize_naive": (2048, 32), "minimax2": (1024, 32), "kimi_k2": (1024, 32)}
COMPILED |= {"llama4": (128, 1), "deepseek_v3": (512, 22)}  # their own kernels: MaxSupportedExperts, MaxNumTopExperts
COMPILED |= {"deepseek_v3_shared": (512, 22)}
TIER = "no compiled tier: PolicyTraits::Pairs of RoutingCustomPolicy.cuh"


def tier(case: Case) -> str | None:
    """The routing kernels are compiled for pairs of (experts, top_k)."""
    experts, top_k = COMPILED[case.routing]
    if case.shape.experts > experts or case.shape.top_k > top_k:
        return f"{case.routing} routes up to {experts} experts, top {top_k}; {TIER}"
    return None


def grouped(case: Case) -> str | None:
    """The routing kernel that knows groups: trtllm_fused_moe_routing_deepseek.cu."""
    if case.routing not in ("deepseek_v3", *FUSED):
        return None
    experts = case.routed.experts
    if experts % 4 or experts // 8 > 32:
        return f"{experts} experts: wants a multiple of 4, at most 32 a group (trtllm_fused_moe_routing_deepseek.cu)"
    if case.fill == "real":
        return "grouped routing rounds the bias to bf16 (trtllm_fused_moe_routing_deepseek.cu, biasVal): other experts may win"
    return None


def fp8_block_routing(form: str, case: Case) -> str | None:
    """Fp8BlockScaleLauncher::check_routing, of what the library is told: without num_fused_shared_experts all are routed."""
    told = case.routed if form == "shared" else case.shape
    experts, top_k = told.experts, told.top_k
    if experts % 4 or experts <= top_k:
        return (
            f"{experts} experts, top {top_k}: wants a multiple of 4 and more than top_k (Fp8BlockScaleLauncher::check_routing)"
        )
    return None


def fp8_block_logits(case: Case) -> str | None:
    """The same, of routing by the method DeepSeekV3; half of 8 groups are selected, or the only one there is."""
    if {**METHODS, **FUSED}[case.routing].groups is None:
        return None
    selectable = case.routed.experts // (1 if case.routing == "kimi_k2" else 2)
    if case.routed.top_k > 8 or case.routed.top_k >= selectable:
        return "top_k must be at most 8 and less than the experts of selected groups (Fp8BlockScaleLauncher::check_routing)"
    return None


def some_tokens(case: Case) -> str | None:
    """Routed FP8 block scales take no empty batch."""
    return None if case.shape.tokens else "no tokens: 'Either routing_logits or expert_indices must be provided'"


def weighted_input(routed: bool, case: Case) -> str | None:
    """use_routing_scales_on_input."""
    if case.weighting == "onoutput":
        return None
    if case.shape.top_k > 1 or case.activation != "swiglu":
        return "use_routing_scales_on_input is asked as Llama-4 has it: top 1, swiglu (vLLM 0.25.1 experts/trtllm_fp8_moe.py)"
    if not routed and case.routing != "llama4":
        return "use_routing_scales_on_input takes bf16 logits (check_routing): only a weight of llama4 reads one logit alone"
    return None


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
        weightings=WEIGHTINGS,
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
        biases=BIASES,
    ),
    Family(
        "mxint4", "mxint4_block_scale", mxint4, {"mxint4": SWIGLUS}, {"mxint4": (256, 256)}, "prepare_trtllm_mxint4_weights"
    ),
)
MOST_TOP_K = 32  # include/flashinfer/trtllm/fused_moe/RoutingCustomPolicy.cuh of 0.7.2.post1
HELPERS = tuple(f"flashinfer.{n}" for n in ("reorder_rows_for_gated_act_gemm", "shuffle_matrix_a", "shuffle_matrix_sf_a"))
HELPERS += (f"{MOE}.convert_to_block_layout",)
HELPERS += tuple(f"flashinfer.tllm_enums.{n}" for n in ("ActivationType", "RoutingMethodType", "WeightLayout"))
HELPERS += tuple(f"flashinfer.tllm_enums.{n}" for n in ("Fp8QuantizationType", "SfLayout"))


def prepare(name: str, family: Family, case: Case, inputs: Inputs) -> Launch:
    """Pack the weights of this rank and bind the call."""
    return bind(name, family.pack(case, inputs), case, inputs)


def most_experts(case: Case) -> str | None:
    """RoutingCustomPolicy.cuh, MaxSupportedTopExperts."""
    return None if case.shape.top_k <= MOST_TOP_K else f"top_k must be at most {MOST_TOP_K} (MaxSupportedTopExperts)"


def limits(family: Family, form: str) -> tuple[Limit, ...]:
    """What this form of the entry point refuses."""
    routed = form == "routed"
    found = [
        Limit(("top_k",), most_experts),
        Limit(("recipe", "hidden", "inter", "activation"), partial(aligned, family)),
        Limit(("recipe", "activation"), partial(activated, family)),
    ]
    if len(family.weightings) > 1:
        found += [Limit(("weighting", "top_k", "activation", "routing"), partial(weighted_input, routed))]
    if family.name == "fp8_block":
        told = ("experts", "top_k", *(["routing"] if form == "shared" else []))
        found += [Limit(told, partial(fp8_block_routing, form))]
        found += [Limit(("tokens",), some_tokens)] if routed else [Limit(("routing", "experts", "top_k"), fp8_block_logits)]
    if not routed:
        found += [Limit(("routing", "experts", "top_k"), tier), Limit(("routing", "experts", "fill"), grouped)]
    return tuple(found)


FORMS = {
    "": "routing in the kernel",
    "routed": "routing decided before, packed",
    "shared": "routing in the kernel, num_fused_shared_experts",
}


def backend(family: Family, form: str) -> Backend:
    """The backend of one form of an entry point, a key of FORMS."""
    routed = form == "routed"
    name = f"trtllm_{family.kind}_{'routed_' if routed else ''}moe"
    entries = (f"{MOE}.{name}", *HELPERS)
    exempt = {"out_strided": "finalize writes rows one after another whatever the strides (trtllm_fused_moe_dev_kernel.cu)"}
    if any(get(recipe.split("-")[-1]).scaling is not None for recipe in family.activations if "-" in recipe):
        exempt["graph"] = "x is quantised by torch operators that read the host's answer"
    return Backend(
        name=f"flashinfer_trtllm_{family.name}{form and '_'}{form}",
        library="flashinfer-python",
        deterministic=True,
        recipes=tuple(family.activations),
        activations=tuple(dict.fromkeys(a for known in family.activations.values() for a in known)),
        routings={"": tuple(METHODS), "routed": (), "shared": tuple(FUSED)}[form],
        archs=("sm100", "sm103"),
        rounding=rounding,
        probe=accepting(entries[0], "num_fused_shared_experts", *entries) if form == "shared" else needs(*entries),
        limits=limits(family, form),
        biases=family.biases,
        weightings=family.weightings,
        prepare=partial(prepare, name, family),
        exempt=exempt,
        expert_parallel=form != "shared",  # _validate_fused_shared_experts
        entries=entries,
        twinned=True,
        summary=f"{name}: {FORMS[form]}; TRT-LLM-gen cubins",
    )


SHARING = ("fp8_block", "fp4")  # num_fused_shared_experts: since FlashInfer 0.6.15 and 0.6.17


def exactly(family: Family) -> Family:
    """The activations that can be asked exactly: of grouped routing nothing else is asked (`grouped`)."""
    kept = {recipe: tuple(a for a in known if ACTIVATIONS[a].exact) for recipe, known in family.activations.items()}
    return replace(family, activations=kept)


BACKENDS = (
    *(backend(family, form) for family in FAMILIES for form in ("", "routed")),
    *(backend(exactly(family), "shared") for family in FAMILIES if family.name in SHARING),
)
