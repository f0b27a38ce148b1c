"""How vLLM is told about quantised weights and activations: which description, which scales, which accumulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from harness.backends._packing import Stack
from harness.case import Case


@dataclass(frozen=True)
class Scheme:
    """How one recipe is handed over. config: the function of vLLM's config.py that describes it; options: its flags;
    scales(stack, interleave): what it calls w1_scale or w2_scale; accumulate: of the GEMMs, reference.exactness."""

    config: str
    scales: Callable[[Stack], Tensor]
    options: Mapping[str, object] = field(default_factory=dict)
    accumulate: str = "fp32"


def per_tensor(stack: Stack) -> Tensor:
    """float32 [experts]: one factor a matrix, both halves of w13 alike."""
    assert stack.factors is not None
    return stack.factors[:, 0].contiguous()


def blocks(stack: Stack) -> Tensor:
    """float32 [experts, row blocks, column blocks]; per channel [experts, rows, 1]."""
    assert stack.scales is not None
    return stack.scales


_FAST = "hopper_fp8_fast"  # tl.dot with acc=: Triton's default promotes never (max_num_imprecise_acc)
_CHANNEL = {"per_act_token_quant": True, "per_out_ch_quant": True}
FP8 = {
    "fp8_tensor-fp8_tensor": Scheme("fp8_w8a8_moe_quant_config", per_tensor, accumulate=_FAST),
    "fp8_channel-fp8_token": Scheme("fp8_w8a8_moe_quant_config", blocks, _CHANNEL, _FAST),
    "fp8_block-fp8_group": Scheme("fp8_w8a8_moe_quant_config", blocks, {"block_shape": [128, 128]}, "hopper_fp8"),
}
INT8 = {
    "int8_channel-int8_token": Scheme("int8_w8a8_moe_quant_config", blocks, {"per_act_token_quant": True}),
    "int8_channel": Scheme("int8_w8a16_moe_quant_config", blocks),
}


def interleaved_blocks(case: Case) -> str | None:
    """A scale of 128 rows cannot serve gate and up rows that alternate."""
    if case.activation == "swiglu_oai" and case.recipe.weights == "fp8_block":
        return "SWIGLUOAI alternates gate and up rows of w13, whose scales are per 128 rows of one of them"
    return None
