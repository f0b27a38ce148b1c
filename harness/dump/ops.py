"""Recorded calls of FlashInfer's quantisers, activations and router, each a step of an op beside the whole layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.axes import NEUTRAL
from harness.backends import flashinfer_activation, flashinfer_quantize, flashinfer_routing
from harness.backends._ops import matrix, packed, unswizzled
from harness.case import Case
from harness.dump.layer import TEXTS, Step, bound, possible, uniform
from harness.twins.libs import flashinfer_activation as activations
from harness.twins.libs import flashinfer_quantize as quantisers
from harness.twins.libs.flashinfer_routing import fused_topk_deepseek
from reference.formats import get
from reference.rounding import Rounding

QUANTISERS = ("fp4_quantize", "nvfp4_quantize", "mxfp4_quantize", "mxfp8_quantize")
LAYOUTS = {number: flashinfer_quantize.LAYOUTS[name] for name, number in flashinfer_quantize.SF_LAYOUT.items()}
GROUP = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}


def case_of(op: str, x: Tensor, **axes: int | str) -> Case:
    """The case of a step on x: its id has the sizes, nothing can be drawn from it."""
    return possible(Case.of({**NEUTRAL, "op": op, "tokens": len(x), **axes}))


def quantised(name: str, arguments: Mapping[str, Any]) -> tuple[SimpleNamespace, str, int]:
    """(the call's arguments, its format, the number of the scales' layout); NotImplementedError for what no backend asks."""
    a = bound(getattr(quantisers, name), arguments)
    if a.backend != "cuda":
        raise NotImplementedError(f"backend={a.backend!r}: its rounding rule is none of the reference's; read is 'cuda'")
    for flag in ("do_shuffle", "per_token_activation", "expanded_idx_to_permuted_idx", "out_scale"):
        if getattr(a, flag, None) is not None and getattr(a, flag) is not False:
            raise NotImplementedError(f"{flag} is not read: no backend asks for it")
    if name == "mxfp8_quantize":
        layout = (0 if a.is_sf_swizzled_layout else 2) if a.sf_swizzle_layout is None else a.sf_swizzle_layout
        return a, "mxfp8", int(layout)
    if name == "fp4_quantize":
        fmt = "mxfp4" if a.sf_use_ue8m0 else "nvfp4"
        return a, fmt, (1 if a.is_sf_8x4_layout else 0) if a.is_sf_swizzled_layout else 2
    return a, "nvfp4" if name == "nvfp4_quantize" else "mxfp4", int(a.sfLayout)


def read_quantiser(name: str, arguments: Mapping[str, Any]) -> Step:
    """fp4_quantize, nvfp4_quantize, mxfp4_quantize and mxfp8_quantize."""
    a, fmt, _ = quantised(name, arguments)
    x = a.a if hasattr(a, "a") else a.input
    if x.dtype not in TEXTS or x.dim() < 2:
        raise NotImplementedError(f"x is {x.dtype} {list(x.shape)}; read are bf16 and fp16 of two dimensions and more")
    x = x.reshape(-1, x.shape[-1])
    vector, alignment = getattr(a, "sf_vec_size", GROUP[fmt]), getattr(a, "alignment", 1)
    if vector != GROUP[fmt] or x.shape[1] % alignment:
        raise NotImplementedError(f"{fmt} in groups of {vector}, {x.shape[1]} columns aligned to {alignment}: not read")
    scale = None
    if fmt == "nvfp4":
        scale = uniform("the global scale", _global(a))
    recipe = fmt if x.dtype == torch.bfloat16 else f"{fmt}-fp16"
    case = case_of("quantize", x, hidden=x.shape[1], recipe=recipe)
    return Step(case, x, Rounding(x=flashinfer_quantize.RULES[fmt]), scale)


def _global(a: SimpleNamespace) -> Tensor:
    """The encode-sense global scales."""
    given = a.a_global_sf if hasattr(a, "a_global_sf") else a.global_scale
    if given is None:
        raise ValueError("globalScale is required when sfUseUE8M0 is false")
    scales: Tensor = given.float()
    return 1 / scales if getattr(a, "is_global_scale_inversed", False) else scales


def quantiser_output(name: str, arguments: Mapping[str, Any], result: tuple[Tensor, ...]) -> Tensor:
    """The matrix that a quantiser's case promises, of the codes and scales that came back."""
    _, fmt, layout = quantised(name, arguments)
    codes, scales = result
    flat = codes.reshape(-1, codes.shape[-1])
    scaling, columns = get(fmt).scaling, flat.shape[1] * (1 if fmt == "mxfp8" else 2)
    assert scaling is not None
    shape = scaling.scale_shape(len(flat), columns)
    logical = unswizzled(scales, LAYOUTS[layout], shape) if len(flat) else flat.new_empty(shape, dtype=torch.uint8)
    return matrix(flat, logical)


def read_activation(name: str, arguments: Mapping[str, Any]) -> Step:
    """silu_and_mul and its like: the gate's columns first."""
    a = bound(getattr(activations, name), arguments)
    if a.input.dtype not in TEXTS:
        raise NotImplementedError(f"input is {a.input.dtype}; read are bf16 and fp16")
    x = a.input.reshape(-1, a.input.shape[-1])
    recipe = TEXTS[a.input.dtype]
    case = case_of("activate", x, inter=x.shape[1] // 2, activation=flashinfer_activation.FUNCTIONS[name], recipe=recipe)
    return Step(case, x, Rounding(out=recipe))


def read_router(arguments: Mapping[str, Any]) -> Step:
    """fused_topk_deepseek with the groups and the scale of a rule that the reference has."""
    a = bound(fused_topk_deepseek, arguments)
    given = (a.n_group, a.topk_group, a.routed_scaling_factor)
    names = [name for name, constants in flashinfer_routing.RULES.items() if constants == given]
    if not names or a.backend != "default":
        known = ", ".join(f"{name} {constants}" for name, constants in flashinfer_routing.RULES.items())
        raise NotImplementedError(f"n_group, topk_group, routed_scaling_factor {given}, backend {a.backend}: read are {known}")
    experts = a.scores.shape[1]
    case = case_of("route", a.scores, experts=experts, top_k=a.topk, routing=names[0])
    x = torch.zeros(len(a.scores), 1)
    return Step(case, x, Rounding(activated=flashinfer_routing.SCORE), None, a.scores.float(), a.bias.float())


def router_output(arguments: Mapping[str, Any], written: Mapping[str, Tensor]) -> Tensor:
    """Ids and the bits of weights that the call left in its buffers."""
    return packed(written["topk_indices"], written["topk_values"])
