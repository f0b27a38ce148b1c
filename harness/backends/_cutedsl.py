"""What the backends of FlashInfer's CuTe-DSL kernels share: scale views, alphas, activations by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from harness.backends._packing import Stack
from harness.case import Case
from harness.entry import resolve
from reference.activation import ACTIVATIONS
from reference.layouts import get as layout

CONVERT = "flashinfer.cute_dsl.utils.convert_sf_to_mma_layout"
NUMBERS = MappingProxyType({"Swiglu": 3, "Relu2": 6, "GegluTanh": 8})  # ActivationType of 0.7.2.post1: what the twins read
FP4_TMA = 32  # elements of 4 bits in the 16 bytes that TMA wants of a row (can_implement of the kernels)


def mma_scales(stack: Stack, block: int, device: str) -> Tensor:
    """The block scales of a stack, swizzled 128x4 expert by expert, as the library's helper views them."""
    assert stack.scales is not None
    experts, rows, blocks = stack.scales.shape
    swizzled = layout("swizzle_128x4_per_expert").pack(stack.scales).flatten()
    view: Tensor = resolve(CONVERT, device)(swizzled, rows, blocks * block, experts, block)
    return view


def alphas(stack: Stack, input_scale: float | None) -> Tensor:
    """float32 [experts]: 1 / (global scale of the weights * global scale of the GEMM's input), both in the encode sense."""
    factors = torch.ones_like(stack.data[:, 0, 0], dtype=torch.float32) if stack.factors is None else stack.factors[:, 0]
    return (factors / (input_scale or 1.0)).contiguous()


def activation(case: Case, device: str) -> Mapping[str, object]:
    """The arguments that select the activation of `cute_dsl_fused_moe`; none for SwiGLU, which releases without them do.

    The enum's numbers moved between releases, so its members are named.
    """
    made = ACTIVATIONS[case.activation].parameters
    if case.activation == "swiglu":
        return {}
    if case.activation == "swiglu_oai":
        return {f"swiglu_{name}": value for name, value in made.items()}
    if case.activation == "situ":
        return {"situ_beta": made["beta"], "situ_linear_beta": made["linear_beta"]}
    name = {"relu2": "Relu2", "geglu_tanh": "GegluTanh"}[case.activation]
    if device == "cpu":
        return {"activation_type": NUMBERS[name]}
    return {"activation_type": getattr(importlib.import_module("flashinfer.tllm_enums").ActivationType, name)}
