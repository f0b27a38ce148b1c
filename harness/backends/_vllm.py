"""What the vLLM backends share: is it there, a step's buffers, its activations by name, where its activation kernels round.

They bind to operators of the wheel, never to a layer class: 0.25.1 is the release whose source is quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backends.base import YES, Device, Support
from harness.case import Case, Limit
from harness.entry import resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.formats import get

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
QUANT_UTILS = "vllm.model_executor.layers.quantization.utils"
ACTIVATION = f"{FUSED_MOE}.activation.MoEActivation"
ACTIVATIONS = {
    "swiglu": "SILU",
    "swiglu_oai": "SWIGLUOAI",  # the only one that wants gate and up rows of w13 alternating
    "geglu": "GELU",
    "geglu_tanh": "GELU_TANH",
    "silu": "SILU_NO_MUL",
    "relu2": "RELU2_NO_MUL",
}
GATED = ("swiglu", "swiglu_oai", "geglu", "geglu_tanh")
RULES = {  # its quantisers; of groups the wheel's default on sm90 and later, where it bundles DeepGEMM: is_deep_gemm_e8m0_used
    "fp8_token": "fp8_token:vllm",
    "fp8_group": "fp8_group:vllm_ue8m0",
    "int8_token": "int8_token:vllm",
}
PLAIN_HALVES = (
    "swiglu",
    "geglu",
    "geglu_tanh",
)  # act_and_mul_kernel writes act(gate) in the tensor's dtype before it multiplies


def library(name: str) -> Any:
    """The installed library's own function, class or enum."""
    return resolve(name, "cuda")


def needs(*names: str) -> Callable[[Device], Support]:
    """A probe: does the installed library have these? Whatever its import raises is the reason for a no."""

    def probe(device: Device) -> Support:
        for name in names:
            try:
                library(name)
            except AttributeError:
                return Support.no("library", f"the installed {name.split('.')[0]} has no {name}")
            except Exception as error:
                return Support.no("library", f"{name.rpartition('.')[0]} cannot be imported: {type(error).__name__}: {error}")
        return YES

    return probe


def activation(case: Case) -> Any:
    """The member of MoEActivation."""
    return getattr(library(ACTIVATION), ACTIVATIONS[case.activation])


def carrier(case: Case) -> torch.dtype:
    """The dtype of x and of the output."""
    dtype = get(case.recipe.carrier).torch_dtype
    assert dtype is not None
    return dtype


def halves(case: Case) -> str | None:
    """What act(gate) is rounded to before it meets up, None where the product is formed in fp32 or there is none: vLLM
    csrc/libtorch_stable/activation_kernels.cu."""
    return case.recipe.out if case.activation in PLAIN_HALVES else None


def step(inputs: Inputs) -> dict[str, Tensor]:
    """The buffers that hold a step's data; ids are int32, as vLLM's own routers give them."""
    return {"x": inputs.x, "ids": inputs.topk_ids.int(), "topk_weights": inputs.topk_weights}


def contract(case: Case) -> tuple[Argument, ...]:
    """What vLLM's entry points want of a step's buffers."""
    tokens, top_k = case.shape.tokens, case.shape.top_k
    return (
        Argument("x", carrier(case), (tokens, case.shape.hidden)),
        Argument("ids", (torch.int32, torch.int64), (tokens, top_k)),
        Argument("topk_weights", torch.float32, (tokens, top_k), contiguous=True),
    )


def expert_map(inputs: Inputs) -> dict[str, Tensor]:
    """int32 [experts]: an expert's number on this rank, -1 if it is another's; nothing where the rank holds all."""
    experts, local = inputs.case.shape.experts, inputs.local
    if len(local) == experts:
        return {}
    where = torch.arange(experts, dtype=torch.int32, device=inputs.device)
    held = (where >= local.start) & (where < local.stop)
    return {"expert_map": torch.where(held, where - local.start, -1)}


def static_scales(inputs: Inputs) -> dict[str, Tensor]:
    """float32 [1] decode scales of both GEMMs' activations where one number serves a tensor, else nothing."""
    if inputs.x_scale is None or inputs.middle_scale is None:
        return {}
    scales = {"a1_scale": inputs.x_scale, "a2_scale": inputs.middle_scale}
    return {name: torch.tensor([1 / scale], device=inputs.device) for name, scale in scales.items()}


def ordered(case: Case, w13: Tensor) -> Tensor:
    """w13, or its scales, [experts, 2 * rows, ...] with gate rows first -> in the order that the activation reads."""
    if case.activation != "swiglu_oai":
        return w13
    alternating: Tensor = w13.unflatten(1, (2, -1)).transpose(1, 2)
    return alternating.flatten(1, 2).contiguous()


def _no_tokens(case: Case) -> str | None:
    return None if case.shape.tokens else "vLLM's modular_kernel.py returns before its kernels where a batch has no tokens"


SOME_TOKENS = Limit(("tokens",), _no_tokens)
