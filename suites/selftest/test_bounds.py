"""The a priori variance against what rounding really does: simulated kernels that round where they say."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.case import Case
from harness.inputs import Inputs, make_inputs
from harness.oracle import expect, layer_experts
from reference.activation import ACTIVATIONS, Activation
from reference.bounds import (
    MiddleError,
    accumulation_variance,
    finalize_variance,
    independent_errors,
    middle_error,
    rounding_variance,
    row_variance,
)
from reference.experts import ExpertPass, ExpertWeights, forward
from reference.grid import FLOATS
from reference.moe import moe
from reference.rounding import Rounding

MOST_SIGMAS = 6.6
FULL = Rounding(gate_up="bf16", activated="bf16", middle="bf16", row="bf16", weighted="bf16", partial="bf16", out="bf16")
ONCE = [  # no value passes two rounding points without arithmetic between them, so the estimate is tight
    Rounding(out="bf16"),
    Rounding(gate_up="fp16", out="fp16"),
    Rounding(gate_up="bf16", row="bf16", out="bf16"),
    Rounding(activated="bf16"),
    Rounding(middle="bf16", out="bf16"),
    Rounding(middle="e4m3", out="bf16"),
    Rounding(weighted="bf16"),
    Rounding(partial="bf16"),
    Rounding(routing_weight="bf16"),
    Rounding(gate_up="bf16"),
]


def declared(rounding: Rounding) -> str:
    return "-".join(f"{k}={v}" for k, v in vars(rounding).items() if v)


@cache
def inputs_of(activation: str) -> Inputs:
    """Real fill; the logits are drawn anew, since those of the fill make four distinct sets of weights only."""
    made = make_inputs(Case.parse(f"moe.nvfp4.t128.h128.i128.e8.k2.renormalize.{activation}.standard.real.s1"))
    return replace(made, logits=torch.randn(128, 8, generator=torch.Generator().manual_seed(2)))


def z_scores(activation: str, rounding: Rounding) -> Tensor:
    """(a kernel that rounds as declared - the ideal value) / predicted sigma."""
    inputs = inputs_of(activation)
    expected = expect(inputs.case, inputs, rounding)
    rounded = moe(inputs.x, inputs.routing, layer_experts(inputs), rounding)
    return (rounded - expected.value) / expected.sigma


@pytest.mark.parametrize("rounding", ONCE, ids=declared)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_predicted_variance_is_the_measured_one(activation: str, rounding: Rounding) -> None:
    """A factor of two in one term hides in a tolerance of 6 sigma; the mean of z**2 shows it."""
    z = z_scores(activation, rounding)
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.1)
    assert float(z.abs().max()) < MOST_SIGMAS


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_repeated_roundings_are_counted_once(activation: str) -> None:
    """relu, identity and a saturated gelu pass gate_up's grid values on: rounding them again is free. So is rounding the
    first partial sum."""
    z = z_scores(activation, FULL)
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.06)
    assert float(z.abs().max()) < MOST_SIGMAS


def finalized(rounding: Rounding, weight: float, terms: int = 1) -> float:
    """Variance of the output for `terms` exact rows of 3.0, each weighted by `weight`."""
    rows = torch.full((1, terms, 1), 3.0, dtype=torch.float64)
    weights = torch.full((1, terms), weight, dtype=torch.float64)
    return float(finalize_variance(rows, torch.zeros_like(rows), weights, rounding))


BF16_ROW = Rounding(row="bf16", weighted="bf16", partial="bf16", out="bf16")
ONE = (2.0**-6) ** 2 / 12  # a bf16 rounding of 2 .. 4


def test_a_row_times_a_power_of_two_is_on_its_grid_still() -> None:
    assert finalized(BF16_ROW, 1.0) < 1e-9
    assert finalized(replace(BF16_ROW, row=None), 1.0) == pytest.approx(ONE)
    assert finalized(BF16_ROW, 0.8) == pytest.approx(ONE, rel=1e-6)  # weighted; partial and out find it on the grid
    assert finalized(replace(BF16_ROW, weighted=None), 0.8) == pytest.approx(ONE, rel=1e-6)
    assert finalized(replace(BF16_ROW, partial="e4m3", out="e4m3"), 1.0) == pytest.approx(0.25**2 / 12, rel=1e-6)


def test_two_rows_are_a_sum_whatever_their_weights() -> None:
    assert finalized(BF16_ROW, 0.5, terms=2) == pytest.approx(1.5 * ONE, rel=1e-6)  # every second sum of two is a tie


def test_the_error_of_a_rounded_routing_weight_is_known() -> None:
    assert finalized(Rounding(routing_weight="bf16"), 0.5) < 1e-9
    assert finalized(Rounding(routing_weight="bf16"), 1 / 3) == pytest.approx((3 * (1 / 3 - 0.333984375)) ** 2, rel=1e-6)


def test_a_gate_that_comes_back_unchanged_costs_what_the_activation_did() -> None:
    """bf16 spacing 2**-6: gelu(3.5) = 3.4992 is rounded back to 3.5, gelu(2.5) = 2.48448 to 159 * 2**-6."""
    identity = torch.eye(1, dtype=torch.float64)
    weights, gelu = ExpertWeights(identity, None, identity), ACTIVATIONS["gelu"]
    rounding = Rounding(gate_up="bf16", middle="bf16")

    def variance(gate: float) -> float:
        return float(middle_error(forward(gate * identity, weights, gelu), weights, gelu, rounding).variance)

    slope = {3.5: 1.00282, 2.5: 1.03761}  # d gelu: Phi(g) + g phi(g)
    assert variance(3.5) == pytest.approx(slope[3.5] ** 2 * ONE + (3.5 * 2.32629e-4) ** 2, rel=1e-3)
    assert variance(2.5) == pytest.approx(slope[2.5] ** 2 * ONE + (2.5 * 0.99379033 - 159 * 2.0**-6) ** 2, rel=1e-3)


@pytest.mark.parametrize(("share", "error"), [(0.45, 0.45), (0.55, 0.45), (1.0, 0.0)])
def test_what_rounding_an_activated_gate_of_the_grid_changes_is_known(share: float, error: float) -> None:
    identity = torch.eye(1, dtype=torch.float64)
    shifted = Activation("shifted", False, False, lambda g: g - share * 2.0**-6, lambda u: u)
    weights, rounding = ExpertWeights(identity, None, identity), Rounding(gate_up="bf16", middle="bf16")
    variance = middle_error(forward(3 * identity, weights, shifted), weights, shifted, rounding).variance
    assert variance.item() == pytest.approx(ONE + (error * 2.0**-6) ** 2, rel=1e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_an_activation_of_few_gates_errs_by_their_errors(activation: str) -> None:
    """bf16 gates of deviation 1: of silu the middle's own errors are 10 % more than uniform ones."""
    function, gates = ACTIVATIONS[activation], torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0)).double()
    identity, rounding = torch.eye(1, dtype=torch.float64), Rounding(gate_up="bf16", middle="bf16")
    weights = ExpertWeights(identity, None, identity)
    done, rounded = forward(gates, weights, function), forward(gates, weights, function, rounding)
    measured = (rounded.middle - done.middle).square().sum()
    predicted = middle_error(done, weights, function, rounding).variance.sum()
    assert float(measured / predicted) == pytest.approx(1, abs=0.02)


def test_variance_of_a_rounding_is_a_twelfth_of_the_squared_spacing() -> None:
    value = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    wanted = torch.tensor([2.0**-7, 2.0**-6, 2.0**-133], dtype=torch.float64).square() / 12
    assert torch.equal(rounding_variance(Rounding(out="bf16"), "out", value), wanted)
    assert rounding_variance(Rounding(), "out", value).tolist() == [0, 0, 0]


def test_sequential_fp32_sums_have_the_predicted_variance() -> None:
    """Each product exact, each sum rounded to fp32. bf16 factors would not do: most of their sums need no rounding."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(rows, 512, generator=generator).double() for rows in (128, 64))
    total = torch.zeros(128, 64, dtype=torch.float64)
    for k in range(512):
        total = (total + a[:, k, None] * b[None, :, k]).float().double()
    ratio = (total - a @ b.T).square() / accumulation_variance(a, b, a @ b.T)
    largest = ratio[total.abs() > total.abs().quantile(0.9)]
    assert 0.85 < float(ratio.mean()) < 1.1
    assert 0.85 < float(largest.mean()) < 1.1


def test_finalize_adds_one_fp32_rounding_a_slot() -> None:
    rows = torch.ones(1, 2, 1, dtype=torch.float64)
    variance = finalize_variance(rows, torch.zeros_like(rows), torch.ones(1, 2, dtype=torch.float64), Rounding())
    assert variance.item() == pytest.approx((2.0**-46 + 2.0**-44) / 12, rel=1e-12, abs=0)


def test_partial_sums_are_rounded_at_their_own_size() -> None:
    """0.75 * 3 = 2.25, then 2.25 - 0.5 = 1.75: spacings 2**-6 and 2**-7, not the 2**-8 of the second product."""
    rows = torch.tensor([[[3.0], [-2.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    variance = finalize_variance(rows, torch.zeros_like(rows), weights, Rounding(partial="bf16"))
    assert variance.item() == pytest.approx((2.0**-12 + 2.0**-14) / 12, rel=1e-6, abs=0)


def test_the_sum_of_two_values_of_a_grid_errs_by_multiples_of_the_finer_spacing() -> None:
    """An even spread over the coarser spacing is 18 % short: a tie is half of the cases where the exponents are equal."""
    bf16 = FLOATS["bf16"]
    rows = bf16.round(torch.randn(100_000, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rounding, ones = Rounding(row="bf16", weighted="bf16", partial="bf16"), torch.ones(100_000, 2, dtype=torch.float64)
    total = rows.sum(1)
    measured = (bf16.round(total) - total).square().mean()
    assert float(finalize_variance(rows, torch.zeros_like(rows), ones, rounding).mean() / measured) == pytest.approx(
        1, abs=0.02
    )


def test_the_output_of_unweighted_rows_errs_by_multiples_of_the_finest_spacing() -> None:
    """Weights on the input: rows that are bf16 already are summed in fp32 and rounded once. Other weights leave the grid."""
    bf16 = FLOATS["bf16"]
    rows = bf16.round(torch.randn(100_000, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for weight, rounding in ((1.0, Rounding(row="bf16", out="bf16")), (0.7, Rounding(weighted="bf16", out="bf16"))):
        weighted = bf16.round(rows * weight)
        total, weights = weighted.sum(1), torch.full((100_000, 3), weight, dtype=torch.float64)
        measured = (bf16.round(total) - total).square().mean()
        less = replace(rounding, out=None)
        predicted = [finalize_variance(rows, torch.zeros_like(rows), weights, r).mean() for r in (rounding, less)]
        assert float((predicted[0] - predicted[1]) / measured) == pytest.approx(1, abs=0.02)
    free = finalize_variance(rows, torch.zeros_like(rows), weights, Rounding(row="bf16", out="bf16")).mean()
    even = finalize_variance(rows, torch.zeros_like(rows), weights, Rounding(out="bf16")).mean()
    assert float(free) == float(even)


def test_variance_without_declared_roundings_is_that_of_fp32() -> None:
    """A 1 x 1 expert by hand: gate 6, row 30, each sum with K**2 / 2 of a rounding, exp good to 2 ulp."""
    x, gate, down = (torch.tensor([[v]], dtype=torch.float64) for v in (3.0, 2.0, 5.0))
    weights, identity = ExpertWeights(gate, None, down), ACTIVATIONS["identity"]
    rounding = 2.0**-46 * 3 / (8 * math.log(2)) / 12 / 2
    wanted = 25 * (36 * rounding + 36 * 2.0**-44) + 900 * rounding
    done = forward(x, weights, identity)
    variance = row_variance(done, weights, middle_error(done, weights, identity, Rounding()), Rounding())
    assert variance.item() == pytest.approx(wanted, rel=1e-3, abs=0)


def test_row_variances_are_weighted_by_the_squared_routing_weight() -> None:
    rows = torch.zeros(1, 2, 1, dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    variance = finalize_variance(rows, torch.tensor([[[4.0], [16.0]]], dtype=torch.float64), weights, Rounding())
    assert variance.item() == pytest.approx(2.0)


def independent(variances: Tensor, weights: list[float], hidden: int) -> float:
    """variances [tokens, top_k, inter], every token with the same weights."""
    moments = torch.stack((variances.sum(-1), variances.square().sum(-1)), dim=-1)
    every = torch.tensor([weights], dtype=torch.float64).expand(len(variances), -1)
    return float(independent_errors(moments, every, hidden).sum())


def test_few_neurons_mean_few_independent_errors() -> None:
    """2880 columns that mix 32 neurons hold 32 errors: a limit made for 2880 raised a false alarm on a right kernel."""
    assert independent(torch.ones(5, 1, 32).double(), [1], 2880) == pytest.approx(5 / (1 / 32 + 1 / 2880))
    lonely = torch.zeros(1, 1, 32, dtype=torch.float64)
    lonely[0, 0, 3] = 1
    assert independent(lonely, [1], 2880) == pytest.approx(1, rel=1e-3)
    assert independent(torch.zeros(1, 1, 32).double(), [1], 2880) == pytest.approx(2880)


def test_many_experts_do_not_make_more_errors_than_there_are_outputs() -> None:
    """8 outputs of ten experts are 8 numbers: a limit made for 80 raised a false alarm on a right kernel."""
    assert independent(torch.ones(1, 10, 256).double(), [0.1] * 10, 8) == pytest.approx(1 / (1 / 2560 + 1 / 8))
    assert independent(torch.ones(1, 2, 256).double(), [1.0, 0.0], 512) == pytest.approx(1 / (1 / 256 + 1 / 512))


def known_variance(error: Tensor, down: Tensor) -> Tensor:
    """Variance of rows [rows, hidden] whose middle errs by `error` [rows, inter], nothing else."""
    none = torch.zeros_like(error)
    done = ExpertPass(none, none, None, none, torch.zeros(len(error), len(down), dtype=torch.float64))
    return row_variance(done, ExpertWeights(down, None, down), MiddleError(none, error), Rounding())


@pytest.mark.parametrize(("inter", "wanted"), [(16, 3.2), (40, 8.0), (17, 3.4), (5, 1.0), (1, 0.2)])
def test_errors_of_one_sign_meet_weights_of_one_mean(inter: int, wanted: float) -> None:
    """n errors of 0.1 through weights of 2 make an error of 0.2 n, not of 0.2 sqrt(n), whole blocks or not."""
    error, down = torch.full((1, inter), 0.1, dtype=torch.float64), torch.full((3, inter), 2.0, dtype=torch.float64)
    assert known_variance(error, down).sqrt().tolist() == [pytest.approx([wanted] * 3, rel=1e-5)]


@pytest.mark.parametrize(("bias", "zero_point"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.5), (1.0, 1.5), (-0.5, 4.0)])
def test_on_average_over_the_places_of_a_blocks_weights_it_is_the_square_of_the_sum(bias: float, zero_point: float) -> None:
    """5000 orders of the weights within their blocks: sum e**2 d**2 is 0.07 to 2.7 of it where one has a mean."""
    generator = torch.Generator().manual_seed(5)
    error = torch.randn(1, 48, generator=generator).double() + bias
    blocks = torch.randn(1, 3, 16, generator=generator).double() + zero_point
    order = torch.rand(5000, 3, 16, generator=generator).argsort(-1)
    down = blocks.expand(5000, -1, -1).gather(2, order).flatten(1)
    square = (error @ down.T).square()
    assert float(known_variance(error, down).mean()) == pytest.approx(float(square.mean()), rel=0.08)


QUANTISED = {
    "middle fitted to rounded values": Rounding(middle="bf16>nvfp4", row="bf16", out="bf16"),
    "before the activation and after it": Rounding(gate_up="fp8_group", middle="fp8_group", row="bf16", out="bf16"),
}


@pytest.mark.parametrize("rounding", QUANTISED.values(), ids=list(QUANTISED))
@pytest.mark.parametrize("activation", ["swiglu", "silu", "relu", "identity", "relu2"])
def test_what_formats_do_to_the_middle_is_known(activation: str, rounding: Rounding) -> None:
    """Values that are on the grid already were counted as quantised twice: the mean of z**2 of identity was 0.5."""
    z = z_scores(activation, rounding)
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.06)
    assert float(z.abs().max()) < MOST_SIGMAS
