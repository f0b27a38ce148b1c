"""`make soak`: many cases, many deaths: does the run end with one right verdict per case and nothing left behind?

python -m harness.faults.storm --cases 1000 --faults 300
"""

from __future__ import annotations

import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import journal
from harness.case import Case
from harness.faults.deadly import CLEAN, KINDS, Deadly
from harness.plan import Plan, Request
from harness.select import Item
from harness.session import Session
from harness.verdict import Status, Verdict
from harness.worker.vitals import descriptors

PLUGIN = "harness.faults.deadly"
CASE = "moe.bf16.t{tokens}.h64.i32.e{experts}.k2.renormalize.swiglu.standard.{fill}.s{seed}"
LIMIT_S = 5.0  # seconds a case may take; a clean one takes 0.02 on an idle core
REPLAY = (1, 4.0)  # as in tier smoke: once more, alone; less than the limit, so that a hang is not run again
CRASHES, CLEAN_CASES, FACTOR = 100, 1000, 2.0  # so many crashes among so many cases may cost twice the run without them
SPARE = 4  # descriptors of one more child: the spare, or one on its way out
BY_KIND = {kind.name: kind for kind in KINDS}
SEGFAULT = KINDS[0]
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Storm:
    """What came of one. wrong: a line for each verdict that is not what its kernel deserves; left: processes that outlived
    the run; zombies: processes that ended and nobody waited for; descriptors: open ones more than after the first case."""

    planned: int
    seconds: float
    recorded: Counter[Item]
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: set[int] = field(default_factory=set)
    zombies: set[int] = field(default_factory=set)
    descriptors: int = 0

    @property
    def problems(self) -> list[str]:
        """Everything that should not be."""
        found = list(self.wrong)
        if len(self.recorded) != self.planned or set(self.recorded.values()) != {1}:
            found.append(f"{self.recorded.total()} verdicts on {len(self.recorded)} of {self.planned} cases")
        counted = (("processes outlived the run", self.left), ("zombies", self.zombies))
        found += [f"{len(pids)} {what}: {sorted(pids)}" for what, pids in counted if pids]
        return found + ([f"{self.descriptors} more descriptors are open"] if self.descriptors > 0 else [])


def plan(cases: int, faults: int, seed: int, kinds: Sequence[Deadly] = KINDS, one_each: bool = True) -> Plan:
    """`cases` small layers, `faults` of them on deadly kernels at random places; one of each kind, the rest of `kinds`."""
    rng = random.Random(seed)
    chosen = [*KINDS, *rng.choices(kinds, k=faults)][:faults] if one_each else rng.choices(kinds, k=faults)
    subjects = [kind.name for kind in chosen] + [CLEAN.name] * (cases - faults)
    rng.shuffle(subjects)
    items = []
    for number, subject in enumerate(subjects):
        fill = "exact" if number % 3 == 0 else "real"
        case = Case.parse(CASE.format(tokens=1 + number % 9, experts=4 + number % 3, fill=fill, seed=number))
        items.append(Item(case.id, subject))
    return Plan(Request("cpu", "smoke", plugins=(PLUGIN,), limit_s=LIMIT_S), LIMIT_S, tuple(items), 0, replay=REPLAY)


def run(the_plan: Plan, folder: Path) -> Storm:
    """Judge the plan, and look at what it left."""
    started, open_before = time.perf_counter(), 0
    session = Session(the_plan, folder)
    try:
        for number, item in enumerate(the_plan.items):
            session.judge(item)
            open_before = open_before if number else descriptors()
        grown, zombies = descriptors() - open_before, set(_zombies())
    finally:
        session.close()
    verdicts = journal.read(folder)
    storm = Storm(len(the_plan.items), time.perf_counter() - started, Counter(Item(v.case_id, v.subject) for v in verdicts))
    storm.statuses = Counter(str(v.status) for v in verdicts)
    storm.wrong = [line for v in verdicts if (line := _wrong(v))]
    storm.left, storm.zombies = set(holders(folder)), zombies | set(_zombies())
    storm.descriptors = max(0, grown - SPARE)
    return storm


def _wrong(verdict: Verdict) -> str:
    kind = BY_KIND.get(verdict.subject)
    wanted, text = (Status.PASSED, "") if kind is None else (kind.status, kind.text)
    if verdict.status is wanted and re.search(text, verdict.reason):
        return ""
    return f"{verdict.subject} on {verdict.case_id}: {verdict.status} {verdict.reason!r:.300}, wanted {wanted} {text!r}"


def holders(folder: Path) -> Iterator[int]:
    """Processes with a file below `folder` open: a worker's output, and that of whatever it started, is its log."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{folder}/") and int(link.parts[2]) != os.getpid():
                yield int(link.parts[2])


def _zombies() -> Iterator[int]:
    """Dead children of ours, and of the fork server, that nobody waited for."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            found[int(path.parent.name)] = (state, int(parent))
    family = {os.getpid()} | {pid for pid, (_, parent) in found.items() if parent == os.getpid()}
    yield from (pid for pid, (state, parent) in found.items() if state == "Z" and parent in family)


def command(
    cases: Annotated[int, typer.Option(help="Cases of the storm.")] = 1000,
    faults: Annotated[int, typer.Option(help="Deadly ones among them.")] = 300,
    seed: Annotated[int, typer.Option(help="Where they strike.")] = 0,
) -> None:
    """A storm of deaths, then what crashes cost; the last line is the count, the exit status the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        storm = run(plan(cases, faults, seed), Path(folder))
    for line in storm.problems:
        console.print(line, markup=False)
    seconds = []
    for crashes in (0, CRASHES):
        with tempfile.TemporaryDirectory() as folder:
            once = run(plan(CLEAN_CASES, crashes, seed, [SEGFAULT], one_each=False), Path(folder))
        seconds.append(once.seconds)
        storm.wrong += once.problems
    ratio = seconds[1] / seconds[0]
    console.print(
        f"{CRASHES} crashes among {CLEAN_CASES} cases: {seconds[1]:.1f} s, without {seconds[0]:.1f} s, ratio {ratio:.2f} "
        f"(limit {FACTOR})"
    )
    counts = ", ".join(f"{status} {n}" for status, n in sorted(storm.statuses.items()))
    bad = len(storm.problems) + (ratio > FACTOR)
    console.print(
        f"storm: {storm.planned} cases, {faults} faults, {storm.seconds:.0f} s: {counts}; {bad} problems", markup=False
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(command)
