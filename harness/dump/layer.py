"""The logical layer, or the logical step of another op, in a recorded call, as the reference takes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.backends._flashinfer import MEMBERS
from harness.case import Case, Recipe, Shape
from harness.dump.read import DumpError, Member
from harness.inputs import Inputs
from harness.twins.libs.flashinfer_enums import ENUMS
from harness.variants import Handed
from reference.activation import ACTIVATIONS
from reference.format import Quantized
from reference.formats import get
from reference.rounding import Rounding
from reference.routing import RULES, Routing

HANDED = "renormalize"  # of the case's id only, where ids and weights are the recorded ones
TEXTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
UNBOUND = torch.finfo(torch.float32).max  # tllm_enums.DEFAULT_SWIGLU_LIMIT: no limit
PLAIN_SWIGLU = {"alpha": 1.0, "beta": 0.0, "limit": math.inf}
SAME = 2.0**-20  # relative: a scale that was made as a * b / a in fp32, again

Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Routed:
    """Who gets what. routing: what the reference makes of the recorded logits, or the recorded ids and weights with no margin;
    rule, logits [tokens, experts], bias [experts]: where the call routed by a rule of the reference's, for the diagnosis."""

    routing: Routing
    rule: str = HANDED
    logits: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What a call computes. x float32 [tokens, hidden] as GEMM 1 multiplies it; matrices(e): float32 (gate or None, up,
    down) of the rank's expert number e; biases(e): the same of what is added to their sums; local: the rank's experts;
    experts: of all ranks; middle_scale: what a static format of GEMM 2's input is handed; deterministic: no sum by atomics;
    on_input: routing weights multiply x."""

    x: Tensor
    matrices: Callable[[int], tuple[Tensor | None, Tensor, Tensor]]
    routed: Routed
    local: range
    experts: int
    inter: int
    activation: str
    out: torch.dtype
    rounding: Rounding
    middle_scale: float | None = None
    deterministic: bool = True
    biases: Callable[[int], Triple] | None = None
    on_input: bool = False

    @property
    def case(self) -> Case:
        """The case's id has the shape; its tensors are the recorded ones."""
        shape = Shape(self.x.shape[0], self.x.shape[1], self.inter, self.experts, self.routed.routing.ids.shape[1])
        recipe = Recipe.parse(f"fp32-fp32-fp32-{TEXTS[self.out]}")
        case = Case(
            "moe",
            shape,
            self.routed.rule,
            self.activation,
            recipe,
            "real",
            bias="nobias" if self.biases is None else "bias",
            weighting="oninput" if self.on_input else "onoutput",
        )
        return possible(case)

    def inputs(self, device: str) -> Inputs:
        """The layer's tensors on a device, as the judge takes them; slots of another rank's experts weigh nothing."""
        routing = placed(self.routed.routing, device)
        mine = (routing.ids >= self.local.start) & (routing.ids < self.local.stop)
        ids = torch.where((routing.ids < 0) | (routing.ids >= self.experts), 0, routing.ids)
        routing = Routing(ids, torch.where(mine, routing.weights, 0.0), routing.margin)
        given, bias = self.routed.logits, self.routed.bias
        logits = torch.zeros(len(ids), self.experts) if given is None else given.float()
        bias = None if bias is None else bias.to(device)
        x = self.x.to(device)
        return Recorded(self.case, device, x, logits.to(device), bias, handed=routing, local=self.local, layer=self)

    def check(self) -> None:
        """Decode the rank's first and last expert; ValueError where a matrix, a bias or the routing does not fit the layer."""
        ids, weights = self.routed.routing.ids, self.routed.routing.weights
        if ids.dim() != 2 or len(ids) != len(self.x) or ids.shape != weights.shape:
            given = f"ids {list(ids.shape)} and weights {list(weights.shape)}"
            raise ValueError(f"x has {len(self.x)} tokens, the routing {given}")
        if not self.local:
            raise ValueError("the rank holds no expert")
        hidden = self.x.shape[1]
        for expert in {0, len(self.local) - 1}:
            wanted = ((self.inter, hidden), (self.inter, hidden), (hidden, self.inter))
            _fit("projection", self.matrices(expert), wanted)
            if self.biases is not None:
                _fit("bias", self.biases(expert), tuple(shape[:1] for shape in wanted))


def _fit(what: str, found: Triple, wanted: tuple[tuple[int, ...], ...]) -> None:
    for name, tensor, shape in zip(("gate", "up", "down"), found, wanted, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"the {name} {what} is {list(tensor.shape)}, wanted {list(shape)} by x and the sizes given")


@dataclass(frozen=True)
class Step:
    """A call of another op: the inputs of `case` by the names of Inputs; x float [tokens, columns] in its own type."""

    case: Case
    x: Tensor
    rounding: Rounding
    x_scale: float | None = None
    logits: Tensor | None = None
    bias: Tensor | None = None
    deterministic: bool = True

    def inputs(self, device: str) -> Inputs:
        """The step's tensors on a device, as the judge takes them."""
        shape = self.case.shape
        logits = torch.zeros(shape.tokens, shape.experts) if self.logits is None else self.logits
        bias = None if self.bias is None else self.bias.to(device)
        nowhere = torch.zeros(shape.tokens, shape.top_k)
        routing = Routing(nowhere.long(), nowhere, nowhere[:, 0])
        if self.case.op == "route":
            routing = RULES[self.case.routing](logits, self.bias, shape.top_k)
        tensors = (self.x.to(device), logits.to(device), bias)
        return Recorded(self.case, device, *tensors, x_scale=self.x_scale, handed=placed(routing, device))


Call = Layer | Step


def placed(routing: Routing, device: str) -> Routing:
    """The same on a device, weights float64."""
    return Routing(routing.ids.to(device), routing.weights.double().to(device), routing.margin.double().to(device))


def possible(case: Case) -> Case:
    """The case; DumpError if there can be none of its shape."""
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
        return None if self.layer is None else self.layer.middle_scale

    def read(self, name: str, expert: int) -> tuple[Quantized | None, ...]:
        """See Inputs."""
        gate, up, down = self._matrices(expert)
        if name == "down":
            return (down,)
        return (up, None) if gate is None else (gate, up)

    def gate_up_bias(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """See Inputs."""
        gate, up, _ = self._biases(expert)
        return (up, None) if gate is None else (gate, up)

    def down_bias(self, expert: int) -> Tensor | None:
        """See Inputs."""
        return self._biases(expert)[2]

    def _matrices(self, expert: int) -> tuple[Quantized | None, Quantized, Quantized]:
        """An expert of another rank adds nothing, its slots have weight 0: any matrix will do."""
        assert self.layer is not None
        found = self.layer.matrices(self._number(expert))
        gate, up, down = (None if m is None else Quantized(get("fp32"), m.to(self.device)) for m in found)
        assert up is not None
        assert down is not None
        return gate, up, down

    def _biases(self, expert: int) -> Triple:
        if self.layer is None or self.layer.biases is None:
            return None, None, None
        gate, up, down = (None if b is None else b.to(self.device) for b in self.layer.biases(self._number(expert)))
        return gate, up, down

    def _number(self, expert: int) -> int:
        return expert - self.local.start if expert in self.local else 0


def handed(ids: Tensor, weights: Tensor, experts: int, unrouted: bool = False) -> Routed:
    """Routing that was decided before the call; DumpError for an id that names no expert (`unrouted`: a negative one is a slot
    without one)."""
    ids = ids.long()
    wrong = (ids >= experts) | ((ids < 0) & (not unrouted))
    if wrong.any():
        token, slot = wrong.nonzero()[0].tolist()
        raise DumpError(
            f"slot {slot} of token {token} names expert {int(ids[token, slot])} of {experts}, {int(wrong.sum())} slots do so:"
            " nothing says what the call should give, and the kernels check no range"
        )
    return Routed(Routing(ids, weights.double(), torch.full((len(ids),), math.inf, dtype=torch.float64)))


def uniform(name: str, values: Tensor) -> float:
    """The one value of them all; NotImplementedError where they differ by more than fp32 arithmetic does."""
    low, high = float(values.min()), float(values.max())
    if high - low > SAME * max(abs(low), abs(high)):
        raise NotImplementedError(f"{name} differs from expert to expert ({low:.6g} .. {high:.6g}), which is not read")
    return float(values.flatten()[0])


def activation(member: str, given: Mapping[str, float]) -> str:
    """Our name of the library's activation with these constants (the others have their defaults); NotImplementedError for
    constants that the reference has not."""
    member = "Swiglu" if member == "SwigluBias" else member
    known = [name for name, m in MEMBERS.items() if m == member]
    mine = {key: math.inf if value == UNBOUND else value for key, value in given.items()}
    for name in known:
        constants = {**PLAIN_SWIGLU, **ACTIVATIONS[name].parameters} if member == "Swiglu" else ACTIVATIONS[name].parameters
        rest = PLAIN_SWIGLU if member == "Swiglu" else constants
        if _float32({**rest, **mine}) == _float32(constants):
            return name
    raise NotImplementedError(f"activation {member} with {dict(given)} is none of the reference's")


def _float32(values: Mapping[str, float]) -> dict[str, float]:
    return {key: torch.tensor(value, dtype=torch.float32).item() for key, value in values.items()}


def bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> SimpleNamespace:
    """The arguments with the defaults of the twin's signature, members of enums as the twin has them. TypeError for one that
    this release does not know and that is given, and for one that is missing."""
    parameters = inspect.signature(function).parameters
    if unknown := {n for n, v in arguments.items() if n not in parameters and v is not None}:
        raise TypeError(f"{', '.join(sorted(unknown))}: unknown to the release that the twin follows")
    if missing := [n for n, p in parameters.items() if n not in arguments and p.default is p.empty]:
        raise TypeError(f"{', '.join(missing)}: wanted by the release that the twin follows, and not in the record")
    given = {n: ENUMS[v.enum][v.name] if isinstance(v, Member) else v for n, v in arguments.items() if n in parameters}
    return SimpleNamespace(**{n: given.get(n, p.default) for n, p in parameters.items()})
