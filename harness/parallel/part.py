"""What one rank is asked: a case of its own, made of the tokens it received and the experts it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from harness.backends.base import Backend
from harness.case import Case
from harness.inputs import Inputs
from harness.parallel.host import Received
from harness.parallel.placement import Placement
from harness.variants import Handed
from reference.format import Quantized
from reference.routing import Routing


@dataclass(frozen=True)
class Part(Handed):
    """Inputs of one rank; its expert 0 is expert `first` of `whole`, whose weights and static scales it has."""

    own_experts: ClassVar[bool] = False

    whole: Inputs | None = None
    first: int = 0

    def read(self, name: str, expert: int) -> tuple[Quantized | None, ...]:
        """See Inputs."""
        assert self.whole is not None
        return self.whole.read(name, expert + self.first)

    def gate_up_bias(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """See Inputs."""
        assert self.whole is not None
        return self.whole.gate_up_bias(expert + self.first)

    def down_bias(self, expert: int) -> Tensor | None:
        """See Inputs."""
        assert self.whole is not None
        return self.whole.down_bias(expert + self.first)

    @property
    def middle_scale(self) -> float | None:
        """See Inputs."""
        assert self.whole is not None
        return self.whole.middle_scale


def by_slots(backend: Backend) -> bool:
    """A kernel that knows of other ranks' experts is sent tokens, any other slots."""
    return not backend.expert_parallel


def case_of(case: Case, placement: Placement, rank: int, rows: int) -> Case:
    """A rank's case: `rows` packets for the experts it holds."""
    if placement.slots:
        return case.vary(tokens=rows, experts=len(placement.experts_of(rank)), top_k=1, routing="renormalize")
    return case.vary(tokens=rows)


def part(whole: Inputs, placement: Placement, rank: int, received: Received) -> Part:
    """The inputs of a rank's kernel. The judge's routing gives another rank's slots weight 0."""
    local = placement.experts_of(rank)
    case = case_of(whole.case, placement, rank, len(received.x))
    ids = received.ids - local.start if placement.slots else received.ids
    first = local.start if placement.slots else 0
    mine = range(len(local)) if placement.slots else local
    held = torch.where((ids >= mine.start) & (ids < mine.stop), received.weights.double(), 0.0)
    routing = Routing(ids=ids, weights=held, margin=torch.full((len(ids),), torch.inf, dtype=torch.float64, device=ids.device))
    given = {f.name: getattr(whole, f.name) for f in fields(Inputs)}
    logits = received.x.new_zeros((len(ids), case.shape.experts), dtype=torch.float32)
    given |= {"case": case, "x": received.x, "logits": logits, "bias": None}
    return Part(**given, handed=routing, given_weights=received.weights, local=mine, whole=whole, first=first)


def rows_in(x: Tensor, tokens: range) -> Tensor:
    """The rows of x that belong to a rank's tokens."""
    return x[tokens.start : tokens.stop]
