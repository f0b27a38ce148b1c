"""AITER's fused_moe (CK 2-stage on CDNA): bf16 on gfx942 and gfx950, FP8 per token and in blocks of 128 on gfx950.

Of the E4M3 of gfx942 the exponent bias is another one (FNUZ): its FP8 experts are no subject here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.backends._packing import Stack, pack
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = "aiter.fused_moe.fused_moe"
SHUFFLE = "aiter.ops.shuffle.shuffle_weight"
ACTIVATION, QUANT = "aiter.ActivationType", "aiter.QuantType"
ENTRIES = (ENTRY, SHUFFLE, ACTIVATION, QUANT)
ACTIVATIONS = {"swiglu": "Silu", "geglu": "Gelu", "silu": "Silu", "gelu": "Gelu"}
QUANTS = {"bf16": "No", "fp8_channel-fp8_token": "per_Token", "fp8_block-fp8_group": "per_1x128"}
COLUMNS, GROUP = 32, 128  # shuffle_weight's block along K (16 along N); columns of a scale of per_1x128


def rounding(case: Case) -> Rounding:
    """Stage 1 activates its fp32 accumulator and writes bf16, which is quantised for stage 2; that one multiplies by the
    routing weight in fp32 and adds rows into the output with bf16 atomics (CK moe_gemm2)."""
    acts = case.recipe.acts
    quantised = acts != case.recipe.carrier
    return Rounding(
        x=acts if quantised else None,
        middle=f"bf16>{acts}" if quantised else "bf16",
        weighted="bf16",
        partial="bf16",
        out="bf16",
    )


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden] with gate rows first and w2 [experts, hidden, inter], both shuffled in 16 x 16 blocks;
    scales float32 [experts, rows, 1] per channel, [experts, rows / 128, columns / 128] in blocks."""
    w13, w2 = pack(case, inputs)
    shuffle = resolve(SHUFFLE, inputs.device)
    buffers = {"x": inputs.x, "ids": inputs.topk_ids.int(), "topk_weights": inputs.topk_weights}
    buffers |= {"w13": shuffle(_typed(w13), layout=(16, 16)), "w2": shuffle(_typed(w2), layout=(16, 16))}
    if w13.scales is not None and w2.scales is not None:
        buffers |= {"w13_scales": w13.scales, "w2_scales": w2.scales}
    if len(inputs.local) < case.shape.experts:
        numbers = torch.arange(case.shape.experts, device=inputs.device)
        held = (numbers >= inputs.local.start) & (numbers < inputs.local.stop)
        buffers["expert_mask"] = held.int()
    tokens, top_k = case.shape.tokens, case.shape.top_k
    contract = (
        Argument("x", torch.bfloat16, (tokens, case.shape.hidden), contiguous=True),
        Argument("ids", torch.int32, (tokens, top_k)),
        Argument("topk_weights", torch.float32, (tokens, top_k)),
    )
    return Launch(_call(case, buffers, inputs.device), buffers, contract=contract)


def _typed(stack: Stack) -> Tensor:
    return stack.data.view(torch.float8_e4m3fn) if stack.data.dtype == torch.uint8 else stack.data


def _call(case: Case, b: dict[str, Tensor], device: str) -> Callable[[], Tensor]:
    function = resolve(ENTRY, device)
    activation = getattr(resolve(ACTIVATION, device), ACTIVATIONS[case.activation])
    quant = getattr(resolve(QUANT, device), QUANTS[str(case.recipe)])

    def call() -> Tensor:
        output: Tensor = function(
            b["x"],
            b["w13"],
            b["w2"],
            b["topk_weights"],
            b["ids"],
            b.get("expert_mask"),
            activation=activation,
            quant_type=quant,
            w1_scale=b.get("w13_scales"),
            w2_scale=b.get("w2_scales"),
        )
        return output

    return call


def whole_blocks(axis: str) -> Limit:
    """shuffle_weight asserts whole blocks, per_1x128 gives a scale to whole groups."""

    def refuses(case: Case) -> str | None:
        size = int(case.axes[axis])
        least = GROUP if case.recipe.weights == "fp8_block" else COLUMNS
        return f"{axis} {size} is not a multiple of {least}, a block of its weights" if size % least else None

    return Limit(("recipe", axis), refuses)


def no_tokens(case: Case) -> str | None:
    """vLLM's modular_kernel.py, AITER's caller, returns before."""
    return None if case.shape.tokens else "callers of fused_moe return before it where a batch has no tokens"


def _backend(name: str, recipes: tuple[str, ...], activations: tuple[str, ...], archs: tuple[str, ...]) -> Backend:
    return Backend(
        name=name,
        library="aiter",
        deterministic=False,  # stage 2 adds with atomics
        recipes=recipes,
        activations=activations,
        archs=archs,
        rounding=rounding,
        probe=needs(*ENTRIES),
        limits=(Limit(("tokens",), no_tokens), whole_blocks("hidden"), whole_blocks("inter")),
        prepare=prepare,
        expert_parallel=True,
        entries=ENTRIES,
        twinned=True,
        exempt={"strided_inputs": "x is declared contiguous"},
        summary=f"AITER fused_moe, {' and '.join(recipes)}",
    )


BACKENDS = (
    _backend("aiter_moe", ("bf16",), ("swiglu", "geglu", "silu", "gelu"), ("gfx942", "gfx950")),
    _backend("aiter_moe_fp8", ("fp8_channel-fp8_token", "fp8_block-fp8_group"), ("swiglu", "geglu"), ("gfx950",)),
)
