"""Activations at known points, and the physical orders of gate and up."""

from __future__ import annotations

import math

import pytest
import torch

from reference.activation import (
    ACTIVATIONS,
    HALF_ORDERS,
    LIBRARY_ORDERS,
    SATURATED,
    Activation,
    clamped_relu2,
    join_halves,
    oai_gate,
    oai_up,
    situ,
    split_halves,
    swiglu_bias,
    swiglu_step,
)

GATE = torch.tensor([-10, -1, 0, 1, 7, 10], dtype=torch.float64)
UP = torch.tensor([8, 2, 1, -8, 3, -1], dtype=torch.float64)
VALUES = {
    "swiglu": [-0.003632, -0.537883, 0, -5.848469, 20.980869, -9.999546],
    "swiglu_oai": [-3.2464e-6, -0.462613, 0, -5.074775, 27.999813, 0],
    "geglu": [0, -0.317311, 0, -6.730758, 21, -10],
    "swiglu_step": [-0.003178, -0.537883, 0, -5.117410, 20.980869, -7],
    "geglu_tanh": [0, -0.317616, 0, -6.729536, 21, -10],
    "situ": [-0.001386, -0.525829, 0, -5.541718, 11.232351, -3.944174],
    "relu2": [0, 0, 0, 1, 49, 100],
    "clamped_relu2": [0, 0, 0, 0.986552, 28.421257, 38.932786],
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


def test_the_saturated_gate_is_the_least_power_of_two_that_loses_nothing() -> None:
    """Another factor would cost significant bits, a larger power of two range."""
    silu = ACTIVATIONS["silu"].scalar
    assert math.frexp(SATURATED)[0] == 0.5
    assert silu(torch.tensor(SATURATED)) == SATURATED
    assert silu(torch.tensor(SATURATED / 2)) < SATURATED / 2


@each
def test_a_gated_activation_multiplies_gate_and_linear(activation: Activation) -> None:
    assert torch.equal(activation.combine(GATE, UP), activation.scalar(GATE) * activation.linear(UP))
    assert torch.equal(activation.combine(GATE, None), activation.scalar(GATE))


@each
def test_float64_stays_float64(activation: Activation) -> None:
    assert activation.combine(GATE, UP).dtype == torch.float64


def test_names_are_keys_and_every_value_is_checked() -> None:
    assert all(activation.name == name for name, activation in ACTIVATIONS.items())
    assert set(VALUES) == set(ACTIVATIONS)


GATED = {"swiglu", "swiglu_oai", "swiglu_step", "geglu", "geglu_tanh", "situ"}


def test_the_gated_ones_are_those_of_the_library() -> None:
    assert {name for name, activation in ACTIVATIONS.items() if activation.gated} == GATED


WIDE = torch.linspace(-40, 40, 4001, dtype=torch.float64)


@pytest.mark.parametrize(
    ("made", "limit_of"),
    [
        (swiglu_bias("defaults"), "swiglu"),
        (swiglu_bias("oai", 1.702, 1.0, 7.0), "swiglu_oai"),
        (swiglu_step("no limit", torch.inf), "swiglu"),
        (swiglu_step("default"), "swiglu_step"),
        (situ("wide", 1e9, torch.inf), "swiglu"),
        (situ("default", 4.0, 25.0), "situ"),
        (clamped_relu2("wide", 1e9), "relu2"),
    ],
)
def test_families_meet_their_neighbours_at_their_defaults_and_limits(made: Activation, limit_of: str) -> None:
    other = ACTIVATIONS[limit_of]
    up = WIDE.flip(0) if other.gated else None
    assert torch.allclose(made.combine(WIDE, up), other.combine(WIDE, up), rtol=1e-6, atol=1e-12)
    assert made.gated == other.gated


def test_parameters_are_recorded_as_given() -> None:
    assert ACTIVATIONS["swiglu_oai"].parameters == {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
    assert ACTIVATIONS["swiglu_step"].parameters == {"limit": 7.0}
    assert ACTIVATIONS["situ"].parameters == {"beta": 4.0, "linear_beta": 25.0, "limit": torch.inf}
    assert ACTIVATIONS["clamped_relu2"].parameters == {"limit": 7.0}
    assert swiglu_bias("a", alpha=2.0, beta=0.5, limit=3.0).parameters == {"alpha": 2.0, "beta": 0.5, "limit": 3.0}
    assert (oai_gate, oai_up) == (ACTIVATIONS["swiglu_oai"].scalar, ACTIVATIONS["swiglu_oai"].linear)


@pytest.mark.parametrize(
    ("made", "exact"),
    [
        (swiglu_bias("a"), True),
        (swiglu_bias("a", alpha=1.702), True),
        (swiglu_bias("a", alpha=0.5), False),
        (swiglu_bias("a", beta=1.0), False),
        (swiglu_bias("a", limit=7.0), False),
        (swiglu_step("a", torch.inf), True),
        (swiglu_step("a", 7.0), False),
        (situ("a"), False),
    ],
)
def test_a_family_member_says_whether_it_saturates_to_the_identity(made: Activation, exact: bool) -> None:
    assert made.exact is exact
    gate = torch.tensor([0.0, SATURATED, 4 * SATURATED])
    assert not exact or (torch.equal(made.scalar(gate), gate) and torch.equal(made.linear(gate), gate))


@pytest.mark.parametrize(
    ("made", "gate", "up", "wanted"),
    [
        (swiglu_bias("a", alpha=2.0, beta=0.5, limit=3.0), 5.0, -9.0, 3 * 0.9975274 * -2.5),
        (swiglu_bias("a", alpha=2.0, beta=0.5, limit=3.0), -5.0, 9.0, -5 * 4.5397869e-5 * 3.5),
        (swiglu_step("a", 3.0), 5.0, -9.0, 3.0 * -3.0),
        (swiglu_step("a", 3.0), 3.05, 1.0, 2.9120768),
        (situ("a", 1.0, 1.0, 2.0), 5.0, -9.0, 0.9640276 * 0.8807971 * -0.9640276),
        (situ("a", 1.0, 1.0, 2.0), -5.0, 9.0, -0.9999092 * 0.0066929 * 0.9640276),
        (situ("a", 2.0, torch.inf), 1.0, 50.0, 2 * 0.4621172 * 0.7310586 * 50),
        (clamped_relu2("a", 2.0), 3.0, None, (2 * 0.9051483) ** 2),
    ],
)
def test_parameters_act_where_the_formula_says(made: Activation, gate: float, up: float | None, wanted: float) -> None:
    """The gate is clamped from above only, up from both sides; the step clamps after the sigmoid: silu(3.05) < 3."""
    g, u = torch.tensor(gate, dtype=torch.float64), None if up is None else torch.tensor(up, dtype=torch.float64)
    assert made.combine(g, u).item() == pytest.approx(wanted, rel=2e-5)


TORCH = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
}


@pytest.mark.parametrize("name", TORCH)
def test_plain_activations_are_those_of_torch(name: str) -> None:
    assert torch.allclose(ACTIVATIONS[name].scalar(WIDE), TORCH[name](WIDE), rtol=1e-9, atol=1e-12)


def test_every_library_lays_its_halves_out_in_a_known_order() -> None:
    for library, half in LIBRARY_ORDERS.items():
        assert half.order in HALF_ORDERS, library
        assert half.source
    blocks = {library: half.block for library, half in LIBRARY_ORDERS.items() if half.block is not None}
    assert blocks == {"flashinfer.cute_dsl_nvfp4": 64, "flashinfer.cute_dsl_sm90": 32, "flashinfer.alphamoe": 8}
    assert LIBRARY_ORDERS["flashinfer.trtllm"].order == LIBRARY_ORDERS["flashinfer.cutlass"].order == "up_gate"
    assert LIBRARY_ORDERS["vllm"].order == LIBRARY_ORDERS["flashinfer.silu_and_mul"].order == "gate_up"
    assert LIBRARY_ORDERS["triton_kernels"].order == LIBRARY_ORDERS["vllm.swigluoai"].order == "interleaved"


@pytest.mark.parametrize("order", HALF_ORDERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_split_inverts_join(order: str, dim: int) -> None:
    gate, up = torch.arange(12).view(3, 4), torch.arange(100, 112).view(3, 4)
    both = join_halves(gate, up, order, dim)
    for dims in ((dim,), (dim - 2,), () if dim == 1 else (dim,)):  # the last by default
        got_gate, got_up = split_halves(both, order, *dims)
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
