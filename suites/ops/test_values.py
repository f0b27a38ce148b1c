"""Quantisers, activations and routers by themselves: bytes of codes and scales, ids, values within the derived bound."""

from harness.known import Outcome, outcome
from harness.report.text import explain
from harness.verdict import Verdict

OPS = ("quantize", "activate", "route")


def test_op_agrees_with_the_reference(verdict: Verdict) -> None:
    """A round trip within half a percent would pass a quantiser that rounds halves up, or scales of the wrong group."""
    assert outcome(verdict) is Outcome.GREEN, explain(verdict)
