"""FlashInfer's `cutlass_fused_moe`, one backend for each quantisation mode; rows of w13 are [up; gate].

Modes, scales and alignments: csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu of 0.7.2.post1 (its
constructor picks the mode from dtypes and flags, getQuantParams checks the scales); layouts: fused_moe/prepare.py there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from harness.backends._flashinfer import ACTIVATION_TYPE, Placement, activation_type, built, known, whole
from harness.backends._flashinfer_modes import Packed, fp8_block, fp8_tensor, mxfp4_mxfp8, mxfp8, nvfp4, plain, w4a8, w4a16
from harness.backends._packing import biases
from harness.backends.base import Backend, Launch
from harness.case import BIASES, Case, Limit
from harness.entry import resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.formats import get
from reference.rounding import Rounding

ENTRY = "flashinfer.fused_moe.cutlass_fused_moe"
WEIGHTS = "flashinfer.fused_moe.interleave_moe_weights_for_sm90_mixed_gemm"
SCALES = "flashinfer.fused_moe.interleave_moe_scales_for_sm90_mixed_gemm"
# GegluTanh is left out: its fast_tanh errs by 2**-11, which no rounding point describes
FUNCTIONS = ("swiglu", "swiglu_oai", "swiglu_step", "geglu", "situ", "silu", "gelu", "relu", "relu2", "identity")
HOPPER, DATACENTER = ("sm90",), ("sm100", "sm103")  # of 0.7.2.post1 fused_moe/api.py, _CUTLASS_*_ARCHS
NO_STRIDES = "the kernel is handed an address: no stride of output= is looked at"
ONCE = (
    "over 256 tokens, or with another top_k than 1, 2, 4, 6, 8, an expert is looked for once a token and a second slot of it"
    " finds no row (blockExpertPrefixSumKernel)"
)


@dataclass(frozen=True)
class Mode:
    """One way to call it. x, middle: where the inputs of the GEMMs are quantised, `{out}` standing for the output's type, in
    which both GEMMs write their results; multiple: of (hidden, inter); flags: of the call; entries: what it needs besides."""

    name: str
    recipes: tuple[str, ...]
    archs: tuple[str, ...]
    pack: Callable[[Case, Inputs], Packed]
    multiple: tuple[int, int]
    why: str
    x: str | None = None
    middle: str = "{out}"
    flags: Mapping[str, bool] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    entries: tuple[str, ...] = ()
    biases: tuple[str, ...] = ("nobias",)

    def rounding(self, case: Case) -> Rounding:
        """GEMM 1 writes to memory, a second kernel activates in fp32; the finalize sums in fp32: reference/recipes.py. Both
        add the biases in fp32 to what the GEMMs wrote (doActivationKernel, finalizeMoeRoutingKernel)."""
        out = case.recipe.out
        if case.bias == "bias":
            return Rounding(x=self.x, product=out, middle=self.middle.format(out=out), out=out)
        return Rounding(x=self.x, gate_up=out, middle=self.middle.format(out=out), row=out, out=out)


def prepare(mode: Mode, case: Case, inputs: Inputs) -> Launch:
    """Pack the weights in the mode's layout and bind the call to them."""
    packed, place = mode.pack(case, inputs), Placement.of(inputs)
    step = {"x": inputs.x, "ids": inputs.topk_ids.int(), "topk_weights": inputs.topk_weights}
    options = _options(case, inputs, len(inputs.local))
    added = biases(inputs, get(case.recipe.out).torch_dtype or torch.bfloat16, up_first=True)
    buffers = {**step, "w13": packed.w13, "w2": packed.w2, **packed.tensors, **options, **added}
    moe = resolve(ENTRY, inputs.device)
    out_dtype = get(case.recipe.out).torch_dtype
    flags = {**mode.flags, **known(moe, use_fused_finalize=False)}  # a sum by atomics has other bits every time; 0.6.15
    kind = activation_type(case, inputs.device)

    def call(output: Tensor | None = None) -> Tensor:
        result = moe(
            **packed.feed(buffers["x"]),
            token_selected_experts=buffers["ids"] + place.shift if place.shift else buffers["ids"],
            token_final_scales=buffers["topk_weights"],
            fc1_expert_weights=packed.w13,
            fc2_expert_weights=packed.w2,
            output_dtype=out_dtype,
            quant_scales=list(packed.tensors.values()),
            fc1_expert_biases=added.get("w13_bias"),
            fc2_expert_biases=added.get("w2_bias"),
            ep_size=place.size,
            ep_rank=place.rank,
            output=output,
            activation_type=kind,
            **options,
            **flags,
        )
        return _first(result)

    return Launch(call, buffers, out=call, contract=contract(case, packed, len(inputs.local)))


def _first(result: object) -> Tensor:
    """The layer's output: the annotation says Tensor, a list of four has come back since 0.4.0."""
    if not isinstance(result, list) or len(result) != 4:
        raise TypeError(f"cutlass_fused_moe returned {type(result).__name__}, wanted a list of four tensors")
    assert isinstance(result[0], Tensor)
    return result[0]


def _options(case: Case, inputs: Inputs, experts: int) -> dict[str, Tensor]:
    """Constants of the clamped SwiGLU, one of each expert; the other activations have the kernel's own."""
    if case.activation != "swiglu_oai":
        return {}
    constants = ACTIVATIONS["swiglu_oai"].parameters
    return {f"swiglu_{name}": torch.full((experts,), value, device=inputs.x.device) for name, value in constants.items()}


def contract(case: Case, packed: Packed, experts: int) -> tuple[Argument, ...]:
    """What the binding checks, and what it does not look at: nothing has strides there."""
    shape = case.shape
    step = (
        Argument("x", get(case.recipe.carrier).torch_dtype, (shape.tokens, shape.hidden), contiguous=True),
        Argument("ids", torch.int32, (shape.tokens, shape.top_k), contiguous=True),
        Argument("topk_weights", torch.float32, (shape.tokens, shape.top_k), contiguous=True),
        Argument("out", get(case.recipe.out).torch_dtype, (shape.tokens, shape.hidden), contiguous=True, written=True),
    )
    weights = (
        Argument("w13", shape=(experts, "rows", "row bytes"), contiguous=True, align=16),
        Argument("w2", shape=(experts, shape.hidden, "inter bytes"), contiguous=True, align=16),
    )
    added = (
        Argument("w13_bias", get(case.recipe.out).torch_dtype, (experts, "rows"), contiguous=True),
        Argument("w2_bias", get(case.recipe.out).torch_dtype, (experts, shape.hidden), contiguous=True),
    )
    return (*step, *weights, *packed.contract, *(added if case.bias == "bias" else ()))


def no_tokens(case: Case) -> str | None:
    """An empty tensor has no address, which runMoe asserts: RuntimeError on an H200, 0.7.2.post1."""
    return None if case.shape.tokens else "no tokens: Assertion failed: input_activations (cutlass_fused_moe_kernels.cuh)"


def whole_tiles(case: Case) -> str | None:
    """The binding wants align(inter, 64) rows of FC1 scales without a gate, the swizzle holds tiles of 128 rows."""
    rows = -(-case.shape.inter // 64) * 64
    if ACTIVATIONS[case.activation].gated or rows % 128 == 0:
        return None
    return f"inter {case.shape.inter} without a gate: {rows} rows of scales are asked for, no whole tiles of 128"


MODES = (
    Mode(
        name="bf16",
        recipes=("bf16", "fp16"),
        archs=(*HOPPER, *DATACENTER),
        pack=plain,
        multiple=(8, 8),
        why="128-bit rows (binding, min_alignment)",
        biases=BIASES,
    ),
    Mode(
        name="fp8",
        recipes=("fp8_tensor-fp8_tensor", "fp8_tensor-fp8_tensor-fp8_tensor-fp16"),
        archs=(*HOPPER, *DATACENTER),
        pack=fp8_tensor,
        multiple=(16, 16),
        why="128-bit rows (binding, min_alignment)",
        x="fp8_tensor",
        middle="fp8_tensor",
    ),
    Mode(
        name="fp8_block",
        recipes=("fp8_block-fp8_group",),
        archs=HOPPER,
        pack=fp8_block,
        multiple=(128, 128),
        why="prepare_cutlass_fp8_block_weights, alignment=128",
        x="fp8_group",
        middle="{out}>fp8_group",
        flags={"use_deepseek_fp8_block_scale": True},
    ),
    Mode(
        name="w4a16",
        recipes=("mxfp4",),
        archs=HOPPER,
        pack=partial(w4a16, WEIGHTS, SCALES),
        multiple=(128, 128),
        why="the scale fold holds 64 rows x 128 elements (interleave_moe_scales_for_sm90_mixed_gemm)",
        flags={"use_w4_group_scaling": True},
        entries=(WEIGHTS, SCALES),
        biases=BIASES,
    ),
    Mode(
        name="w4a8",
        recipes=("int4_g128-fp8_tensor", "int4_g128-fp8_tensor-fp8_tensor-fp16"),
        archs=HOPPER,
        pack=partial(w4a8, WEIGHTS, SCALES),
        multiple=(128, 128),
        why="prepare_cutlass_w4a8_weights, groups of 128",
        x="fp8_tensor",
        middle="{out}>fp8_tensor",
        flags={"use_w4_group_scaling": True, "use_packed_weights": True},
        entries=(WEIGHTS, SCALES),
    ),
    Mode(
        name="mxfp8",
        recipes=("mxfp8-mxfp8",),
        archs=DATACENTER,
        pack=mxfp8,
        multiple=(128, 128),
        why="prepare_cutlass_mxfp8_weights, alignment=128",
        x="mxfp8",
        middle="{out}>mxfp8",
        flags={"use_mxfp8_act_scaling": True},
    ),
    Mode(
        name="mxfp8_mxfp4",
        recipes=("mxfp4-mxfp8",),
        biases=BIASES,
        archs=(*DATACENTER, "sm120"),
        pack=mxfp4_mxfp8,
        multiple=(128, 128),
        why="hidden_size must be divisible by 128 for MXFP4 weights (binding)",
        x="mxfp8",
        middle="{out}>mxfp8",
        flags={"use_mxfp8_act_scaling": True},
    ),
    Mode(
        name="nvfp4",
        recipes=("nvfp4-nvfp4", "nvfp4-nvfp4-nvfp4-fp16"),
        archs=(*DATACENTER, "sm120"),
        pack=nvfp4,
        multiple=(32, 32),
        why="minimum alignment of 128 bits (cutlass_fused_moe_kernels.cuh, runMoe)",
        x="nvfp4",
        middle="{out}>nvfp4",
        limits=(Limit(("inter", "activation"), whole_tiles),),
    ),
)


def backend(mode: Mode) -> Backend:
    """The subject of one mode."""
    entries = (ENTRY, ACTIVATION_TYPE, *mode.entries)
    return Backend(
        name=f"flashinfer_cutlass_{mode.name}",
        library="flashinfer-python",
        deterministic=True,
        recipes=mode.recipes,
        activations=FUNCTIONS,
        archs=mode.archs,
        rounding=mode.rounding,
        probe=built("fused_moe_{arch}", *entries),
        limits=(whole(*mode.multiple, mode.why), Limit(("tokens",), no_tokens), *mode.limits),
        biases=mode.biases,
        prepare=partial(prepare, mode),
        summary=f"FlashInfer cutlass_fused_moe, mode {mode.name}, finalize not fused",
        exempt={"out_strided": NO_STRIDES, "duplicate_expert": ONCE},
        expert_parallel=True,
        entries=entries,
        twinned=True,
    )


BACKENDS = tuple(backend(mode) for mode in MODES)
