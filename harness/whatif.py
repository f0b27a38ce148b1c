"""What if the kernel had one known mistake: the layer computed anew, expert by expert, with a step replaced.

The impostors of the trust guard and the hypotheses of the diagnosis are the same wrong layers, asked for different tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.batched import Group
from harness.case import Case
from harness.inputs import Inputs, another_x, make_inputs
from reference.activation import ACTIVATIONS, Activation
from reference.experts import ExpertPass, ExpertWeights, forward, linear, mapped
from reference.format import Quantized
from reference.moe import Experts, moe, passes
from reference.rounding import IDEAL, Rounding
from reference.routing import Routing

AT_HAND = 3  # experts whose weights stay decoded: the one whose turn it is, and its two neighbours
# weights that may stay decoded, 32 MiB of float64, 1 GiB on a GPU: all of a small layer, which is asked again and again
KEPT = {"cpu": 2**22, "cuda": 2**27}
SATURATES = Rounding(
    activated="fp32"
)  # silu(32) is 32 in fp32 but 32 - 4e-13 in float64: the exact fill is judged as fp32 sees it
DEAR_EXPERTS = 2  # experts in which the trust guard makes mistakes that must decode: a third of the oracle's time at top 8
MAX_WORK = {"cpu": 2**32, "cuda": 2**38}  # multiply-adds of one question: about 5 s of float64 on a core, 0.1 s on an H200
DECODE_WORK = 16  # multiply-adds that drawing and decoding one weight costs as much as (measured, nvfp4 on a core)


@dataclass(frozen=True)
class Packed:
    """One expert's weights as stored: gate and up [inter, hidden] (up None when not gated), down [hidden, inter]; biases: its
    own of gate, up and down, float64 or None."""

    gate: Quantized
    up: Quantized | None
    down: Quantized
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def decode(self) -> ExpertWeights:
        """The same as numbers, float64."""
        up = None if self.up is None else self.up.format.decode(self.up)
        return ExpertWeights(self.gate.format.decode(self.gate), up, self.down.format.decode(self.down), *self.biases)


def decoded(packed: Sequence[Packed]) -> ExpertWeights:
    """`Packed.decode` of several, along a leading axis."""
    gates, ups, downs = ([getattr(p, name) for p in packed] for name in ("gate", "up", "down"))
    biases = (None if b[0] is None else torch.stack(b) for b in zip(*(p.biases for p in packed), strict=True))
    up = None if ups[0] is None else ups[0].format.decode_all(ups)
    return ExpertWeights(gates[0].format.decode_all(gates), up, downs[0].format.decode_all(downs), *biases)


class Loader:
    """Draws and decodes experts when asked and keeps the last AT_HAND of them, or more if they are small."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        shape = inputs.case.shape
        self.room = max(AT_HAND, KEPT[inputs.x.device.type] // max(1, 3 * shape.hidden * shape.inter))
        self._packed: dict[int, Packed] = {}
        self._biases: dict[int, tuple[Tensor | None, Tensor | None, Tensor | None]] = {}
        self._decoded: dict[tuple[str, int], ExpertWeights] = inputs.drawn.decoded if inputs.own_experts else {}

    def packed(self, expert: int) -> Packed:
        """The stored weights of one expert."""
        if expert not in self._packed:
            _make_room(self._packed, self.room)
            self._packed[expert] = Packed(*self.inputs.stored(expert), self.biases(expert))
        return self._packed[expert]

    def biases(self, expert: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of gate, up and down of one expert, float64 or None."""
        if expert not in self._biases:
            found = (*self.inputs.gate_up_bias(expert), self.inputs.down_bias(expert))
            gate, up, down = (None if b is None else b.double() for b in found)
            self._biases[expert] = gate, up, down
        return self._biases[expert]

    def weights(self, expert: int) -> ExpertWeights:
        """The decoded weights of one expert, float64."""
        key = (self.inputs.device, expert)
        if key not in self._decoded:
            self._keep(expert, self.packed(expert).decode())
        return self._decoded[key]

    def stacked(self, experts: Sequence[int]) -> ExpertWeights:
        """`weights` of several, along a leading axis."""
        keys = [(self.inputs.device, expert) for expert in experts]
        if all(key in self._decoded for key in keys):
            return mapped(torch.stack, [self._decoded[key] for key in keys])
        whole = decoded([self.packed(expert) for expert in experts])
        for i, expert in enumerate(experts):
            self._keep(expert, mapped(lambda t, i=i: t[0][i], [whole]))  # type: ignore[misc]
        return whole

    def _keep(self, expert: int, weights: ExpertWeights) -> None:
        _make_room(self._decoded, self.room)
        self._decoded[self.inputs.device, expert] = weights


def experts_of(case: Case, weights: Callable[[int], ExpertWeights]) -> Experts:
    """The case's experts as the reference takes them."""
    return Experts(case.shape.experts, weights, ACTIVATIONS[case.activation], weight_on_input=case.weighting == "oninput")


def _make_room(kept: dict[Any, Any], room: int) -> None:
    while len(kept) >= room:
        del kept[next(iter(kept))]


@dataclass(frozen=True)
class Turn:
    """One expert's turn over n slots: `done` is the right pass of their rows, weight [n] what their outputs are multiplied by,
    stale [n, hidden] what the previous call's x was in those rows; routed [n]: the weights that multiplied x, if any did. Of
    several experts at once, for mistakes that are not dear: a leading axis, and `stacked`, their weights."""

    loader: Loader
    experts: tuple[int, ...]
    done: ExpertPass
    weight: Tensor
    stale: Tensor
    rounding: Rounding = IDEAL
    routed: Tensor | None = None
    stacked: ExpertWeights | None = None

    @property
    def expert(self) -> int:
        """The one expert whose turn it is."""
        (expert,) = self.experts
        return expert

    @property
    def activation(self) -> Activation:
        """The case's activation."""
        return ACTIVATIONS[self.loader.inputs.case.activation]

    @property
    def weights(self) -> ExpertWeights:
        """Weights of those whose turn it is, decoded."""
        return self.loader.weights(self.expert) if self.stacked is None else self.stacked

    def neighbour(self, shift: int) -> int:
        """The expert `shift` further, around the end."""
        return (self.expert + shift) % self.loader.inputs.case.shape.experts

    def biases(self, shift: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of gate, up and down of the experts `shift` further, as they join the rows of a GEMM, or None."""
        count = self.loader.inputs.case.shape.experts
        found = [self.loader.biases((e + shift) % count) for e in self.experts]
        if self.stacked is None:
            return found[0]
        gate, up, down = (None if b[0] is None else torch.stack(b).unsqueeze(1) for b in zip(*found, strict=True))
        return gate, up, down

    def through(self, weights: ExpertWeights, x: Tensor | None = None) -> Tensor:
        """Rows [n, hidden] of x (or the right x) through other weights."""
        return forward(self.done.x if x is None else x, weights, self.activation, self.rounding).row

    def activated(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """Rows [n, hidden] from other pre-activations [n, inter]."""
        scalar = self.rounding.at("activated", self.activation.scalar(gate))
        return self.finished(scalar if up is None else scalar * self.activation.linear(up))

    def finished(self, middle: Tensor) -> Tensor:
        """Rows [n, hidden] from another input of GEMM 2 [n, inter]."""
        return linear(middle, self.weights.down, self.weights.down_bias)


@dataclass(frozen=True)
class Mistake:
    """A wrong kernel. `rows(turn)`: the rows [n, hidden] it computes, before the routing weights. kind: what a diagnosis
    calls it; text: in words; dear: whether it decodes weights of its own."""

    kind: str
    text: str
    rows: Callable[[Turn], Tensor]
    evidence: dict[str, Any] = field(default_factory=dict)
    dear: bool = False


@dataclass(frozen=True)
class Study:
    """Wrong layers at some tokens [n], on the CPU, float64. rows [n, top_k, hidden]: the right rows; deltas[i, scope]
    [n, hidden]: wrong minus right output of mistake i, made in every expert (scope None) or in one."""

    tokens: Tensor
    rows: Tensor
    deltas: dict[tuple[int, int | None], Tensor]


@dataclass(frozen=True)
class Layer:
    """The case's layer, for questions after the launch: its inputs are drawn anew, a bad kernel may have written to them.
    given: the inputs, where they are recorded and nothing can be drawn."""

    case: Case
    device: str
    given: Inputs | None = None

    @cached_property
    def inputs(self) -> Inputs:
        """Inputs nobody else holds."""
        return make_inputs(self.case, self.device) if self.given is None else self.given

    @cached_property
    def loader(self) -> Loader:
        """Their experts."""
        return Loader(self.inputs)

    @cached_property
    def stale(self) -> Tensor:
        """float64 [tokens, hidden]: x of the previous call."""
        return another_x(self.case, self.device, "/previous").double()

    @property
    def rounding(self) -> Rounding:
        """The rounding points under which the oracle computes its value."""
        return SATURATES if self.case.exact else IDEAL

    def experts_affordable(self, tokens: int) -> bool:
        """Whether all experts may be asked about so many tokens."""
        shape = self.case.shape
        return shape.experts * 3 * shape.hidden * shape.inter * (tokens + DECODE_WORK) <= MAX_WORK[self.device]

    def affordable(self, mistakes: Sequence[Mistake]) -> int:
        """At how many tokens these mistakes may be studied."""
        shape = self.case.shape
        each = sum(3 + DECODE_WORK * m.dear for m in mistakes) + DECODE_WORK
        return int(MAX_WORK[self.device] // (each * shape.hidden * shape.inter * shape.top_k))

    def study(self, tokens: Tensor, mistakes: Sequence[Mistake], scopes: Iterable[int] = ()) -> Study:
        """Every mistake at `tokens` [n], in all experts together and in each of `scopes` alone."""
        return study(self, tokens, mistakes, tuple(scopes))

    def expert_rows(self, expert: int, tokens: Tensor) -> Tensor:
        """What `expert` makes of tokens [n] whoever they were routed to, unweighted: [n, hidden] float64, CPU."""
        x = self.inputs.x[tokens.to(self.inputs.device)].double()
        weights = self.loader.weights(expert)
        return forward(x, weights, ACTIVATIONS[self.case.activation], self.rounding).row.cpu()

    def routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """The output [n, hidden] of tokens [n] under another routing of them, float64, CPU."""
        experts = experts_of(self.case, self.loader.weights)
        return moe(self.inputs.x[tokens.to(self.inputs.device)], routing, experts, self.rounding).cpu()


def spread(items: Tensor, most: int) -> Tensor:
    """At most `most` of items [n], evenly taken."""
    if len(items) <= most:
        return items
    return items[torch.linspace(0, len(items) - 1, most).round().long()]


def study(layer: Layer, tokens: Tensor, mistakes: Sequence[Mistake], scopes: tuple[int, ...]) -> Study:
    """See `Layer.study`."""
    shape, inputs = layer.case.shape, layer.inputs
    loader, tokens = layer.loader, tokens.to(inputs.device)
    routing = inputs.routing
    mine = Routing(routing.ids[tokens], routing.weights[tokens], routing.margin[tokens])
    rows = torch.zeros(len(tokens) * shape.top_k, shape.hidden, dtype=torch.float64, device=inputs.device)
    collected = Collected(mistakes, scopes, len(tokens), rows)
    experts = experts_of(layer.case, loader.weights)
    weights = experts.combining(mine.weights).flatten()
    for expert, slots, done, _ in passes(inputs.x[tokens], mine, experts, layer.rounding):
        routed = mine.weights.flatten()[slots] if experts.weight_on_input else None
        stale = _as_read(layer.stale[tokens[slots // shape.top_k]], routed)
        turn = Turn(loader, (expert,), done, weights[slots], stale, layer.rounding, routed)
        collected.add(turn, slots // shape.top_k)
        rows[slots] = done.row
    deltas = {key: delta.cpu() for key, delta in collected.deltas.items()}
    return Study(tokens.cpu(), rows.view(len(tokens), shape.top_k, shape.hidden).cpu(), deltas)


def _as_read(x: Tensor, routed: Tensor | None) -> Tensor:
    """x [n, hidden] as GEMM 1 gets it."""
    return x if routed is None else x * routed[:, None]


class Collected:
    """Sums what each mistake changes in the output of n tokens, some experts after others."""

    def __init__(self, mistakes: Sequence[Mistake], scopes: tuple[int, ...], tokens: int, like: Tensor) -> None:
        self.mistakes, self.scopes = mistakes, scopes
        keys = [(i, scope) for i in range(len(mistakes)) for scope in (None, *scopes)]
        self.deltas: dict[tuple[int, int | None], Tensor] = {k: like.new_zeros(tokens, like.shape[-1]) for k in keys}

    def add(self, turn: Turn, places: Tensor, asked: Callable[[Mistake], bool] = lambda mistake: True) -> None:
        """A turn's share of the mistakes `asked` for; places [n]: the position among the tokens of each of its slots."""
        for i, mistake in enumerate(self.mistakes):
            if not asked(mistake):
                continue
            delta = (mistake.rows(turn) - turn.done.row) * turn.weight[..., None]
            self.deltas[i, None].index_add_(0, places.flatten(), delta.flatten(0, -2))
            if self.scopes and turn.expert in self.scopes:
                self.deltas[i, turn.expert].index_add_(0, places, delta)


class Bystander:
    """Watches the oracle's pass and computes mistakes at some tokens [n] on the side, from the weights already decoded.

    A mistake that wants weights of its own is made in a few of the active experts only: harder to see than in all.
    """

    def __init__(self, layer: Layer, loader: Loader, tokens: Tensor, mistakes: Sequence[Mistake]) -> None:
        self.layer, self.loader, self.tokens, self.mistakes = layer, loader, tokens, mistakes
        inputs = loader.inputs
        self.place = torch.full((len(inputs.x),), -1, dtype=torch.int64, device=inputs.device)
        self.place[tokens] = torch.arange(len(tokens), device=inputs.device)
        self.routed = inputs.routing.weights.flatten() if layer.case.weighting == "oninput" else None
        self.weights = experts_of(layer.case, loader.weights).combining(inputs.routing.weights).flatten()
        like = torch.zeros(0, layer.case.shape.hidden, dtype=torch.float64, device=inputs.device)
        self.collected = Collected(mistakes, (), len(tokens), like)
        active = inputs.routing.ids[tokens].unique().tolist()
        self.dear_in = frozenset(active[:: max(2, len(active) // DEAR_EXPERTS)])

    def see(self, group: Group) -> None:
        """The right pass of some experts over their slots (token * top_k + k)."""
        tokens = group.slots // self.layer.case.shape.top_k
        mine = group if len(self.tokens) == len(self.place) else group.only(self.place[tokens] >= 0)
        if mine is None or not self.mistakes:
            return
        self._add(mine, lambda mistake: not mistake.dear)
        if any(mistake.dear for mistake in self.mistakes):
            for one in mine.alone(self.dear_in):
                self._add(one, lambda mistake: mistake.dear)

    def _add(self, group: Group, asked: Callable[[Mistake], bool]) -> None:
        tokens = group.slots // self.layer.case.shape.top_k
        routed = None if self.routed is None else self.routed[group.slots]
        stale = group.spread(_as_read(self.layer.stale[tokens], routed))
        weight, routed = group.spread(self.weights[group.slots]), None if routed is None else group.spread(routed)
        stacked = None if group.place is None else group.weights
        turn = Turn(self.loader, group.experts, group.done, weight, stale, self.layer.rounding, routed, stacked)
        self.collected.add(turn, group.spread(self.place[tokens]), asked)

    def outputs(self, value: Tensor) -> list[Tensor]:
        """What each mistake makes of the right output `value` [tokens, hidden]: [n, hidden] each."""
        return [value[self.tokens] + self.collected.deltas[i, None] for i in range(len(self.mistakes))]
