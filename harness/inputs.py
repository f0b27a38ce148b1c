"""Case -> Inputs: a function, not a file. Weights are drawn as codes, expert by expert, when somebody asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from harness import fills
from harness.case import Case
from harness.hashing import Stream
from reference.activation import ACTIVATIONS, SATURATED
from reference.format import Quantized
from reference.formats import get
from reference.routing import RULES, Routing

GATE_STD, UP_STD, X_RMS = 2.0, 1.5, 1.0  # pre-activations of std 1..3: below, silu(g) * u ~ g * u / 2 hides a gate/up swap
MIDDLE_RMS = 1.6  # rms of silu(g) * u at those deviations, by numerical integration
X_ENTRIES = 24  # non-zeros of a token in the exact fill: enough to reach most rows, few enough for 8-bit sums
GATE_HITS = 0.5  # expected matches of a gate row with a token: four in ten neurons fire
TERM_BUDGET = 6.0  # down-projection terms per output over all experts: 4 % of the outputs are zero, and of a million
# outputs of hidden 4096 the largest is 150 units of the 256 that a bf16 holds exactly
# A routed scaling factor of 5/2 takes three of a bf16's eight bits: sums below 52 units, so fewer and smaller terms.
SCALED_TERM_BUDGET, SCALED_UP_LIVE = 4.0, 1 / 16
HOT_BIAS = 4.0  # above any two sigmoids with their biases: the hot expert and its group win whatever the rest says
ACTIVE = 0.34  # share of neurons with a non-zero product at those densities
CHOSEN, REJECTED = 64.0, -1000.0  # exact fill logits: sigmoid(64) == 1 and exp(-1064) == 0 in float64


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case on one device.

    x [tokens, hidden] in the recipe's acts dtype; logits [tokens, experts] float32; bias [experts] float32 or None;
    topk_ids [tokens, top_k] int64 and topk_weights [tokens, top_k] float32 as the reference routes them, for kernels
    that do not route. Weights by expert: `gate_up(e)` -> (gate, up or None), `down(e)`, Quantized in logical order.
    """

    case: Case
    device: str
    x: Tensor
    logits: Tensor
    bias: Tensor | None

    @cached_property
    def routing(self) -> Routing:
        """The reference's routing of these logits."""
        return RULES[self.case.routing](self.logits, self.bias, self.case.shape.top_k)

    @property
    def topk_ids(self) -> Tensor:
        """int64 [tokens, top_k]."""
        return self.routing.ids

    @property
    def topk_weights(self) -> Tensor:
        """float32 [tokens, top_k]."""
        return self.routing.weights.float()

    @property
    def local(self) -> range:
        """The experts this rank holds: all, unless an expert-parallel shard is asked for."""
        return range(self.case.shape.experts)

    def gate_up(self, expert: int) -> tuple[Quantized, Quantized | None]:
        """(gate, up) weights of one expert, [inter, hidden] each; up is None where the activation is not gated."""
        shape = (self.case.shape.inter, self.case.shape.hidden)
        gate = self._matrix(f"gate.{expert}", shape, self._gate_rms, fills.Sparse(SATURATED, self._gate_live, signed=False))
        if not ACTIVATIONS[self.case.activation].gated:
            return gate, None
        up_live = SCALED_UP_LIVE if self._scaled else 1.0
        up_rms = UP_STD / math.sqrt(self.case.shape.hidden) / X_RMS
        return gate, self._matrix(f"up.{expert}", shape, up_rms, fills.Sparse(1.0, up_live, signed=True))

    def down(self, expert: int) -> Quantized:
        """Down-projection weights of one expert, [hidden, inter]."""
        shape = self.case.shape
        rms = math.sqrt(shape.top_k / shape.inter) / MIDDLE_RMS
        budget = SCALED_TERM_BUDGET if self._scaled else TERM_BUDGET
        live = min(1.0, budget * fills.GROUP / (ACTIVE * shape.inter * shape.top_k))
        return self._matrix(f"down.{expert}", (shape.hidden, shape.inter), rms, fills.Sparse(1.0, live, signed=True))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All experts of a plain recipe: w13 [experts, 2 * inter, hidden], gate rows first ([experts, inter, hidden] when
        not gated), and w2 [experts, hidden, inter]."""
        experts = range(self.case.shape.experts)
        w13 = torch.stack([torch.cat([q.codes for q in self.gate_up(e) if q is not None]) for e in experts])
        return w13, torch.stack([self.down(e).codes for e in experts])

    @property
    def _scaled(self) -> bool:
        return RULES[self.case.routing].scale.as_integer_ratio()[0] > 1

    @property
    def _gate_rms(self) -> float:
        return GATE_STD / math.sqrt(self.case.shape.hidden) / X_RMS

    @property
    def _gate_live(self) -> float:
        entries = min(X_ENTRIES, self.case.shape.hidden / fills.GROUP)
        return min(1.0, GATE_HITS * fills.GROUP / entries)

    def _matrix(self, name: str, shape: tuple[int, int], rms: float, sparse: fills.Sparse) -> Quantized:
        fmt = get(self.case.recipe.weights)
        stream = Stream(self.case.seed, f"{self.case.fill}.{name}", self.device)
        return fills.exact(fmt, shape, stream, sparse) if self.case.fill == "exact" else fills.real(fmt, shape, stream, rms)


def make_inputs(case: Case, device: str = "cpu", variant: str = "") -> Inputs:
    """The inputs of `case`. `variant` names another draw of x only (the previous call of a stale output)."""
    stream = Stream(case.seed, f"{case.fill}{variant}", device)
    shape = case.shape
    x = _x(case, stream.child("x"))
    logits = _logits(case, stream.child("logits"))
    bias = None
    if RULES[case.routing].biased:
        draw = stream.child("bias").fields(1, shape.experts, 16)[0]
        bias = ((draw & 0xFF).float() - 128) / 1024
        if case.skew == "hot" and case.fill == "real":
            bias[case.seed % shape.experts] = HOT_BIAS
    return Inputs(case, device, x, logits, bias)


def _x(case: Case, stream: Stream) -> Tensor:
    fmt, shape = get(case.recipe.acts), (case.shape.tokens, case.shape.hidden)
    if case.fill == "real":
        return fills.real(fmt, shape, stream, X_RMS).codes
    live = min(1.0, X_ENTRIES * fills.GROUP / case.shape.hidden)
    ones = fills.exact(fmt, shape, stream, fills.Sparse(1.0, live, signed=False)).codes
    return ones * (1 + (stream.child("twos").fields(*shape, 4) & 1)).to(ones.dtype)


def _logits(case: Case, stream: Stream) -> Tensor:
    """Logits whose order is a random permutation per token: neighbours are 1/32 apart or more, so nothing is nearly tied."""
    tokens, experts = case.shape.tokens, case.shape.experts
    keys = stream.fields(tokens, experts, 32) + _handicap(case, stream)
    order = keys.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(experts, device=order.device).expand_as(order))
    if case.fill == "exact":
        return torch.where(rank < case.shape.top_k, CHOSEN, REJECTED).float()
    spread = 1 + (stream.child("spread").fields(tokens, 1, 4) & 3).float() / 8
    return torch.where(rank < 16, 3 - rank / 4, -1 - (rank - 16) / 32).float() * spread


def _handicap(case: Case, stream: Stream) -> Tensor:
    """Added to the keys: a large one keeps an expert out, a negative one brings it to the front."""
    out, experts = 1 << 40, torch.arange(case.shape.experts, device=stream.device)
    if case.skew == "half":
        return (experts >= case.shape.experts // 2).long() * out
    groups, kept = RULES[case.routing].groups
    handicap = (experts == case.seed % case.shape.experts).long() * (-out if case.skew == "hot" else 0)
    if groups == 1 or case.fill == "real":
        return handicap
    group_keys = stream.child("groups").fields(case.shape.tokens, groups, 32)
    if case.skew == "hot":
        group_keys[:, case.seed % case.shape.experts // (case.shape.experts // groups)] -= out
    group_rank = group_keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return handicap + (group_rank.repeat_interleave(case.shape.experts // groups, dim=-1) >= kept).long() * out
