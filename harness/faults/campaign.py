"""Runs a tier's plan against planted faults and against the clean subjects, in worker processes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import TypeVar

from harness import config, plan, pooled
from harness.backends import load_file
from harness.backends.base import Backend, Device
from harness.case import Case
from harness.errors import PluginError, SelectionError
from harness.faults.catalogue import FAULTS
from harness.faults.fault import Fault
from harness.faults.layer import MANY_WEIGHTS
from harness.faults.score import Score, Until, score
from harness.pooled import Pool
from harness.select import Item
from harness.verdict import Verdict
from harness.worker.supervisor import Supervisor

T = TypeVar("T")
R = TypeVar("R")
PLUGIN = "harness.faults.catalogue"
HANG_S = 20.0  # what a fault that hangs costs, three times; any other may take what the tier gives: a busy machine is no kill
SHUFFLE = 0  # seed of the order of a plan: neighbours in the list are alike, and a fault should meet different cases soon


@dataclass(frozen=True)
class CleanRun:
    """A clean subject on its plan: its verdicts; an alarm is one that failed, or a pool of them that did."""

    subject: str
    judged: tuple[Verdict, ...]

    @property
    def alarms(self) -> tuple[Verdict, ...]:
        """The verdicts that failed."""
        return tuple(v for v in self.judged if v.status.failed)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pool of verdicts that failed."""
        return tuple(pooled.alarms(self.judged))

    def refused_by(self, rule: str) -> int:
        """How many of its outputs an acceptance rule in use would have rejected."""
        return sum(not v.rules.get(rule, True) for v in self.judged)


@dataclass(frozen=True)
class Campaign:
    """What to run: the platform's device, the tier, plugins with more faults, parallel workers, and when a fault is done."""

    platform: str
    device: Device
    tier: str
    plugins: tuple[str, ...] = ()
    jobs: int = 1
    until: Until = Until.ENOUGH

    def faults(self) -> tuple[Fault, ...]:
        """Ours and the plugins', those that this device can run."""
        found = list(FAULTS)
        for path in self.plugins:
            more = getattr(load_file(path), "FAULTS", ())
            if not isinstance(more, tuple) or not all(isinstance(f, Fault) for f in more):
                raise PluginError(f"plugin {path}: wanted FAULTS = (Fault(...), ...), got {more!r:.80}")
            found += more
        return tuple(f for f in found if not f.backend.archs or self.device.arch in f.backend.archs)

    def items(self, clean: Backend) -> tuple[Item, ...]:
        """The clean subject's plan without the served shapes, which cost seconds each and add no combination; shuffled."""
        request = plan.Request(self.platform, self.tier)
        items = [i for i in plan.make(request, {clean.name: clean}, self.device).items if _weights(i) <= MANY_WEIGHTS]
        random.Random(SHUFFLE).shuffle(items)
        return tuple(items)

    def clean_runs(self, faults: Iterable[Fault]) -> Iterator[CleanRun]:
        """Every clean subject of `faults` on its whole plan."""
        subjects = {fault.clean.name: fault.clean for fault in faults}

        def one(worker: Supervisor, clean: Backend) -> CleanRun:
            verdicts = [worker.judge(Case.parse(item.case_id), clean.name) for item in self.items(clean)]
            return CleanRun(clean.name, tuple(v for v in verdicts if not v.status.skipped))

        yield from self._spread(one, list(subjects.values()))

    def scores(self, faults: Iterable[Fault]) -> Iterator[Score]:
        """The score of every fault, as they come."""
        plans: dict[str, tuple[Item, ...]] = {}
        for fault in faults:
            if fault.clean.name not in plans:
                plans[fault.clean.name] = self.items(fault.clean)

        def one(worker: Supervisor, fault: Fault) -> Score:
            worker.limit_s = HANG_S if {"death", "hung"} & set(fault.expect) else config.tier(self.tier).limit_s

            def judge(case_id: str, subject: str) -> Verdict:
                return worker.judge(Case.parse(case_id), subject)

            return score(fault, plans[fault.clean.name], judge, self.until)

        yield from self._spread(one, list(faults))

    def _spread(self, one: Callable[[Supervisor, T], R], work: list[T]) -> Iterator[R]:
        """one(worker, item) for every item, on `jobs` workers, in the order of `work`."""
        if not work:
            raise SelectionError("no fault is planted in a subject that runs on this device; see moecheck faults --list")
        free: Queue[Supervisor] = Queue()

        def task(item: T) -> R:
            worker = free.get()
            try:
                return one(worker, item)
            finally:
                free.put(worker)

        with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, ThreadPoolExecutor(self.jobs) as pool:
            with _workers(self, Path(logs)) as workers:
                for worker in workers:
                    free.put(worker)
                yield from pool.map(task, work)


def _weights(item: Item) -> int:
    shape = Case.parse(item.case_id).shape
    return shape.experts * shape.inter * shape.hidden


@contextmanager
def _workers(campaign: Campaign, logs: Path) -> Iterator[list[Supervisor]]:
    found: list[Supervisor] = []
    try:
        for number in range(campaign.jobs):
            folder = logs / str(number)
            folder.mkdir()
            tier = config.tier(campaign.tier)
            found.append(Supervisor(campaign.device, (PLUGIN, *campaign.plugins), folder, tier.limit_s))
            found[-1].checks, found[-1].repeats = tier.checks, tier.repeats
            found[-1].rules = True
        yield found
    finally:
        for worker in found:
            worker.close()
