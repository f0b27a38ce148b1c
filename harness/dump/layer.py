"""The logical layer in a recorded call: its twin's reading of the physical buffers, as the reference takes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.backends._flashinfer import MEMBERS
from harness.backends.flashinfer_cutlass import MODES
from harness.case import Case, Recipe, Shape
from harness.dump.read import Dump, DumpError, Member
from harness.inputs import Inputs
from harness.twins.libs import _cutlass_modes as cutlass
from harness.twins.libs._flashinfer_layer import GATED, dense
from harness.twins.libs.flashinfer_cutlass import cutlass_fused_moe, read_call
from harness.twins.libs.flashinfer_enums import ActivationType
from harness.variants import Handed
from reference.activation import ACTIVATIONS
from reference.format import Quantized
from reference.formats import get
from reference.rounding import Rounding
from reference.routing import Routing

ROUTING = "renormalize"  # of the case's id only: ids and weights are the recorded ones
TEXTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
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


@dataclass(frozen=True)
class Layer:
    """What a call computes. x float32 [tokens, hidden] as GEMM 1 multiplies it; matrices(e): float32 (gate or None, up,
    down) of the rank's expert number e; ids int64, weights float32 [tokens, top_k]; local: the rank's experts; experts: of
    all ranks; middle_scale: what a static format of GEMM 2's input is handed; deterministic: no sum by atomics."""

    x: Tensor
    matrices: Callable[[int], tuple[Tensor | None, Tensor, Tensor]]
    ids: Tensor
    weights: Tensor
    local: range
    experts: int
    inter: int
    activation: str
    out: torch.dtype
    rounding: Rounding
    middle_scale: float | None
    deterministic: bool

    @property
    def case(self) -> Case:
        """The case's id has the shape; its tensors are the recorded ones."""
        shape = Shape(self.x.shape[0], self.x.shape[1], self.inter, self.experts, self.ids.shape[1])
        recipe = Recipe.parse(f"fp32-fp32-fp32-{TEXTS[self.out]}")
        case = Case("moe", shape, ROUTING, self.activation, recipe, "real")
        if problem := case.problem():
            raise DumpError(f"the recorded shapes make no case: {problem}")
        return case


@dataclass(frozen=True)
class Recorded(Handed):
    """Inputs that somebody recorded."""

    recorded: ClassVar[bool] = True

    layer: Layer | None = None

    @property
    def middle_scale(self) -> float | None:
        """See Inputs."""
        assert self.layer is not None
        return self.layer.middle_scale

    def gate_up(self, expert: int) -> tuple[Quantized, Quantized | None]:
        """See Inputs."""
        gate, up, _ = self._matrices(expert)
        return (up, None) if gate is None else (gate, up)

    def down(self, expert: int) -> Quantized:
        """See Inputs."""
        return self._matrices(expert)[2]

    def _matrices(self, expert: int) -> tuple[Quantized | None, Quantized, Quantized]:
        """An expert of another rank adds nothing, its slots have weight 0: any matrix will do."""
        assert self.layer is not None
        found = self.layer.matrices(expert - self.local.start if expert in self.local else 0)
        gate, up, down = (None if m is None else Quantized(get("fp32"), m.to(self.device)) for m in found)
        assert up is not None
        assert down is not None
        return gate, up, down


def inputs_of(layer: Layer, device: str) -> Inputs:
    """The layer's tensors on a device, as the judge takes them."""
    x, ids, weights = layer.x.to(device), layer.ids.to(device), layer.weights.double().to(device)
    mine = (ids >= layer.local.start) & (ids < layer.local.stop)
    margin = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
    routing = Routing(ids, torch.where(mine, weights, 0.0), margin)
    logits = torch.zeros(len(x), layer.experts, device=device)  # nobody routes
    return Recorded(layer.case, device, x, logits, None, None, handed=routing, local=layer.local, layer=layer)


def layer_of(dump: Dump) -> Layer:
    """DumpError where no entry point here has that name, or the call does something that no twin does."""
    if dump.function not in READERS:
        raise DumpError(f"{dump.folder}: a call of {dump.function}; read are: {', '.join(READERS)}")
    try:
        return READERS[dump.function](dump.arguments)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
        raise DumpError(f"{dump.folder}: {dump.function} would refuse this call: {error}") from error


def _cutlass(arguments: Mapping[str, Any]) -> Layer:
    """cutlass_fused_moe: as its twin reads it."""
    a = bound(cutlass_fused_moe, arguments)
    if a.fc1_expert_biases is not None or a.fc2_expert_biases is not None:
        raise NotImplementedError("biases are not read from a recorded call")
    mode, kind, values = read_call(a)
    out, experts = a.output_dtype, a.ep_size * mode.experts
    declared = next(m for m in MODES if m.name == NAMES[type(mode)])
    units = [_unit(mode, e) for e in range(mode.experts)]
    layer = Layer(
        x=mode.x(),
        matrices=partial(_matrices, mode, units),
        ids=dense(a.token_selected_experts).long(),
        weights=dense(a.token_final_scales),
        local=range(a.ep_rank * mode.experts, (a.ep_rank + 1) * mode.experts),
        experts=experts,
        inter=mode.inter,
        activation=_activation(kind, values),
        out=out,
        rounding=Rounding(),
        middle_scale=_static(mode, units),
        deterministic=not a.use_fused_finalize,
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


STATIC = {cutlass.Fp8Tensor: 1, cutlass.Nvfp4: 3, cutlass.W4A8: 3}  # where quant_scales has the scale of GEMM 2's input


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
    if len(set(units)) > 1:
        raise NotImplementedError("a scale of GEMM 2's input for each expert is not read")
    return units[0]


def _activation(kind: ActivationType, values: Mapping[str, Tensor]) -> str:
    """Our name; NotImplementedError for constants that the reference has not."""
    member = "SwigluBias" if kind == ActivationType.SwigluBias else kind.name
    name = "swiglu_oai" if member == "SwigluBias" else next((n for n, m in MEMBERS.items() if m == member), "")
    constants = ACTIVATIONS[name].parameters if name else {}
    given = {key: set(value.tolist()) for key, value in values.items()}
    wanted = {key: {torch.tensor(constants[key]).item()} for key in given if key in constants}
    if not name or given != wanted or (member == "SwigluBias" and given.keys() != constants.keys()):
        raise NotImplementedError(f"activation {kind.name} with {given} is none of the reference's")
    if (kind in GATED) != ACTIVATIONS[name].gated:
        raise NotImplementedError(f"activation {kind.name}")
    return name


def bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments with the defaults of the twin's signature, members of enums as the twin has them. TypeError for one that
    this release does not know and that is given."""
    parameters = inspect.signature(function).parameters
    if unknown := {n for n, v in arguments.items() if n not in parameters and v is not None}:
        raise TypeError(f"{', '.join(sorted(unknown))}: unknown to the release that the twin follows")
    given = {n: ActivationType[v.name] if isinstance(v, Member) else v for n, v in arguments.items() if n in parameters}
    return SimpleNamespace(**{n: given.get(n, p.default) for n, p in parameters.items()})


READERS: dict[str, Callable[[Mapping[str, Any]], Layer]] = {"cutlass_fused_moe": _cutlass}
