"""Repeated bare calls, and plans that spend no combination on an empty batch."""

from __future__ import annotations

import itertools
import time

from torch import Tensor

from harness import config
from harness.backends.base import CPU
from harness.case import LIMITS, Case
from harness.pipeline import Options, run
from harness.plan import platform_axes
from harness.select import plan_backend
from harness.twins.aligned import AlignedMoe
from harness.verdict import Status

CASE = Case.parse("moe.bf16.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")


class OnceInTen(AlignedMoe):
    """Every tenth call of a launch takes a row from its neighbour."""

    def run(self, out: Tensor) -> None:
        """Counts from the first call on."""
        self.count = getattr(self, "count", 0) + 1
        super().run(out)
        if self.count % 10 == 0:
            out[0] = out[1]


class OnceInTenSaysSo(OnceInTen):
    """The same, declared."""

    DETERMINISTIC = False


class Slow(AlignedMoe):
    """Takes its time."""

    calls = 0

    def run(self, out: Tensor) -> None:
        """0.1 s."""
        Slow.calls += 1
        time.sleep(0.1)
        super().run(out)


def test_a_call_in_ten_that_is_wrong_shows_in_repeated_calls_only() -> None:
    """Two calls a case agree bit for bit."""
    backend = OnceInTen.backend("sut_once_in_ten")
    assert run(CASE, backend, CPU, options=Options(0)).status is Status.PASSED
    verdict = run(CASE, backend, CPU, options=Options(0, repeats=16))
    assert verdict.status is Status.UNSTABLE
    assert verdict.findings[0].evidence["call"] == 8  # the tenth: one to judge, one with the other poison


def test_bits_are_asked_only_of_the_deterministic() -> None:
    backend = OnceInTenSaysSo.backend("sut_says_so")
    assert run(CASE, backend, CPU, options=Options(0, repeats=16)).status is Status.PASSED


def test_a_slow_kernel_is_repeated_for_no_longer_than_a_fast_one() -> None:
    assert run(CASE, Slow.backend("sut_slow"), CPU, options=Options(0, repeats=16)).status is Status.PASSED
    assert Slow.calls <= 2 + 8


def test_tiers_repeat() -> None:
    assert config.tier("ci").repeats >= 8
    assert config.tier("nightly").repeats >= 100


def test_no_pair_is_left_to_an_empty_batch() -> None:
    """A row of no tokens counts as covering INT4 with hidden 256, and tests it with nothing."""
    axes = platform_axes(config.platform("cpu"), config.tier("ci"), "")
    cases = plan_backend(axes, AlignedMoe.backend(), CPU, 2)
    names = [name for name in axes if name != "tokens"]
    for pair in itertools.combinations(names, 2):
        of = {bool(t): {tuple(c.axes[n] for n in pair) for c in cases if bool(c.shape.tokens) is t} for t in (False, True)}
        assert of[False] <= of[True], pair
    assert any(c.shape.tokens == 0 for c in cases)
    assert all(limit.refuses(c) is None for limit in LIMITS for c in cases)
