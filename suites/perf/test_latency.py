"""How long the cases that people serve take: `pytest suites/perf --latency`. No threshold judges a time."""

from collections.abc import Callable

from harness.latency.record import Timing

OPS = ("moe", "quantize", "activate", "route")


def test_a_correct_kernel_has_a_time(timing: Timing, record_property: Callable[[str, object], None]) -> None:
    """A wall clock around one call would time the compiler, the caches and the neighbours."""
    assert not timing.problem
    assert 0 < timing.low_us <= timing.median_us <= timing.high_us
    record_property("median_us", timing.median_us)
