"""Recorded calls of FlashInfer's CuTe-DSL layers: Blackwell's W4A4 and W4A8, SM120's b12x, Hopper's bf16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.backends import flashinfer_b12x, flashinfer_cute_sm90, flashinfer_cutedsl
from harness.case import Recipe
from harness.dump.layer import TEXTS, Layer, activation, bound, handed, uniform
from harness.twins.libs import _cutedsl as dsl
from harness.twins.libs.flashinfer_b12x import KINDS, LIMIT, QUANTISER, b12x_fused_moe
from harness.twins.libs.flashinfer_cute_sm90 import ROWS, cute_dsl_fused_moe_bf16
from harness.twins.libs.flashinfer_cutedsl import INTERLEAVE, cute_dsl_fused_moe
from harness.twins.libs.flashinfer_enums import ActivationType
from reference.format import Format
from reference.rounding import Rounding

MODES = {"w4a4": "w4a4", "nvfp4": "w4a4", "w4a8": "w4a8"}  # quant_mode, 0.7.2.post1
FP4_MODES = ("fp4", "nvfp4", "w4a4")  # of b12x
PLAIN = {"alpha": 1.0, "beta": 0.0, "limit": math.inf}


@dataclass(frozen=True)
class Packed:
    """One GEMM's FP4 weights uint8 [experts, rows, columns / 2], scales in the MMA view, factor float [experts]."""

    data: Tensor
    scales: Tensor
    factor: Tensor
    fmt: Format

    def __call__(self, e: int) -> Tensor:
        """float32 [rows, columns] of the expert number e."""
        _, rows, half = self.data.shape
        assert self.fmt.scaling is not None
        scales = dsl.mma_scales(self.scales[..., e : e + 1], rows, 2 * half // self.fmt.scaling.group[1])
        return dsl.fp4_values(self.data[e], scales[0], self.fmt) * self.factor[e]


def read_cutedsl(arguments: Mapping[str, Any]) -> Layer:
    """cute_dsl_fused_moe, under either name: rows of w1 are up and gate in turn."""
    a = bound(cute_dsl_fused_moe, arguments)
    for name in ("per_token_scale", "localized_weights"):
        if getattr(a, name) is not None:
            raise NotImplementedError(f"{name} is not read")
    if (mode := MODES.get(a.quant_mode.lower(), "")) == "":
        raise NotImplementedError(f"quant_mode {a.quant_mode!r} is not read: no backend calls it")
    fmt, recipe = (dsl.NVFP4, "nvfp4-nvfp4") if mode == "w4a4" else (dsl.MXFP4, "mxfp4-mxfp8")
    unit = float(a.fc2_input_scale.flatten()[0]) if mode == "w4a4" else None
    first, second = (
        Packed(a.w1_weight, a.w1_weight_sf, a.w1_alpha, fmt),
        Packed(a.w2_weight, a.w2_weight_sf, a.w2_alpha * (unit or 1.0), fmt),
    )
    kind = ActivationType(a.activation_type)
    layer = _layer(
        a, _x(a, mode), partial(_halves, first, second, INTERLEAVE if kind.is_gated else 0), a.w2_weight.shape[2] * 2
    )
    given = {"alpha": a.swiglu_alpha, "beta": a.swiglu_beta, "limit": a.swiglu_limit} if kind is ActivationType.Swiglu else {}
    layer = replace(
        layer, activation=_named(a, kind, given), out=a.output_dtype, middle_scale=unit, deterministic=not a.use_fused_finalize
    )
    declared = flashinfer_cutedsl.atomic if a.use_fused_finalize else flashinfer_cutedsl.two_stage
    middle = recipe.partition("-")[2]
    case = replace(layer.case, recipe=Recipe.parse(f"{recipe}-{middle}-{TEXTS[a.output_dtype]}"))
    return replace(layer, rounding=replace(declared(case), x=None))


def _x(a: SimpleNamespace, mode: str) -> Tensor:
    """float32 [tokens, hidden]: codes times linear block scales."""
    if a.x_sf is None:
        raise ValueError("x_sf is required for block-scaled MoE")
    if mode == "w4a8":
        return dsl.scaled(a.x.float(), a.x_sf, dsl.MXFP8)
    blocks = 2 * a.x.shape[1] // 16
    return dsl.fp4_values(a.x, a.x_sf.reshape(-1)[: len(a.x) * blocks].view(len(a.x), blocks), dsl.NVFP4)


def read_b12x(arguments: Mapping[str, Any]) -> Layer:
    """b12x_fused_moe: up rows above gate rows, x quantised inside, a negative id is no slot."""
    a = bound(b12x_fused_moe, arguments)
    mode = (a.quant_mode or a.activation_precision).lower()
    if mode not in FP4_MODES or a.expert_map is not None or a.source_format != "modelopt":
        raise NotImplementedError(
            f"b12x_fused_moe of {mode}, {a.source_format}, expert_map: only NVFP4 is read, of all experts"
        )
    if a.fc2_input_scale is None:
        raise ValueError("fc2_input_scale is required when quant_mode='nvfp4'.")
    x_scale = uniform("the scale of x", a.w1_alpha if a.input_global_scale is None else a.input_global_scale)
    unit = uniform("fc2_input_scale", a.fc2_input_scale)
    alpha = torch.ones_like(a.w1_alpha) if a.input_global_scale is None else a.w1_alpha
    gated = KINDS[a.activation] != dsl.RELU2
    first, second = (
        Packed(w, sf, f, dsl.NVFP4)
        for w, sf, f in ((a.w1_weight, a.w1_weight_sf, alpha), (a.w2_weight, a.w2_weight_sf, a.w2_alpha / unit))
    )
    x = dsl.requantized(a.x.float(), QUANTISER, torch.tensor(1 / x_scale)) * x_scale
    inter = 2 * a.w2_weight.shape[2]
    layer = _layer(a, x, partial(_halves, first, second, inter if gated else 0), inter)
    names = {"silu": "Swiglu", "swigluoai_uninterleave": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}
    given = (
        {"alpha": a.swiglu_alpha, "beta": a.swiglu_beta, "limit": a.swiglu_limit or LIMIT}
        if a.activation.startswith("swigluoai")
        else {}
    )
    layer = replace(layer, activation=activation(names[a.activation], given), middle_scale=1 / unit, deterministic=False)
    declared = flashinfer_b12x.rounding(replace(layer.case, recipe=Recipe.parse("nvfp4-nvfp4")))
    return replace(layer, rounding=replace(declared, x=None))


def read_sm90(arguments: Mapping[str, Any]) -> Layer:
    """cute_dsl_fused_moe_bf16: 32 up rows and 32 gate rows in turn."""
    a = bound(cute_dsl_fused_moe_bf16, arguments)
    kind = ActivationType(a.activation_type)
    turn = ROWS if kind.is_gated else 0
    layer = _layer(
        a,
        a.x.float(),
        partial(_halves, lambda e: a.w1_weight[e].float(), lambda e: a.w2_weight[e].float(), turn),
        a.w2_weight.shape[2],
    )
    given = {"alpha": a.swiglu_alpha, "beta": a.swiglu_beta, "limit": a.swiglu_limit} if kind is ActivationType.Swiglu else {}
    layer = replace(layer, activation=_named(a, kind, given), out=a.x.dtype, deterministic=not a.use_fused_finalize)
    case = replace(layer.case, recipe=Recipe.parse(TEXTS[a.x.dtype]))
    return replace(layer, rounding=flashinfer_cute_sm90.rounding(a.use_fused_finalize, case))


def _layer(a: SimpleNamespace, x: Tensor, matrices: Any, inter: int) -> Layer:
    """What the three have in common; the rest is filled in."""
    count = a.num_experts if a.num_local_experts is None else a.num_local_experts
    offset = getattr(a, "local_expert_offset", 0)
    unrouted = not hasattr(a, "local_expert_offset")  # b12x documents negative ids
    return Layer(
        x=x,
        matrices=matrices,
        routed=handed(a.token_selected_experts, a.token_final_scales, a.num_experts, unrouted),
        local=range(offset, offset + count),
        experts=a.num_experts,
        inter=inter,
        activation="swiglu",
        out=torch.bfloat16,
        rounding=Rounding(),
    )


def _halves(first: Any, second: Any, turn: int, e: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """(gate or None, up, down); rows of the first are `turn` up rows and `turn` gate rows in turn, up alone where 0."""
    rows = first(e)
    if not turn:
        return None, rows, second(e)
    up, gate = (half.flatten(0, 1) for half in rows.unflatten(0, (-1, 2, turn)).unbind(1))
    return gate, up, second(e)


def _named(a: SimpleNamespace, kind: ActivationType, given: Mapping[str, float]) -> str:
    """Our name of the activation; Swiglu with a situ_beta is SiTU."""
    if a.situ_beta is None:
        return activation(kind.name, given)
    linear = math.inf if a.situ_linear_beta is None else a.situ_linear_beta
    return activation("Situ", {"beta": a.situ_beta, "linear_beta": linear})
