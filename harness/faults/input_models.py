"""How other people's MoE tests draw their inputs, as data: their shapes and distributions, our own draws of them.

A row says what its test would accept typically, not for its own seed: the random generator is another one.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from harness.case import Shape
from harness.faults.audit import Subject
from harness.faults.layer import Layer, in_fp32, kept
from harness.oracle import Expected
from reference.activation import ACTIVATIONS
from reference.bounds import finalize_variance, independent_errors, middle_error, row_variance
from reference.experts import ExpertWeights, forward
from reference.format import Quantized
from reference.formats import get
from reference.moe import Experts, finalize, moe, passes
from reference.rounding import IDEAL, Rounding
from reference.routing import Routing

SWIGLU = ACTIVATIONS["swiglu"]
BF16_KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
NVFP4_KERNEL = Rounding(gate_up="bf16", middle="bf16>nvfp4", row="bf16", out="bf16")
KIMI_SCALING = 2.827  # routed_scaling_factor of Kimi-K2, in the test


class Scale(NamedTuple):
    """Standard deviations of x, w13 and w2, all drawn normal around 0."""

    x: float
    w13: float
    w2: float


@dataclass(frozen=True)
class InputModel:
    """One test's inputs. rule: the acceptance rule it uses (harness.faults.rules); weights, acts: format names; kernel:
    where a right kernel rounds; reference: where the test's own reference does (it quantises what the kernel quantises)."""

    name: str
    source: str
    rule: str
    rows: tuple[Shape, ...]
    scale: Callable[[Shape], Scale]
    route: Callable[[Shape, torch.Generator], Routing]
    weights: str = "bf16"
    acts: str = "bf16"
    kernel: Rounding = BF16_KERNEL
    reference: Rounding = IDEAL

    def subjects(self, draws: int = 1) -> Iterator[Subject]:
        """Every row, drawn so many times, as the audit judges it; an expert's weights are drawn when asked for."""
        for shape, draw in itertools.product(self.rows, range(draws)):
            layer = self.layer(shape, draw)
            name = f"{self.name}.{shape}.s{draw}"
            yield Subject(name, layer, expected_of(layer, self.kernel), self.value(layer))

    def value(self, layer: Layer) -> Tensor:
        """[tokens, hidden] float64: what the test's reference computes."""
        return moe(layer.x, layer.routing, layer.experts, self.reference)

    def layer(self, shape: Shape, draw: int = 0) -> Layer:
        """One row of the test, drawn for the `draw`-th time."""
        scale = self.scale(shape)

        def generator(name: str) -> torch.Generator:
            return torch.Generator().manual_seed(zlib.crc32(f"{self.name}.{shape}.{draw}.{name}".encode()))

        def normal(name: str, rows: int, columns: int, std: float) -> Tensor:
            return (torch.randn(rows, columns, generator=generator(name)) * std).bfloat16()

        def quantised(expert: int) -> tuple[Quantized, Quantized, Quantized]:
            names = (
                ("gate", shape.inter, shape.hidden),
                ("up", shape.inter, shape.hidden),
                ("down", shape.hidden, shape.inter),
            )
            stds = (scale.w13, scale.w13, scale.w2)
            drawn = (normal(f"{n}.{expert}", r, c, s) for (n, r, c), s in zip(names, stds, strict=True))
            gate, up, down = (_encode(self.weights, w) for w in drawn)
            return gate, up, down

        def weights(expert: int) -> ExpertWeights:
            return ExpertWeights(*(q.format.decode(q) for q in quantised(expert)))

        x, previous = (normal(name, shape.tokens, shape.hidden, scale.x) for name in ("x", "previous"))
        return Layer(
            x=_read_back(self.acts, x),
            routing=self.route(shape, generator("routing")),
            experts=Experts(shape.experts, kept(weights, shape), SWIGLU),
            rounding=in_fp32(self.kernel),
            out=torch.bfloat16,
            previous=_read_back(self.acts, previous),
            quantised=None if get(self.weights).scaling is None else quantised,
            draw=draw,
        )


def _encode(name: str, x: Tensor) -> Quantized:
    fmt = get(name)
    return fmt.encode(x, fmt.fit_global_scale(x.float()))


def _read_back(name: str, x: Tensor) -> Tensor:
    """x as the kernel multiplies it: through the activation format and back."""
    q = _encode(name, x)
    return q.format.decode(q)


def expected_of(layer: Layer, rounding: Rounding) -> Expected:
    """moecheck's real lane for a layer that no case describes: float64 value and sigma of the declared rounding points."""
    tokens, top_k = layer.routing.ids.shape
    rows = torch.zeros(tokens * top_k, layer.x.shape[1], dtype=torch.float64)
    variance = torch.zeros_like(rows)
    moments = torch.zeros(tokens * top_k, 2, dtype=torch.float64)
    activation = layer.experts.activation
    for _, mine, done, weights in passes(layer.x, layer.routing, layer.experts):
        middle = middle_error(done, weights, activation, rounding)
        rows[mine], variance[mine] = done.row, row_variance(done, weights, middle, rounding)
        moments[mine] = middle.moments
    by_token, weights_of = (tokens, top_k, -1), once(layer.routing)
    sigma = finalize_variance(rows.view(by_token), variance.view(by_token), weights_of, rounding).sqrt()

    def contribution(expert: int) -> Tensor:
        mine = torch.where(layer.routing.ids == expert, weights_of, 0.0).sum(-1)
        return forward(layer.x.double(), layer.experts.weights(expert), activation).row * mine[:, None]

    return Expected(
        value=finalize(rows.view(by_token), weights_of),
        sigma=sigma,
        independent=independent_errors(moments.view(tokens, top_k, 2), weights_of, layer.x.shape[1]),
        exact=False,
        reason="",
        routing=layer.routing,
        ambiguous=torch.zeros(tokens, dtype=torch.bool),
        sampled=torch.arange(tokens),
        impostors={},
        contribution=contribution,
    )


def once(routing: Routing) -> Tensor:
    """Routing weights [tokens, top_k] with a repeated expert's summed in its first slot, 0 in the others: both slots hold
    the same row with the same error, which therefore adds up instead of averaging out."""
    same = routing.ids[:, :, None] == routing.ids[:, None, :]
    first = torch.ones_like(same[0]).tril(-1).logical_and(same).any(-1).logical_not()
    return (same * routing.weights[:, None, :]).sum(-1) * first


def balanced(shape: Shape, generator: torch.Generator) -> Routing:
    """First expert in turn, shuffled over the tokens; the others drawn independently, repeats allowed; weights uniform,
    divided by their sum."""
    first = (torch.arange(shape.tokens) % shape.experts)[torch.randperm(shape.tokens, generator=generator)]
    others = torch.randint(shape.experts, (shape.tokens, shape.top_k - 1), generator=generator)
    weights = torch.rand(shape.tokens, shape.top_k, generator=generator).double()
    return _routing(torch.cat((first[:, None], others), dim=1), weights / weights.sum(-1, keepdim=True))


def softmax_then_top_k(shape: Shape, generator: torch.Generator) -> Routing:
    """Softmax of normal logits over all experts, the k largest, not renormalised."""
    chosen = torch.randn(shape.tokens, shape.experts, generator=generator).double().softmax(-1).topk(shape.top_k)
    return _routing(chosen.indices, chosen.values)


def biased_sigmoid(shape: Shape, generator: torch.Generator) -> Routing:
    """Logits 1.5 * normal, bias 0.8 * normal for the selection, weights sigmoid times the scaling factor of Kimi-K2."""
    scores = (1.5 * torch.randn(shape.tokens, shape.experts, generator=generator).double()).sigmoid()
    ids = (scores + 0.8 * torch.randn(shape.experts, generator=generator)).topk(shape.top_k).indices
    return _routing(ids, scores.gather(-1, ids) * KIMI_SCALING)


def _routing(ids: Tensor, weights: Tensor) -> Routing:
    return Routing(ids, weights, torch.full((len(ids),), torch.inf, dtype=torch.float64))


def _xavier(shape: Shape) -> Scale:
    fan = shape.hidden + shape.inter
    return Scale(0.5, math.sqrt(2 / (fan + shape.inter)), math.sqrt(2 / fan))


_VLLM = "vLLM tests/kernels/moe"
_MASKED = tuple(Shape(t, h, i, 8, k) for t, h, i in ((2, 128, 256), (16, 128, 512)) for k in (1, 2, 4))
_NVFP4 = tuple(Shape(2, 1024, 1024, e, k) for e in (40, 64, 256) for k in (1, 6, 8))
_MODULAR = tuple(Shape(t, 2048, 1024, 32, k) for t in (32, 64) for k in (4, 1))
INPUT_MODELS: dict[str, InputModel] = {
    model.name: model
    for model in (
        InputModel(
            "vllm_cutedsl_masked",
            f"{_VLLM}/test_cutedsl_moe.py::test_flashinfer_cutedsl_moe_masked: x randn/5, weights randn/10, 8 experts",
            "vllm_cutedsl_masked",
            _MASKED,
            lambda shape: Scale(1 / 5, 1 / 10, 1 / 10),
            balanced,
            weights="nvfp4",
            acts="nvfp4",
            kernel=NVFP4_KERNEL,
            reference=Rounding(middle="bf16>nvfp4"),
        ),
        InputModel(
            "vllm_mxint4",
            f"{_VLLM}/test_marlin_vs_trtllm_mxint4.py: x randn*0.5, Xavier weights, bf16 reference, 384 experts",
            "vllm_mxint4",
            (Shape(1, 512, 7168, 384, 8),),
            _xavier,
            biased_sigmoid,
        ),
        InputModel(
            "vllm_nvfp4",
            f"{_VLLM}/test_nvfp4_moe.py: x randn/10, weights randn/15; the rows m 2, n 1024, k 1024",
            "vllm_nvfp4",
            _NVFP4,
            lambda shape: Scale(1 / 10, 1 / 15, 1 / 15),
            softmax_then_top_k,
            weights="nvfp4",
            acts="nvfp4",
            kernel=NVFP4_KERNEL,
        ),
        InputModel(
            "vllm_modular_bf16",
            f"{_VLLM}/test_modular_kernel_combinations.py, bf16: x and weights randn/15, 32 experts",
            "vllm_modular",
            _MODULAR,
            lambda shape: Scale(1 / 15, 1 / 15, 1 / 15),
            softmax_then_top_k,
        ),
        InputModel(
            "vllm_modular_nvfp4",
            f"{_VLLM}/test_modular_kernel_combinations.py, nvfp4: x and weights randn/15, 32 experts",
            "vllm_modular_fp4",
            _MODULAR,
            lambda shape: Scale(1 / 15, 1 / 15, 1 / 15),
            softmax_then_top_k,
            weights="nvfp4",
            acts="nvfp4",
            kernel=NVFP4_KERNEL,
        ),
    )
}
