"""Case -> Inputs: a function, not a file. Weights are drawn as codes, expert by expert, when somebody asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from harness import fills, op_fills
from harness.case import Case
from harness.exact import X_SCALE, ExactLayer
from harness.hashing import Stream, Streams
from harness.idcode import IdLayer
from reference.activation import ACTIVATIONS
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.formats import get
from reference.routing import RULES, Routing

GATE_STD, UP_STD, X_RMS = 2.0, 1.5, 1.0  # pre-activations of std 1..3: below, silu(g) * u ~ g * u / 2 hides a gate/up swap
MIDDLE_RMS = 1.6  # rms of silu(g) * u at those deviations, by numerical integration
MIDDLE_PEAK = 62.0  # the largest of 1e9 products of those gates and ups: P(|g u| > z) ~ exp(-z / 3), and 3 ln(1e9) = 62
BIASED_PEAK = 70.0  # the same where a bias adds a third to either variance: deviations of 2.08 and 1.61
# A bias of the real fill is one of 128 multiples of a step, in [-1, 1) before the activation and, where the rows of 8 experts
# average out, in [-4, 4) after it: any 16-bit type holds it.
BIAS_STEPS, BIAS_STEP = 128, {"gate": 2.0**-6, "up": 2.0**-6, "down": 2.0**-4}
# Added to the logits, times their spread, where routing weights multiply the input: sigmoid(3) is nearly 1, and 1 on the input
# is 1 on the output.
ON_INPUT_SHIFT = -3.5
BIAS_SHIFT = 1.0  # every biased score is negative: a mask or a sentinel of 0 then wins (vllm#30204, flashinfer#1868)
HOT_BIAS = 4.0  # above any two sigmoids with their biases: the hot expert and its group win whatever the rest says
CHOSEN, REJECTED = 64.0, -1000.0  # exact fill logits: sigmoid(64) == 1 and exp(-1064) == 0 in float64
TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of a matrix of several experts: a core's cache; a launch's worth
DRAWN_BYTES = 1 << 28  # weights kept between a case's relations; a served layer of several GB is drawn anew each time


Draw = Callable[[Sequence[int]], list[tuple[Quantized | None, ...]]]  # experts -> their matrices


@dataclass
class Drawn:
    """Weights that were drawn already, for whoever asks again: the oracle, the backend and each relation do. decoded: (device,
    expert) -> as numbers, for the oracle alone; biases: (device, name) -> those of all experts."""

    kept: dict[tuple[str, str, int], tuple[Quantized | None, ...]] = field(default_factory=dict)
    biases: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    decoded: dict[tuple[str, int], ExpertWeights] = field(default_factory=dict)
    size: int = 0

    def get(self, key: tuple[str, str, int], together: Sequence[int], draw: Draw) -> tuple[Quantized | None, ...]:
        """What `draw` gave the first time `key` (device, name, expert) was asked for, as for the experts `together` with it."""
        if key not in self.kept:
            device, name, expert = key
            wanted = [e for e in together if (device, name, e) not in self.kept]
            drawn = dict(zip(wanted, draw(wanted), strict=True))
            self.size += sum(q.codes.nbytes for matrices in drawn.values() for q in matrices if q is not None)
            if self.size > DRAWN_BYTES:
                return drawn[expert]
            self.kept |= {(device, name, e): matrices for e, matrices in drawn.items()}
        return self.kept[key]


def _copied(q: Quantized | None) -> Quantized | None:
    if q is None:
        return None
    scales, global_scale, zeros = (None if t is None else t.clone() for t in (q.scales, q.global_scale, q.zeros))
    return Quantized(q.format, q.codes.clone(), scales, global_scale, zeros)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case on one device.

    x [tokens, hidden] in the recipe's carrier dtype, fixed points of the acts format where that is quantised; x_scale: what
    that format is handed if its scaling is `static` (encode sense, a power of two), else None; logits [tokens, routed
    experts] float32, bias [routed experts] float32 or None: all but fused shared ones; topk_ids [tokens, top_k] int64 and
    topk_weights [tokens, top_k] float32 as the reference routes them, for kernels that do not route. Another op's x and
    logits: harness/op_fills.py. Weights by expert: `gate_up(e)` -> (gate, up or None), `down(e)`, Quantized in logical order,
    copies each time: a subject may write to what it was handed; `stored(e)` -> all three, for who only reads; biases, float32
    or None: `gate_up_bias(e)`, `down_bias(e)`. recorded: somebody else's tensors, which no id says.
    """

    recorded: ClassVar[bool] = False
    own_experts: ClassVar[bool] = True  # expert e of every inputs that share `drawn` is the same

    case: Case
    device: str
    x: Tensor
    logits: Tensor
    bias: Tensor | None
    x_scale: float | None = None
    drawn: Drawn = field(default_factory=Drawn, compare=False, repr=False)

    @cached_property
    def x_quantized(self) -> Quantized | None:
        """x as codes and scales of the acts format, which decode to x exactly; None where acts are plain."""
        fmt = get(self.case.recipe.acts)
        if fmt.scaling is None:
            return None
        if fmt.scaling.static and fmt.scaling.global_scale:
            return fmt.encode(self.x, torch.tensor(self.x_scale, device=self.device))
        return fmt.encode(self.x, fmt.fit_global_scale(self.x))

    @cached_property
    def middle_scale(self) -> float | None:
        """What GEMM 2's quantiser is handed where its format's scaling is `static`: the global scale, or what a value is
        multiplied by to become a code (encode sense, a power of two). None where scales are derived from the values."""
        fmt = get(self.case.recipe.middle)
        if self.case.exact:
            return self._exact.middle_scale
        if fmt.scaling is None or not fmt.scaling.static:
            return None
        room = fmt.scaling.global_range if fmt.scaling.global_scale else fills.peak(fmt)
        return 2.0 ** math.floor(math.log2(room / (MIDDLE_PEAK if self.case.bias == "nobias" else BIASED_PEAK)))

    @property
    def middle_global_scale(self) -> Tensor | None:
        """`middle_scale` as float32 [] where the middle's format has a global scale, else None."""
        scaling = get(self.case.recipe.middle).scaling
        if scaling is None or not scaling.global_scale or self.middle_scale is None:
            return None
        return torch.tensor(self.middle_scale, device=self.device)

    @cached_property
    def _exact(self) -> ExactLayer | IdLayer:
        return exact_layer(self.case, self.device)

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
        gate, up = map(_copied, self.read("gate_up", expert))
        assert gate is not None
        return gate, up

    def down(self, expert: int) -> Quantized:
        """Down-projection weights of one expert, [hidden, inter]."""
        (down,) = map(_copied, self.read("down", expert))
        assert down is not None
        return down

    def stored(self, expert: int) -> tuple[Quantized, Quantized | None, Quantized]:
        """(gate, up, down) of one expert, nobody's to write to."""
        gate, up, down = (*self.read("gate_up", expert), *self.read("down", expert))
        assert gate is not None
        assert down is not None
        return gate, up, down

    def read(self, name: str, expert: int) -> tuple[Quantized | None, ...]:
        """The matrices of "gate_up" or "down"; what another source of weights replaces."""
        draw = self._gate_up if name == "gate_up" else self._down
        return self.drawn.get((self.device, name, expert), self._together(expert), draw)

    def _together(self, expert: int) -> range:
        """The experts that are drawn with this one: of a small layer's matrices many take no longer than one."""
        shape = self.case.shape
        count = max(1, TOGETHER[self.x.device.type] // max(1, shape.inter * shape.hidden))
        return range(expert // count * count, min(shape.experts, expert // count * count + count))

    def _gate_up(self, experts: Sequence[int]) -> list[tuple[Quantized | None, ...]]:
        gated = ACTIVATIONS[self.case.activation].gated
        if self.case.exact:
            return _pairs(self._exact.gate(experts), self._exact.up(experts) if gated else None)
        shape = (self.case.shape.inter, self.case.shape.hidden)
        scaling = get(self.case.recipe.weights).scaling
        shared = scaling is not None and scaling.static
        stds = (math.sqrt(GATE_STD * UP_STD),) * 2 if shared else (GATE_STD, UP_STD)
        gate_rms, up_rms = (std / math.sqrt(self.case.shape.hidden) / X_RMS for std in stds)
        gate = self._real("gate", experts, shape, gate_rms)
        return _pairs(gate, self._real("up", experts, shape, up_rms, "gate") if gated else None)

    def _down(self, experts: Sequence[int]) -> list[tuple[Quantized | None, ...]]:
        shape = self.case.shape
        if self.case.exact:
            return [(down,) for down in self._exact.down(experts)]
        rms, size = math.sqrt(shape.top_k / shape.inter) / MIDDLE_RMS, (shape.hidden, shape.inter)
        routed = [e for e in experts if e < self.case.routed.experts]
        # As loud as a routed expert times its weight: in the rounding of a shared expert's rows a routed slot would be lost.
        quiet = rms * RULES[self.case.routing].scale / self.case.routed.top_k
        parts = (routed, rms), (experts[len(routed) :], quiet)
        return [(down,) for part, level in parts if part for down in self._real("down", part, size, level)]

    def gate_up_bias(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """What one expert adds to its sums of GEMM 1, float32 [inter] for gate and up; None for what there is not."""
        gated = ACTIVATIONS[self.case.activation].gated
        return self._bias("gate", expert), self._bias("up", expert) if gated else None

    def down_bias(self, expert: int) -> Tensor | None:
        """The same of GEMM 2, [hidden]."""
        return self._bias("down", expert)

    def _bias(self, name: str, expert: int) -> Tensor | None:
        if self.case.bias == "nobias":
            return None
        key = (self.device, name)
        if key not in self.drawn.biases:
            self.drawn.biases[key] = self._all_biases(name, range(self.case.shape.experts))
        return self.drawn.biases[key][expert].clone()

    def _all_biases(self, name: str, experts: Sequence[int]) -> Tensor:
        """float32 [experts, inter or hidden]."""
        if self.case.exact:
            assert isinstance(self._exact, ExactLayer)
            return self._exact.biases(name, experts)
        size = self.case.shape.hidden if name == "down" else self.case.shape.inter
        streams = Streams(self.case.seed, tuple(f"real.{name}_bias.{e}" for e in experts), self.device)
        return (streams.fields(size, 1, 16)[..., 0] % BIAS_STEPS - BIAS_STEPS // 2).float() * BIAS_STEP[name]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All experts of a plain recipe: w13 [experts, 2 * inter, hidden], gate rows first ([experts, inter, hidden] when
        not gated), and w2 [experts, hidden, inter]."""
        gates, ups, downs = zip(*(self.stored(e) for e in range(self.case.shape.experts)), strict=True)
        halves = [torch.stack([q.codes for q in half]) for half in (gates, ups) if half[0] is not None]
        return torch.cat(halves, dim=1), torch.stack([q.codes for q in downs])

    def _real(self, name: str, experts: Sequence[int], shape: tuple[int, int], rms: float, common: str = "") -> list[Quantized]:
        own, other = (
            Streams(self.case.seed, tuple(f"real.{n}.{e}" for e in experts), self.device) for n in (name, common or name)
        )
        return fills.real_all(get(self.case.recipe.weights), shape, own, rms, other)


def _pairs(gates: list[Quantized], ups: list[Quantized] | None) -> list[tuple[Quantized | None, ...]]:
    return list(zip(gates, [None] * len(gates) if ups is None else ups, strict=True))


def exact_layer(case: Case, device: str) -> ExactLayer | IdLayer:
    """The integers of a case at which bits are due."""
    return IdLayer(case, device) if case.fill == "idcode" else ExactLayer(case, device)


def another_x(case: Case, device: str, variant: str) -> Tensor:
    """x [tokens, hidden] of `make_inputs(case, device, variant)`, alone."""
    return _x(case, _stream(case, device, variant).child("x"))[0]


def _stream(case: Case, device: str, variant: str) -> Stream:
    return Stream(case.seed, f"{'' if case.op == 'moe' else case.op}{case.fill}{variant}", device)


def make_inputs(case: Case, device: str = "cpu", variant: str = "") -> Inputs:
    """The inputs of `case`. `variant` names another draw of x and logits for the same weights."""
    stream = _stream(case, device, variant)
    x, x_scale = _x(case, stream.child("x"))
    router = replace(case, shape=case.routed)  # a fused shared expert has no logit
    logits = _logits(router, stream.child("logits"))
    if case.op == "route":
        logits = op_fills.logits(case, logits)
    bias = None
    if RULES[case.routing].biased:
        draw = stream.child("bias").fields(1, case.routed.experts, 16)[0]
        bias = (draw - (1 << 15)).float() / (1 << 18)
        if case.fill == "real":
            bias -= BIAS_SHIFT
        if case.skew == "hot" and case.fill == "real":
            bias[case.seed % case.routed.experts] = HOT_BIAS
    return Inputs(case, device, x, logits, bias, x_scale)


def _x(case: Case, stream: Stream) -> tuple[Tensor, float | None]:
    """x, and what a static acts format is handed to quantise it."""
    if case.op != "moe":
        return op_fills.x(case, stream)
    fmt, carrier = get(case.recipe.acts), get(case.recipe.carrier)
    shape = (case.shape.tokens, case.shape.hidden)
    if case.exact:
        x, scale = exact_layer(case, stream.device).x(stream).to(carrier.torch_dtype), X_SCALE
    elif fmt.scaling is None:
        return fills.real(fmt, shape, stream, X_RMS).codes, None
    else:
        x, scale = fills.real_acts(fmt, shape, stream, X_RMS, carrier)
    return x, scale if fmt.scaling is not None and fmt.scaling.static else None


def _logits(case: Case, stream: Stream) -> Tensor:
    """Logits whose order is a random permutation per token: neighbours are 1/32 apart or more, so nothing is nearly tied."""
    tokens, experts = case.shape.tokens, case.shape.experts
    keys = stream.fields(tokens, experts, 32) + _handicap(case, stream)
    order = keys.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(experts, device=order.device).expand_as(order))
    if case.exact:
        return torch.where(rank < case.shape.top_k, CHOSEN, REJECTED).float()
    spread = 1 + (stream.child("spread").fields(tokens, 1, 4) & 3).float() / 8
    shift = ON_INPUT_SHIFT if case.weighting == "oninput" else 0.0
    return (torch.where(rank < 16, 3 - rank / 4, -1 - (rank - 16) / 32).float() + shift) * spread


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
