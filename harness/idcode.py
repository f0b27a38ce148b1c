"""The probe fills: exact layers whose output tells which weights were read.

onehot: `harness.exact` with one entry a token, so that an output row is made of one column of w13 per expert.
idcode: one entry a token too, and every weight of w13 a code of its own (expert, row, column), as far as the format has
codes: signed integers up to LARGEST. Every output reads one neuron through a +-1 of w2, so it shows that code; a handful of
them tell the place they come from, and a wrong index names what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harness import fills
from harness.case import Case
from harness.hashing import Stream, Streams
from reference.activation import ACTIVATIONS, SATURATED
from reference.format import Quantized
from reference.formats import get
from reference.routing import RULES

LARGEST = (15, 7, 3, 1)  # code values are 1..n: as many as fit the weights' grid twice (room for scales) and the output
HELD = 256  # integers that a bf16, the coarsest output type, holds


@dataclass(frozen=True)
class IdLayer:
    """The integers of one idcode case, per matrix; activations and the input of GEMM 2 are plain."""

    case: Case
    device: str
    middle_scale: float | None = None

    def stream(self, name: str) -> Stream:
        """The random words called `name`."""
        return Stream(self.case.seed, f"idcode.{name}", self.device)

    def streams(self, name: str, experts: Sequence[int]) -> Streams:
        """The random words of one tensor of several experts."""
        return Streams(self.case.seed, tuple(f"idcode.{name}.{e}" for e in experts), self.device)

    @property
    def gated(self) -> bool:
        """Has the activation an up half?"""
        return ACTIVATIONS[self.case.activation].gated

    @cached_property
    def largest(self) -> int:
        """The largest code value: its double is on the weights' grid, and top_k products of it are exact in the output."""
        element = get(self.case.recipe.weights).element
        routed, shared = RULES[self.case.routing].units(self.case.shape.top_k)
        each = self.case.routed.top_k * routed + shared
        for n in LARGEST:
            product = 2 * n if self.gated else n + 1
            if product * each <= HELD and fills.on_grid(element, [float(i * p) for i in range(n + 1) for p in (1, 2)]):
                return n
        return LARGEST[-1]

    def x(self, stream: Stream) -> Tensor:
        """float32 [tokens, hidden]: a one in a column of its own, and in the last, which switches the gates on."""
        tokens, hidden = self.case.shape.tokens, self.case.shape.hidden
        values = torch.zeros(tokens, hidden, device=self.device)
        values.scatter_(1, own_columns(torch.arange(hidden - 1, device=self.device), tokens, stream)[:, None], 1)
        values[:, -1] = 1
        return values

    def gate(self, experts: Sequence[int]) -> list[Quantized]:
        """[inter, hidden] each: 0 or SATURATED, codes where there is no up half; SATURATED in the last column."""
        codes = self._codes("gate", experts)
        rows = codes & 1 if self.gated else codes.abs()
        rows[..., -1] = 1
        return self._pack("gate", experts, rows, SATURATED)

    def up(self, experts: Sequence[int]) -> list[Quantized]:
        """[inter, hidden] each: codes, 0 in the last column."""
        rows = self._codes("up", experts)
        rows[..., -1] = 0
        return self._pack("up", experts, rows, 1.0)

    def down(self, experts: Sequence[int]) -> list[Quantized]:
        """[hidden, inter] each: one 1 or -1 in every row, the neurons in an order of the expert's own."""
        hidden, inter = self.case.shape.hidden, self.case.shape.inter
        streams = self.streams("down", experts)
        neuron = own_columns(torch.arange(inter, device=self.device), hidden, streams)
        sign = 1 - 2 * (streams.child("signs").fields(hidden, 1, 4) & 1)
        rows = torch.zeros(len(experts), hidden, inter, dtype=torch.int8, device=self.device)
        return self._pack("down", experts, rows.scatter_(2, neuron.unsqueeze(-1), sign.to(torch.int8)), 1.0)

    def _codes(self, name: str, experts: Sequence[int]) -> Tensor:
        """int8 [experts, inter, hidden]: +-1..+-largest."""
        words = self.streams(name, experts).fields(self.case.shape.inter, self.case.shape.hidden, 16)
        return ((1 - 2 * (words >> 15)) * (1 + (words & 0x7FFF) % self.largest)).to(torch.int8)

    def _pack(self, name: str, experts: Sequence[int], integers: Tensor, unit: float) -> list[Quantized]:
        turns = [fills.turn(e, self.case.shape.experts) for e in experts]
        if name == "down" and self.gated:  # as in `harness.exact`
            turns = [-turn for turn in turns]
        scales = fills.Scales(self.streams(name, experts), self.stream(name), tuple(turns))
        return fills.pack_all(get(self.case.recipe.weights), integers, unit, scales)


def own_columns(columns: Tensor, count: int, stream: Stream | Streams) -> Tensor:
    """int64 [count], of several streams [streams, count]: columns [n] in a random order, over and over: no two alike among
    any n."""
    order = stream.child("order").fields(1, len(columns), 32).squeeze(-2).argsort(dim=-1, stable=True)
    return columns[order][..., torch.arange(count, device=columns.device) % len(columns)]
