"""A recorded call of cutlass_fused_moe: its twin's reading of the physical buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backends.flashinfer_cutlass import MODES
from harness.dump.layer import TEXTS, Layer, Triple, activation, bound, handed, uniform
from harness.twins.libs import _cutlass_modes as cutlass
from harness.twins.libs._flashinfer_layer import dense
from harness.twins.libs.flashinfer_cutlass import cutlass_fused_moe, read_call
from reference.rounding import Rounding

NAMES = {
    cutlass.Mode: "bf16",
    cutlass.Fp8Tensor: "fp8",
    cutlass.Fp8Block: "fp8_block",
    cutlass.W4A16: "w4a16",
    cutlass.W4A8: "w4a8",
    cutlass.Mxfp8: "mxfp8",
    cutlass.Mxfp8Mxfp4: "mxfp8_mxfp4",
    cutlass.Nvfp4: "nvfp4",
}
STATIC = {cutlass.Fp8Tensor: 1, cutlass.Nvfp4: 3, cutlass.W4A8: 3}  # where quant_scales has the scale of GEMM 2's input


def read_cutlass(arguments: Mapping[str, Any]) -> Layer:
    """The layer of the call with these arguments; the exceptions of its twin for what the library refuses."""
    a = bound(cutlass_fused_moe, arguments)
    mode, kind, values = read_call(a)
    out, experts = a.output_dtype, a.ep_size * mode.experts
    declared = next(m for m in MODES if m.name == NAMES[type(mode)])
    units = [_unit(mode, e) for e in range(mode.experts)]
    biases = (a.fc1_expert_biases, a.fc2_expert_biases)
    layer = Layer(
        x=mode.x(),
        matrices=partial(_matrices, mode, units),
        routed=handed(dense(a.token_selected_experts), dense(a.token_final_scales), experts),
        local=range(a.ep_rank * mode.experts, (a.ep_rank + 1) * mode.experts),
        experts=experts,
        inter=mode.inter,
        activation=activation(kind.name, {name: uniform(name, value) for name, value in values.items()}),
        out=out,
        rounding=Rounding(),
        middle_scale=_static(mode, units),
        deterministic=not a.use_fused_finalize,
        biases=None if biases[0] is None else partial(_biases, biases, mode.call.gated),
    )
    rounding = replace(declared.rounding(layer.case), x=None)
    if a.use_fused_finalize:  # rows are weighted in the epilogue and added to the output one after another
        rounding = replace(rounding, row=None, weighted=TEXTS[out], partial=TEXTS[out])
    return replace(layer, rounding=rounding)


def _matrices(mode: cutlass.Mode, units: list[float], expert: int) -> tuple[Tensor | None, Tensor, Tensor]:
    first = mode.weight(0, expert) * mode.alpha(0, expert)
    second = mode.weight(1, expert) * mode.alpha(1, expert) * units[expert]
    if not mode.call.gated:
        return None, first, second
    up, gate = first.chunk(2)
    return gate.contiguous(), up.contiguous(), second


def _biases(given: tuple[Tensor, Tensor], gated: bool, expert: int) -> Triple:
    first, second = (dense(bias)[expert].float() for bias in given)
    up, gate = first.chunk(2) if gated else (first, None)
    return gate, up, second


def _unit(mode: cutlass.Mode, expert: int) -> float:
    """What the twin's GEMM 2 input is a multiple of: a static scale stays in it."""
    if type(mode) not in STATIC:
        return 1.0
    scale = mode.scale(STATIC[type(mode)])
    if not isinstance(mode, cutlass.W4A8):
        return float(cutlass.number(scale, expert))
    if not (scale.numel() and mode.scale(2).numel()):  # columns are scaled where both GEMMs' are given
        return 1.0
    if len(scale.unique()) > 1:
        raise NotImplementedError("a scale for each column of GEMM 2's input is not read")
    return float(scale.flatten()[0])


def _static(mode: cutlass.Mode, units: list[float]) -> float | None:
    if type(mode) not in STATIC:
        return None
    return uniform("the scale of GEMM 2's input", torch.tensor(units, dtype=torch.float64))
