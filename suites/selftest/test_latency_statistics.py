"""Times into statements: calls that are right, at the confidence that they name, on noise that is not kind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from harness.latency.power import pool, simulated
from harness.latency.statistics import (
    Call,
    Design,
    Round,
    compared,
    decided,
    outermost,
    process_values,
    student,
    summary,
    typical,
)

DESIGN = Design()
QUIET = 0.004  # log time: what processes of one release may differ by


def rounds(count: int, slowdown: float, noise: Callable[[], float]) -> list[Round]:
    shift = math.log1p(slowdown)
    return [((noise(), noise()), (noise() + shift, noise() + shift)) for _ in range(count)]


def gaussian(sigma: float, seed: int) -> Callable[[], float]:
    chance = random.Random(seed)
    return lambda: chance.gauss(0, sigma)


def disturbed(seed: int) -> Callable[[], float]:
    """One process in twenty is ten times as far off: a neighbour on its core, a page of memory far away."""
    chance = random.Random(seed)
    return lambda: chance.gauss(0, QUIET * (10 if chance.random() < 0.05 else 1))


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [(0.975, 2, 4.303), (0.975, 10, 2.228), (0.95, 4, 2.132), (0.9995, 4, 8.610), (0.9995, 20, 3.850), (0.995, 30, 2.750)],
)
def test_students_quantiles_are_those_of_the_tables(probability: float, degrees: int, quantile: float) -> None:
    assert student(probability, degrees) == pytest.approx(quantile, abs=6e-4)


def test_twenty_comparisons_of_one_release_call_no_difference() -> None:
    found = simulated(pool(rounds(400, 0.0, gaussian(QUIET, 1))), 0.0, DESIGN, 4000)
    assert found.all_of(Call.SAME, 20) > 0.99


def test_disturbed_processes_make_it_unsure_and_not_wrong() -> None:
    """A fixed threshold of a percent would call a difference in every second of these."""
    noise = pool(rounds(400, 0.0, disturbed(2)))
    found = simulated(noise, 0.0, DESIGN, 4000)
    assert found.share(Call.SLOWER) + found.share(Call.FASTER) <= 5e-4
    assert simulated(noise, 0.05, DESIGN, 1000).share(Call.FASTER) == 0


def test_twenty_planted_slowdowns_of_five_percent_are_called() -> None:
    found = simulated(pool(rounds(400, 0.0, gaussian(QUIET, 3))), 0.05, DESIGN, 4000)
    assert found.all_of(Call.SLOWER, 20) > 0.99
    assert found.share(Call.SAME) == 0


def test_a_slowdown_below_the_least_is_not_called_however_sure() -> None:
    assert compared(rounds(100, 0.005, gaussian(1e-4, 4)), DESIGN).call is Call.SAME
    assert compared(rounds(100, 0.02, gaussian(1e-4, 4)), DESIGN).call is Call.SLOWER
    assert compared(rounds(100, -0.02, gaussian(1e-4, 4)), DESIGN).call is Call.FASTER


def test_the_interval_holds_the_truth_as_often_as_it_says_although_it_looks_again() -> None:
    """Stopping at the first clear answer of eight looks, each at 99.95 %, would miss it up to eight times as often."""
    missed = 0
    for seed in range(3000):
        noise = gaussian(0.012, seed)
        sample = rounds(DESIGN.most, 0.02, noise)
        found = next(f for n in range(1, DESIGN.most + 1) if (f := decided(sample[:n], DESIGN)) is not None)
        missed += not found.low <= 1.02 <= found.high
    assert missed <= 3000 * 0.0005 + 4 * math.sqrt(1.5)  # what is due, and four standard deviations


def test_too_much_noise_is_told_as_such() -> None:
    found = compared(rounds(DESIGN.most, 0.05, gaussian(0.2, 5)), DESIGN)
    assert found.call is Call.UNCLEAR
    assert found.text.startswith("cannot tell: B - A is between -")
    assert decided(rounds(DESIGN.most - 1, 0.05, gaussian(0.2, 5)), DESIGN) is None
    assert decided(rounds(DESIGN.first - 1, 0.5, gaussian(1e-6, 5)), DESIGN) is None


def test_a_sentence_is_a_ratio_with_its_confidence_and_the_noise_floor() -> None:
    sides = ((0.0, 0.002), (math.log(1.12), math.log(1.12) + 0.002))
    assert (
        compared([sides] * 4, DESIGN).text
        == "B is slower than A by 12.0 % +- 0.7 % (99.95 % confidence; noise floor 0.14 %; 4 rounds)"
    )
    again = ((0.0, 0.002), (0.0, 0.002))
    assert compared([again] * 4, DESIGN).text.startswith("no difference: B - A is +0.0 % +- 0.")


def test_a_drift_and_a_disturbed_block_do_not_count() -> None:
    drift = [0.3 * block for block in range(9)]
    slots = [[own + d for d in drift] for own in (1.0, 1.0, 1.05, 1.05)]
    slots[0][4] += 5.0
    a1, a2, b1, b2 = process_values(slots)
    assert a1 == pytest.approx(a2) == pytest.approx(b1 - 0.05) == pytest.approx(b2 - 0.05)


def test_inputs_of_another_cost_are_not_mixed() -> None:
    """Two inputs of 1 and 2 ms: a median over all calls is one or the other, by chance."""
    assert typical([1.0, 2.0, 1.0, 2.0, 9.0, 2.0], 2) == pytest.approx((math.log(1.0) + math.log(2.0)) / 2)
    assert typical([1.5, 2.0, 1.0, 2.0, 9.0, 2.5], 2, lowest=True) == pytest.approx(math.log(2.0) / 2)


def test_the_interval_of_a_median_is_by_order_statistics() -> None:
    assert [outermost(n, 0.99) for n in (3, 8, 20)] == [0, 0, 3]  # 2 P(Bin(20, 1/2) <= 3) = 0.0026, <= 4: 0.0118
    misses = 0
    for seed in range(1000):
        chance = random.Random(seed)
        found = summary([[chance.expovariate(1.0)] for _ in range(20)])
        misses += not found.low_us <= math.log(2) <= found.high_us
    assert misses <= 12  # of 2.6 expected


def test_a_summary_counts_all_calls() -> None:
    slots = [[float(i) for i in range(start, start + 10)] for start in range(1, 101, 10)]
    found = summary(slots)
    assert (found.calls, found.median_us, found.p05_us, found.p95_us) == (100, 50.5, 6.0, 95.0)


def test_the_interval_holds_the_median_of_unequal_slots() -> None:
    """Slots of a disturbed machine: most of the calls lie in one of the outer ones."""
    from harness.latency.statistics import summary

    seen = summary([[1.0] * 3] * 8 + [[9.0] * 99])
    assert seen.low_us <= seen.median_us <= seen.high_us
    assert seen.median_us == 9.0
