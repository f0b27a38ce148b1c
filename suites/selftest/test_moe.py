"""The whole layer against a loop over tokens that shares no code with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from reference.activation import ACTIVATIONS, Activation
from reference.experts import ExpertWeights, forward
from reference.moe import Experts, finalize, moe, passes
from reference.rounding import IDEAL, Rounding
from reference.routing import Routing

POINTS = ("routing_weight", "gate_up", "activated", "middle", "row", "weighted", "partial", "out")


@dataclass(frozen=True)
class Layer:
    """Small random weights of every expert, and a routing drawn at random."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    routing: Routing
    gated: bool

    def weights(self, expert: int) -> ExpertWeights:
        return ExpertWeights(self.gate[expert], self.up[expert] if self.gated else None, self.down[expert])

    def run(self, activation: Activation, rounding: Rounding = IDEAL) -> Tensor:
        return moe(self.x, self.routing, Experts(len(self.gate), self.weights, activation), rounding)


def layer(tokens: int = 9, gated: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = (
        torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(tokens)]) if tokens else torch.zeros(0, 3).long()
    )
    routing = Routing(ids, torch.rand(tokens, 3, generator=generator, dtype=torch.float64), torch.ones(tokens))
    return Layer(draw(tokens, 6), draw(5, 4, 6), draw(5, 4, 6), draw(5, 6, 4), routing, gated)


def by_hand(made: Layer, activation: Activation) -> Tensor:
    """One token, one expert, one neuron at a time."""
    out = torch.zeros_like(made.x)
    for t in range(made.x.shape[0]):
        for k in range(3):
            e, weight = int(made.routing.ids[t, k]), made.routing.weights[t, k]
            for j in range(4):
                gate = (made.gate[e, j] * made.x[t]).sum()
                up = (made.up[e, j] * made.x[t]).sum() if made.gated else None
                out[t] += weight * made.down[e, :, j] * activation.combine(gate, up)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)
def test_layer_equals_a_loop_over_tokens(activation: Activation) -> None:
    made = layer(gated=activation.gated)
    assert torch.allclose(made.run(activation), by_hand(made, activation), rtol=1e-12, atol=1e-12)


def test_no_tokens_give_no_rows() -> None:
    assert layer(tokens=0).run(ACTIVATIONS["swiglu"]).shape == (0, 6)


def test_one_token_is_routed_like_any_other() -> None:
    made = layer(tokens=1)
    assert torch.allclose(made.run(ACTIVATIONS["swiglu"]), by_hand(made, ACTIVATIONS["swiglu"]))


def test_experts_without_tokens_are_never_decoded() -> None:
    """Decoding all of 384 experts for one token would make the oracle useless."""
    made = layer(tokens=1)
    seen = [expert for expert, *_ in passes(made.x, made.routing, Experts(5, made.weights, ACTIVATIONS["swiglu"]))]
    assert seen == sorted(made.routing.ids[0].tolist())


def test_an_id_of_minus_one_adds_nothing() -> None:
    made = layer()
    ids = made.routing.ids.clone()
    ids[:, 1] = -1
    weights = made.routing.weights.clone()
    dropped = replace(made, routing=replace(made.routing, ids=ids)).run(ACTIVATIONS["swiglu"])
    weights[:, 1] = 0
    silent = replace(made, routing=replace(made.routing, weights=weights)).run(ACTIVATIONS["swiglu"])
    assert torch.allclose(dropped, silent, atol=1e-12)


def test_a_16_bit_x_is_widened_before_the_dot_product() -> None:
    made = layer()
    narrow = replace(made, x=made.x.bfloat16())
    wide = replace(made, x=made.x.bfloat16().double())
    assert torch.equal(narrow.run(ACTIVATIONS["swiglu"]), wide.run(ACTIVATIONS["swiglu"]))


@pytest.mark.parametrize("point", POINTS)
def test_every_rounding_point_changes_the_result(point: str) -> None:
    made = layer()
    assert not torch.equal(made.run(ACTIVATIONS["swiglu"], Rounding(**{point: "bf16"})), made.run(ACTIVATIONS["swiglu"]))


def test_expert_points_round_where_their_names_say() -> None:
    """Each stage written out with torch casts."""
    made, act = layer(), ACTIVATIONS["swiglu"]
    rounding = Rounding(gate_up="bf16", activated="bf16", middle="bf16", row="bf16")
    done = forward(made.x, made.weights(2), act, rounding)
    gate, up = ((made.x @ w.T).bfloat16().double() for w in (made.gate[2], made.up[2]))
    middle = (act.scalar(gate).bfloat16().double() * up).bfloat16().double()
    assert torch.equal(done.gate, gate)
    assert done.up is not None
    assert torch.equal(done.up, up)
    assert torch.equal(done.middle, middle)
    assert torch.equal(done.row, (middle @ made.down[2].T).bfloat16().double())


ROWS, WEIGHTS = torch.tensor([[[1.0078125], [-2.0]]], dtype=torch.float64), torch.tensor([[0.75, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rounding", "wanted"),
    [
        (Rounding(out="bf16"), 0.255859375),
        (Rounding(weighted="bf16", out="bf16"), 0.2578125),
        (Rounding(weighted="bf16", partial="bf16"), 0.2578125),
        (Rounding(partial="bf16"), 0.2578125),
        (IDEAL, 0.255859375),
    ],
)
def test_finalize_gives_the_worked_example(rounding: Rounding, wanted: float) -> None:
    """FlashInfer accumulates in fp32, vLLM rounds each product to bf16: one bf16 ulp apart."""
    assert finalize(ROWS, WEIGHTS, rounding).item() == wanted


def test_routing_weights_are_rounded_before_the_product() -> None:
    weights = torch.tensor([[1 / 3, 0.5]], dtype=torch.float64)
    rounded = finalize(ROWS, weights, Rounding(routing_weight="bf16"))
    assert rounded.item() == 0.333984375 * 1.0078125 - 1
