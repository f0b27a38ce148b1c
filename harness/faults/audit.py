"""What would a rule have let through? Wrong layers of many cases, judged by the rules in use and by moecheck's own lanes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from harness.case import Case
from harness.compare import compare
from harness.faults.layer import Layer, layer_of
from harness.faults.rules import RULES, Rule, verdicts
from harness.faults.wrong_layers import wrong_outputs
from harness.inputs import make_inputs
from harness.oracle import Expected, expect
from reference.rounding import Rounding

RIGHT, YOURS, MOECHECK = "right", "yours", "moecheck"
GUARD = ("zeros", "stale", "gate_up_swap", "dropped_slot")  # the impostors of checks.untrusted


@dataclass(frozen=True)
class Subject:
    """One case as the audit sees it: `value` float64 is what the rules compare with, `expected` what moecheck does."""

    name: str
    layer: Layer
    expected: Expected
    value: Tensor


@dataclass(frozen=True)
class Tally:
    """`accepted` of the `judged` cases in which this wrong layer differs from the right one."""

    accepted: int
    judged: int

    @property
    def share(self) -> float:
        """accepted / judged, 0 when nothing was judged."""
        return self.accepted / self.judged if self.judged else 0.0


@dataclass
class Audit:
    """`seen[case][layer][judge]`: accepted or not. layer: a wrong layer's name or "right"; judge: a rule's name, "yours" or
    "moecheck"."""

    judges: tuple[str, ...]
    seen: dict[str, dict[str, dict[str, bool]]] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """Cases judged so far."""
        return len(self.seen)

    @property
    def layers(self) -> list[str]:
        """The wrong layers that differed from the right one somewhere, in the order they were made."""
        return list(dict.fromkeys(name for case in self.seen.values() for name in case if name != RIGHT))

    def tally(self, layer: str, judge: str) -> Tally:
        """How often `judge` accepts `layer`; of RIGHT, the complement is its false alarms."""
        said = [case[layer][judge] for case in self.seen.values() if layer in case]
        return Tally(sum(said), len(said))

    def overall(self, judge: str) -> Tally:
        """Over all wrong layers of all cases."""
        said = [case[name][judge] for case in self.seen.values() for name in case if name != RIGHT]
        return Tally(sum(said), len(said))

    def untrusted(self, judge: str) -> list[str]:
        """The cases moecheck's trust guard would refuse if `judge` decided: an impostor passes."""
        return [name for name, case in self.seen.items() if any(case[g][judge] for g in GUARD if g in case)]

    def worst(self, judge: str) -> str | None:
        """The wrong layer that `judge` accepts in the largest share of its cases; None if it accepts none anywhere."""
        shares = {name: self.tally(name, judge).share for name in self.layers}
        name = max(shares, key=lambda n: shares[n], default=None)
        return name if name is not None and shares[name] else None


def audit(
    subjects: Iterable[Subject], yours: Rule, wrong: Collection[str] = (), tell: Callable[[int], None] = lambda done: None
) -> Audit:
    """Judge the right and every wrong layer (or the named ones) of each subject by `yours`, every rule in use and moecheck.
    `tell` hears how many cases are done."""
    result = Audit((YOURS, MOECHECK, *RULES))
    for subject in subjects:
        outputs = {RIGHT: subject.layer.right, **wrong_outputs(subject.layer, wrong)}
        result.seen[subject.name] = {name: _judge(subject, got, yours) for name, got in outputs.items()}
        tell(result.cases)
    return result


def _judge(subject: Subject, got: Tensor, yours: Rule) -> dict[str, bool]:
    baseline = subject.layer.eager
    mine = verdicts(got, subject.value, baseline, [yours])[yours.name]
    in_use = verdicts(got, subject.value, baseline)
    return {YOURS: mine, MOECHECK: compare(subject.expected, got).agrees, **in_use}


def subject_of(case: Case, rounding: Rounding) -> Subject:
    """A planned case (tokens > 0); the rules compare with the same float64 value as moecheck."""
    inputs = make_inputs(case)
    expected = expect(case, inputs, rounding)
    return Subject(case.id, layer_of(case, rounding, inputs), expected, expected.value)
