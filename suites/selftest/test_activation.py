"""Activations at known points, and the physical orders of gate and up."""

from __future__ import annotations

import pytest
import torch

from reference.activation import ACTIVATIONS, HALF_ORDERS, SATURATED, Activation, join_halves, split_halves

GATE = torch.tensor([-10, -1, 0, 1, 7, 10], dtype=torch.float64)
UP = torch.tensor([8, 2, 1, -8, 3, -1], dtype=torch.float64)
VALUES = {
    "swiglu": [-0.003632, -0.537883, 0, -5.848469, 20.980869, -9.999546],
    "swiglu_oai": [-3.2464e-6, -0.462613, 0, -5.074775, 27.999813, 0],
    "geglu": [0, -0.317311, 0, -6.730758, 21, -10],
    "silu": [-0.000454, -0.268941, 0, 0.731059, 6.993623, 9.999546],
    "relu": [0, 0, 0, 1, 7, 10],
    "gelu": [0, -0.158655, 0, 0.841345, 7, 10],
    "gelu_tanh": [0, -0.158808, 0, 0.841192, 7, 10],
    "identity": [-10, -1, 0, 1, 7, 10],
}
each = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_the_table(name: str) -> None:
    """At +-10 too: an extra lower clamp on the OAI gate shows only there, a missing upper one at 10."""
    activation = ACTIVATIONS[name]
    got = activation.combine(GATE, UP if activation.gated else None)
    assert got.tolist() == pytest.approx(VALUES[name], abs=2e-6)


def test_oai_gate_has_no_lower_clamp() -> None:
    oai = ACTIVATIONS["swiglu_oai"].scalar(torch.tensor([-10.0, -7.0], dtype=torch.float64))
    assert oai[0] != oai[1]
    assert oai[0].item() == pytest.approx(-4.05796e-7, rel=1e-5)


@each
def test_exact_activations_are_the_identity_where_they_saturate(activation: Activation) -> None:
    """In fp32, as the exact fill relies on; gelu(32) and silu(32) must not lose a bit."""
    gate = torch.tensor([0.0, SATURATED, 2 * SATURATED, 4 * SATURATED])
    saturated = torch.equal(activation.scalar(gate), gate) and torch.equal(activation.linear(gate), gate)
    assert saturated == activation.exact


@each
def test_a_gated_activation_multiplies_gate_and_linear(activation: Activation) -> None:
    assert torch.equal(activation.combine(GATE, UP), activation.scalar(GATE) * activation.linear(UP))
    assert torch.equal(activation.combine(GATE, None), activation.scalar(GATE))


@each
def test_float64_stays_float64(activation: Activation) -> None:
    assert activation.combine(GATE, UP).dtype == torch.float64


def test_names_are_keys() -> None:
    assert all(activation.name == name for name, activation in ACTIVATIONS.items())


@pytest.mark.parametrize("order", HALF_ORDERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_split_inverts_join(order: str, dim: int) -> None:
    gate, up = torch.arange(12).view(3, 4), torch.arange(100, 112).view(3, 4)
    both = join_halves(gate, up, order, dim)
    for split_dim in (dim, dim - 2):
        got_gate, got_up = split_halves(both, order, split_dim)
        assert torch.equal(got_gate, gate)
        assert torch.equal(got_up, up)


@pytest.mark.parametrize(
    ("order", "wanted"), [("gate_up", [0, 1, 10, 11]), ("up_gate", [10, 11, 0, 1]), ("interleaved", [0, 10, 1, 11])]
)
def test_halves_lie_as_their_order_says(order: str, wanted: list[int]) -> None:
    assert join_halves(torch.tensor([0, 1]), torch.tensor([10, 11]), order).tolist() == wanted


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="known: gate_up"):
        join_halves(GATE, UP, "sideways")
