"""Two versions of a kernel in one lease: A B B A in random order, two fresh processes a side and round, until it is decided."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from harness.backends.base import Device
from harness.case import Case
from harness.errors import TimingError
from harness.latency.clocks import Clock, together
from harness.latency.statistics import Comparison, Design, Round, compared, decided, process_values, typical
from harness.latency.timer import Side, Timer
from harness.verdict import Status

BLOCKS = 6  # of a round, each every process twice: in random order and then in its reverse, so that a linear drift cancels
SLOT_S = {"cuda": 0.01, "cpu": 0.02}  # a process's turn: long against the switch of a GPU's context, short against a drift
MOST_CALLS = 64  # in a turn


@dataclass(frozen=True)
class Measured:
    """A round: `values` as statistics.Round, the raw log times [process][block] in the order a, a, b, b, and the clock."""

    values: Round
    raw: tuple[tuple[float, ...], ...]
    clock: Clock
    calls: int


@dataclass
class Contest:
    """Two sides on one case. Use `judge` once, then `run` as often as wanted."""

    case: Case
    sides: tuple[Side, Side]
    device: Device
    logs: Path
    limit_s: float = 300.0
    design: Design = field(default_factory=Design)
    blocks: int = BLOCKS
    seed: int = 0
    graph: bool = True
    environments: list[dict[str, str]] = field(default_factory=list)
    facts: list[dict[str, object]] = field(default_factory=list)

    def judge(self) -> None:
        """TimingError unless both sides pass the case: how fast a wrong kernel is says nothing."""
        for side in self.sides:
            with self._timer(side) as timer:
                verdict = timer.verdict(self.case)
            if verdict.status is not Status.PASSED:
                raise TimingError(
                    f"{side.name} is {verdict.status} on {self.case.id} ({verdict.reason[:300]}); only correct kernels are "
                    f"timed: moecheck repro {self.case.id} --backend {side.backend} says more"
                )

    def run(self, told: Callable[[Measured], None] = lambda measured: None) -> tuple[Comparison, list[Measured]]:
        """Rounds until the design is satisfied."""
        rounds: list[Measured] = []
        for measured in self._rounds():
            rounds.append(measured)
            told(measured)
            if (found := decided([r.values for r in rounds], self.design)) is not None:
                return found, rounds
        return compared([r.values for r in rounds], self.design), rounds

    def _rounds(self) -> Iterator[Measured]:
        order = random.Random(f"{self.seed}/{self.case.id}")
        self.seed += 1
        for _ in range(self.design.most):
            yield self._round(order)

    def _round(self, order: random.Random) -> Measured:
        with ExitStack() as stack:
            timers = [stack.enter_context(self._timer(side)) for side in self.sides for _ in range(2)]
            for timer in timers:
                timer.prepare(self.case, self.graph)
            self.facts = [timer.wait()["timed"] for timer in timers][::2]
            self.environments = [timer.environment for timer in timers][::2]
            _same_method(self.facts, self.sides)
            warm = [timer.ask({"latency": "warm"})["timed"]["us"] for timer in timers]
            rotations = len(warm[0])
            calls = turn(max(statistics.median(us) for us in warm), rotations, self.device)
            clocks = list[Clock]()
            raw: list[list[float]] = [[] for _ in timers]
            for _ in range(self.blocks):
                first = order.sample(range(len(timers)), len(timers))
                turns: dict[int, list[float]] = {i: [] for i in first}
                for i in (*first, *reversed(first)):
                    times, clock = timers[i].slot(calls)
                    clocks.append(clock)
                    turns[i].append(typical(times, rotations, lowest=self.device.kind == "cpu"))
                for i, (one, two) in turns.items():
                    raw[i].append((one + two) / 2)
        a1, a2, b1, b2 = process_values(raw)
        return Measured(((a1, a2), (b1, b2)), tuple(map(tuple, raw)), together(clocks), calls)

    def _timer(self, side: Side) -> Timer:
        return Timer(side, self.device, self.logs, self.limit_s)


def turn(us: float, rotations: int, device: Device) -> int:
    """Calls in a turn of a kernel that takes so many microseconds: whole rotations."""
    most = min(MOST_CALLS, SLOT_S[device.kind] * 1e6 / us)
    return rotations * max(1, round(most / rotations))


def _same_method(facts: list[dict[str, object]], sides: tuple[Side, Side]) -> None:
    """A replayed graph against a call with the host's gaps would compare the hosts."""
    a, b = (str(f["method"]) for f in facts)
    if a != b:
        raise TimingError(
            f"{sides[0].name} is timed by {a}, {sides[1].name} by {b}: they cannot be compared ({facts[0]['notes']}, "
            f"{facts[1]['notes']}); --no-graph times both by events"
        )
