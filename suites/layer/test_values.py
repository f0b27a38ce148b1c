"""The layer's output against the reference: bitwise in the exact fill, within the derived bound in the real one."""

from harness.known import Outcome, outcome
from harness.report.text import explain
from harness.verdict import Verdict

OPS = ("moe",)


def test_layer_agrees_with_the_reference(verdict: Verdict) -> None:
    """A percentage rule would pass a lost expert: dropping one of 256 touches 3.1 % of the rows."""
    assert outcome(verdict) is Outcome.GREEN, explain(verdict)
