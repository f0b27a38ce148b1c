"""The exact fill: a layer of small integers in which no rounding point and no order of summation changes a bit.

A token has one entry, 1 or 2, in every span of columns. A gate row is live in one span, an up row in a few, so every sum of
GEMM 1 has a few terms whatever the sizes, and gate * up stays on the grid of the middle's format. Where activations are
quantised, every scale group holds an anchor: the largest code times a power of two, which fixes the group's scale, at a
column or neuron that nothing else reads. The last column is a feature that every token has and the last neuron reads it
alone, so a lost tail of either GEMM changes every token. A neuron's gate or up with a bias has no weights, so that its sums
are values that others have too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harness import fills
from harness.anchors import Anchors, Products, anchors
from harness.case import Case
from harness.hashing import Stream, Streams
from harness.idcode import own_columns
from reference.activation import ACTIVATIONS, SATURATED
from reference.format import Quantized
from reference.formats import get
from reference.routing import RULES

X_ENTRIES = 24  # spans of a row at most: enough to reach most neurons, few enough to keep spans wide
LEAST_SPAN = 4  # columns
TERM_BUDGET = 6.0  # down-projection terms per output over all experts: 4 % of the outputs are zero, and the largest of a
# million is 80 units of the 256 that a bf16 holds exactly
# A routed scaling factor of 5/2 takes three of a bf16's eight bits: sums below 52 units. With smaller terms and fewer of
# them the largest of two million is 36, and 9 % are zero.
SCALED_TERM_BUDGET = 4.0
SCALED_UNITS = 5  # what a slot weighs there; a shared expert that weighs more has fewer terms, and the others with it
ACTIVE = 0.45  # share of neurons with a non-zero product: 0.38 where an up row is live in one span, 0.50 ungated
DOWN_GROUPS = (8, 4, 2)  # columns of which a down row has at most one entry: the widest that reaches the wanted density
BIASED = 8  # one neuron in so many has a bias for its gate, another for its up, one output a bias of 1, another of -1
PROBE_ROWS = 16  # one output in so many hears the last neuron
X_SCALE = 2.0  # what a static format of the tokens is handed: 1 would not show a kernel that forgets it
MIDDLE_SCALE = 2.0  # the same of a global scale of the middle: block scales of 16..64 become E4M3's 32..128


@dataclass(frozen=True)
class ExactLayer:
    """The integers of one case, per matrix, and the scales they are stored with."""

    case: Case
    device: str

    def stream(self, name: str) -> Stream:
        """The random words called `name`."""
        return Stream(self.case.seed, f"exact.{name}", self.device)

    def streams(self, name: str, experts: Sequence[int]) -> Streams:
        """The random words of one tensor of several experts."""
        return Streams(self.case.seed, tuple(f"exact.{name}.{e}" for e in experts), self.device)

    @cached_property
    def columns(self) -> Anchors:
        """Anchors among the columns of x."""
        return anchors(get(self.case.recipe.acts), self.case.shape.hidden, self.stream("columns"))

    @cached_property
    def neurons(self) -> Anchors:
        """Anchors among the neurons: `at` reaches the peak of gate and of the middle, `spare` that of up."""
        found = anchors(get(self.case.recipe.middle), self.case.shape.inter, self.stream("neurons"))
        return replace(found, lift=found.lift.clamp(max=self.products.most_lift))

    @cached_property
    def products(self) -> Products:
        """What gate * up may be."""
        return Products.of(self.case.recipe.weights, self.case.recipe.middle, self.gated, self.case.scaled)

    @cached_property
    def middle_scale(self) -> float | None:
        """What a static format of the middle is handed."""
        scaling = get(self.case.recipe.middle).scaling
        if scaling is None or not scaling.static:
            return None
        if scaling.global_scale:
            return MIDDLE_SCALE
        return self.products.peak_code / (SATURATED * self.products.peak * 2.0 ** int(self.neurons.lift[0]))

    @property
    def features(self) -> int:
        """How many of the last columns are 1 in every token."""
        return 1 if get(self.case.recipe.middle).scaling is None else 2

    @property
    def span(self) -> int:
        """Columns of a span; of a one-hot token all of them."""
        if self.case.fill == "onehot":
            return self.case.shape.hidden
        return max(LEAST_SPAN, -(-self.case.shape.hidden // X_ENTRIES))

    @property
    def spans(self) -> int:
        """Spans of a row."""
        return -(-self.case.shape.hidden // self.span)

    @property
    def gated(self) -> bool:
        """Has the activation an up half?"""
        return ACTIVATIONS[self.case.activation].gated

    def x(self, stream: Stream) -> Tensor:
        """float32 [tokens, hidden]."""
        tokens, hidden = self.case.shape.tokens, self.case.shape.hidden
        words = stream.fields(tokens, self.spans, 32)
        values = torch.zeros(tokens, self.spans, self.span, device=self.device)
        places = (words >> 8) % self.span
        if self.case.fill == "onehot":
            places = own_columns(self._live(), tokens, stream)[:, None]
        values.scatter_(2, places.unsqueeze(-1), (1 + (words & 1)).float().unsqueeze(-1))
        values = values.flatten(1)[:, :hidden].contiguous()
        values[:, -self.features :] = 1
        fmt = get(self.case.recipe.acts)
        if fmt.scaling is not None:
            power = stream.child("anchors").fields(tokens, len(self.columns.at), 16) & 1
            if fmt.scaling.static and not fmt.scaling.global_scale:
                power.fill_(int(math.log2(X_SCALE)))
            values[:, self.columns.at] = fills.peak(fmt) * torch.exp2(-power.float())
        return values

    def _live(self) -> Tensor:
        """int64 [n]: the columns that weights read and that are not the same in every token."""
        live = torch.ones(self.case.shape.hidden, dtype=torch.bool, device=self.device)
        live[self.columns.at] = False
        live[-self.features :] = False
        return live.nonzero().flatten()

    def gate(self, experts: Sequence[int]) -> list[Quantized]:
        """[inter, hidden] each, of 0 and SATURATED, but for the anchors."""
        rows = self._rows("gate", experts, terms=1, signed=False)
        if len(self.neurons.at):
            for column, part in zip((-1, -2), self.products.parts, strict=True):
                rows[:, self.neurons.at, column] = (part << self.neurons.lift).to(torch.int8)
        return self._pack("gate", experts, rows, SATURATED)

    def up(self, experts: Sequence[int]) -> list[Quantized]:
        """[inter, hidden] each, of 0, 1 and -1, but for the anchors."""
        rows = self._rows("up", experts, self.products.up_terms, signed=True)
        if len(self.neurons.at):
            rows[:, self.neurons.at, -1] = 1
            for column, part in zip((-1, -2), self.products.parts, strict=True):
                rows[:, self.neurons.spare, column] = part
        return self._pack("up", experts, rows, 1.0)

    def down(self, experts: Sequence[int]) -> list[Quantized]:
        """[hidden, inter] each, of 0, 1 and -1."""
        shape, streams = self.case.shape, self.streams("down", experts)
        budget = SCALED_TERM_BUDGET if self.case.scaled else TERM_BUDGET
        budget *= min(1.0, SCALED_UNITS / max(1, RULES[self.case.routing].units(shape.top_k)[1]))
        density = budget / (ACTIVE * shape.inter * shape.top_k)
        group = next((g for g in DOWN_GROUPS if density * g <= 1), DOWN_GROUPS[-1])
        words = streams.fields(shape.hidden, -(-shape.inter // group), 32)
        entry = (1 - 2 * (words >> 19 & 1)) * ((words & 0xFFFF) < min(1.0, density * group) * 65536)
        rows = torch.zeros(*words.shape, group, dtype=torch.int8, device=self.device)
        rows.scatter_(3, ((words >> 16) & (group - 1)).unsqueeze(-1), entry.to(torch.int8).unsqueeze(-1))
        rows = rows.flatten(2)[..., : shape.inter].contiguous()
        rows[..., self.neurons.at] = 0
        rows[..., -1] = self._probe(streams.child("probe"))
        return self._pack("down", experts, rows, 1.0)

    def biases(self, name: str, experts: Sequence[int]) -> Tensor:
        """float32 [experts, inter] of "gate" (0 or SATURATED) and "up" (0, 1, -1), [experts, hidden] of "down" in GEMM 2's
        units of SATURATED."""
        if name == "down":
            classes = self.streams("down_bias", experts).fields(self.case.shape.hidden, 1, 16)[..., 0] % BIASED
            return SATURATED * ((classes == 0).float() - (classes == 1).float())
        biased = self._biased(name, experts).float()
        if name == "gate":
            return SATURATED * biased
        sign = self.streams("up_bias", experts).fields(self.case.shape.inter, 1, 16)[..., 0] & 1
        return biased * (1 - 2 * sign)

    def _biased(self, name: str, experts: Sequence[int]) -> Tensor:
        """bool [experts, inter]: the neurons of which "gate" or "up" is a bias alone, in a layer with biases."""
        inter = self.case.shape.inter
        classes = self.streams("bias", experts).fields(inter, 1, 16)[..., 0] % BIASED
        for kept in (self.neurons.at, self.neurons.spare, torch.tensor([inter - 1], device=self.device)):
            classes[:, kept] = BIASED
        return classes == ("gate", "up").index(name)

    def _probe(self, streams: Streams) -> Tensor:
        """int8 [experts, hidden]: one entry in every PROBE_ROWS rows."""
        hidden = self.case.shape.hidden
        words = streams.fields(-(-hidden // PROBE_ROWS), 1, 16)
        column = torch.zeros(*words.shape[:2], PROBE_ROWS, dtype=torch.int8, device=self.device)
        column.scatter_(2, words % min(PROBE_ROWS, 1 + (hidden - 1) % PROBE_ROWS), (1 - 2 * (words >> 15)).to(torch.int8))
        return column.flatten(1)[:, :hidden]

    def _rows(self, name: str, experts: Sequence[int], terms: int, signed: bool) -> Tensor:
        """int8 [experts, inter, hidden]: each row live in `terms` spans; the last neuron reads the last column only."""
        inter, hidden = self.case.shape.inter, self.case.shape.hidden
        streams, terms = self.streams(name, experts), min(terms, self.spans)
        first = streams.child("spans").fields(inter, 1, 32)
        chosen = (first + torch.arange(terms, device=self.device) * (self.spans // terms)) % self.spans
        bits = streams.child("entries").fields(inter, terms * self.span, 4) & 1
        places = (chosen.unsqueeze(-1) * self.span + torch.arange(self.span, device=self.device)).flatten(2)
        rows = torch.zeros(len(experts), inter, self.spans * self.span, dtype=torch.int8, device=self.device)
        rows.scatter_(2, places, (1 - 2 * bits if signed else bits).to(torch.int8))
        rows = rows[..., :hidden].contiguous()
        if len(self.columns.at):
            rows[..., self.columns.at] = 0
        rows[..., -self.features :] = 0
        if len(self.neurons.at):
            rows[:, self.neurons.at] = 0
            rows[:, self.neurons.spare] = 0
        rows[:, -1] = 0
        rows[:, -1, -1] = 1 - 2 * (streams.child("probe").fields(1, 1, 4)[:, 0, 0] & 1).to(torch.int8) if signed else 1
        if self.case.bias != "nobias":
            rows.masked_fill_(self._biased(name, experts).unsqueeze(-1), 0)
        return rows

    def _pack(self, name: str, experts: Sequence[int], integers: Tensor, unit: float) -> list[Quantized]:
        turns = [fills.turn(e, self.case.shape.experts) for e in experts]
        if name == "down" and self.gated:  # the turns of gate, up and down must not add up to the same for all experts
            turns = [-turn for turn in turns]
        scales = fills.Scales(self.streams(name, experts), self.stream(name), tuple(turns))
        return fills.pack_all(get(self.case.recipe.weights), integers, unit, scales)
