"""Holds the clock: hands cases to a child, turns its death or silence into a Verdict, and replaces it from a warm spare.

Children come from a fork server that has imported torch but never initialised CUDA, so a replacement costs a fork.
A child is replaced when it dies, hangs or is not fit to go on (health.py), and after RECYCLE cases.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from harness import errors
from harness.backends.base import Device, Support
from harness.case import Case
from harness.errors import WorkerBug
from harness.select import Item
from harness.verdict import Finding, Stage, Verdict
from harness.worker import coredump, death, replay, vitals
from harness.worker.child import Setup
from harness.worker.death import Death
from harness.worker.log import tail
from harness.worker.process import GRACE_S, Child, start
from harness.worker.protocol import CorruptedReply, Message
from harness.worker.replay import Budget, Meter

START_LIMIT_S = 120.0  # a cold fork server imports torch: 3..6 s measured, more on a loaded machine
DUMP_LIMIT_S = 20.0  # for the GPU coredump of a hung child; one example took under a second
LEAVE_S = 5.0  # a child that was dismissed and does not end is killed
STARTS = 3  # children that may die before their first case
# cases a child may judge: a replacement (0.1 s on a CPU, 0.24 s on an H200, with its imports 1..5 s) stays a few percent of
# 100 cases, and a death that depends on what ran before has at most 100 suspects. The lane `soak` has no such limit.
RECYCLE = 100


class Supervisor:
    """One device, one case in flight. Use as a context manager. checks: relations asked of each case, None for all;
    repeats: bare calls at the end of each; rules: verdicts also tell what the acceptance rules in use would have said;
    budget: what replays of one death may cost; recycle: cases a child may judge, None for no limit, as in a soak."""

    checks: int | None = None
    repeats: int = 0
    rules: bool = False
    budget = Budget()
    recycle: int | None

    def __init__(
        self,
        device: Device,
        plugins: tuple[str, ...],
        log_dir: Path,
        limit_s: float,
        run_folder: Path | None = None,
        soak: bool = False,
    ) -> None:
        self.limit_s = limit_s
        self.recycle = None if soak else RECYCLE
        self.setup = Setup(device, plugins, "", "" if run_folder is None else str(run_folder), soak)
        self._logs, self._started = log_dir, 0
        self._environments: dict[str, dict[str, str]] = {}
        self._between: tuple[Finding, ...] = ()
        self._before: list[Item] = []
        self._leaving: list[Child] = []
        self._spare: Child | None = None
        self._child: Child | None = self._start()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop both children; a deaf one is killed."""
        for child in (self._child, self._spare):
            if child is not None:
                self._dismiss(child)
        self._child = self._spare = None
        for child in self._leaving:
            child.process.join(timeout=GRACE_S)
            child.kill()
        self._leaving = []
        coredump.tidy(self._logs)

    @property
    def pid(self) -> int:
        """Process id of the child that judges now."""
        return self._alive().pid

    def probe(self, subject: str) -> tuple[Support, dict[str, str]]:
        """(can the backend run on this device, the environment it would run in). A probe that dies is a refusal."""
        reply = self._ask({"probe": subject})
        if isinstance(reply, Death):
            return Support.no("library", f"its probe died: {death.how(reply)}"), {}
        self._environments[subject] = dict(reply["environment"])
        return Support(**reply["support"]), self._environments[subject]

    def judge(self, case: Case, subject: str, after: Sequence[Item] = ()) -> Verdict:
        """The verdict on one case, in a child that judged the cases `after` before; MoecheckError for a user's fault,
        WorkerBug for ours."""
        started = time.perf_counter()
        died = [item for item in after if isinstance(self._ask(self._request(item)), Death)]
        reply = self._ask(self._request(Item(case.id, subject)))
        if isinstance(reply, Death):
            verdict = self._posthumous(case, subject, reply, self._before)
        else:
            verdict = self._of(reply)
            if reply.get("retire"):
                self._dismiss_current()
        self._between += tuple(Finding("worker", f"{i.subject}:{i.case_id}, run before, died itself") for i in died)
        notes, self._between = (*self._between, *verdict.notes), ()
        seconds = round(time.perf_counter() - started, 4)
        return replace(verdict, seconds=seconds, plugins=self.setup.plugins, notes=notes)

    def collect(self, case: Case, subject: str, folder: Path) -> Message:
        """What `harness.bundle.collect` finds, in a child that has judged nothing: a kernel may have scribbled on this one."""
        self._retire()
        reply = self._ask({"bundle": case.id, "subject": subject, "folder": str(folder)})
        if not isinstance(reply, Death):
            return dict(reply["collected"])
        how = f"no answer within {self.limit_s:g} s" if reply.hang else death.how(reply)
        return {"tensors": {}, "draw": None, "expected": {}, "problem": f"the inputs could not be collected: {how}"}

    def _request(self, item: Item) -> Message:
        asked = {"checks": self.checks, "repeats": self.repeats, "rules": self.rules}
        return {"judge": item.case_id, "subject": item.subject, **asked}

    def _of(self, reply: Message) -> Verdict:
        verdict = Verdict.from_json({**reply["verdict"], "environment": reply["environment"]})
        self._environments[verdict.subject] = verdict.environment
        if self.setup.device.kind == "cuda" and (facts := coredump.parse_log(reply.get("output", ""))):
            verdict = death.on_device(verdict, facts)
        notes = death.alarms(reply.get("output", ""), tuple(reply.get("prints", ())))
        if reason := reply.get("retire"):
            notes = (*notes, Finding("worker", f"the worker was replaced after this case: {reason}"))
        return replace(verdict, notes=(*verdict.notes, *notes))

    def _posthumous(self, case: Case, subject: str, reply: Death, before: Sequence[Item]) -> Verdict:
        verdict = death.verdict(case, subject, reply, self.limit_s, vitals.memory_limit())
        item, meter = Item(case.id, subject), Meter(self.budget)

        def dies(sequence: Sequence[Item]) -> bool | None:
            if (reply.hang and meter.left_s < self.limit_s) or not meter.spend():
                return None
            return self._replayed(sequence, item, reply)

        verdict = replay.explained(verdict, before, dies)
        return replace(verdict, environment=self._environments.get(subject) or self.probe(subject)[1])

    def _replayed(self, sequence: Sequence[Item], victim: Item, first: Death) -> bool:
        """Does the victim die the same way right after these, in a child that has judged nothing else?"""
        if self._child is not None and self._child.history:
            self._retire()
        if any(isinstance(self._ask(self._request(item)), Death) for item in sequence):
            return False
        again = self._ask(self._request(victim))
        return isinstance(again, Death) and again.signature == first.signature

    def _ask(self, request: Message) -> Message | Death:
        """One request, answered or died of. A fork server's death is nobody's fault: the request is put again, once."""
        for attempt in range(2):
            child = self._alive()
            before = list(child.history)
            if "judge" in request:
                child.history.append(Item(request["judge"], request["subject"]))
            mark, kills = child.log.mark(), vitals.oom_kills()
            reply = self._conversation(child, request, mark)
            if not isinstance(reply, Death):
                if "bug" in reply:
                    self._retire()
                return _checked({**reply, "output": child.log.since(mark)} if child.log.mark() > mark else reply)
            orphaned = child.orphaned()
            self._retire()
            if not orphaned or attempt:
                self._before = before
                return replace(reply, oom_kills=vitals.oom_kills() - kills)
            self._retire()  # the spare had the same server
        raise AssertionError("unreachable")

    def _conversation(self, child: Child, request: Message, mark: int) -> Message | Death:
        deadline, stage, link = time.monotonic() + self.limit_s, Stage.SUPPORT, ""
        try:
            child.channel.send(request)
            while (reply := child.next(deadline)) is not None:
                if "stage" not in reply:
                    return _readable(reply)
                stage = Stage(reply["stage"])
            hang = child.question(mark)
            gpu = self._gpu(child, mark, hung=True)
            return Death(stage, None, hang, "", child.log.since(mark), child.resident, gpu=gpu)
        except (EOFError, OSError, ValueError) as error:  # ValueError: a stage that is none
            link = str(error) if isinstance(error, CorruptedReply) else f"corrupted reply: {error}"
            link = link if isinstance(error, CorruptedReply | ValueError) else "closed"
        code = child.exit_code()
        return Death(stage, code, "", link, child.log.since(mark), child.resident, gpu=self._gpu(child, mark, hung=False))

    def _gpu(self, child: Child, mark: int, hung: bool) -> coredump.Facts | None:
        """What the device says of the death."""
        if self.setup.device.kind != "cuda":
            return None
        if hung:
            coredump.trigger(self._logs, child.pid, DUMP_LIMIT_S)
        return coredump.read(self._logs, child.pid, child.log.since(mark))

    def _retire(self) -> None:
        """The spare takes over; the child is killed."""
        old, self._child, self._spare = self._child, self._spare, None
        if old is not None:
            old.kill()

    def _dismiss_current(self) -> None:
        """The spare takes over; the child ends by itself, so that the libraries in it can tidy up."""
        old, self._child, self._spare = self._child, self._spare, None
        if old is not None:
            self._dismiss(old)

    def _dismiss(self, child: Child) -> None:
        with suppress(OSError):
            child.channel.send({"stop": True})
        child.leave_by = time.monotonic() + LEAVE_S
        self._leaving.append(child)

    def _alive(self) -> Child:
        """The current child, ready; a spare is started behind it."""
        child = self._child
        if child is not None and self.recycle is not None and len(child.history) >= self.recycle:
            self._dismiss_current()
        elif child is not None and child.ready and not child.alive():
            self._found_dead(child)
        for _ in range(STARTS):
            if self._child is None:
                self._child = self._start()
            if self._child.ready or self._is_ready(self._child):
                self._leaving = [c for c in self._leaving if not _ended(c)]
                self._spare = self._spare or self._start()
                return self._child
            last = self._child.log.since(0)
            self._retire()
        raise WorkerBug(f"{STARTS} workers died or did not start within {START_LIMIT_S:.0f} s; the last one said: {last}")

    def _found_dead(self, child: Child) -> None:
        """It answered, and died before it was asked again: the next verdict tells, but is not to blame."""
        if child.orphaned():
            self._retire()  # the child, then below its spare: they had the same server
        else:
            last = f" after {child.history[-1].subject}:{child.history[-1].case_id}" if child.history else ""
            text = f"the worker before this one died between two cases{last}: {death.how(Death(Stage.DONE, child.exit_code()))}"
            self._between = (Finding("worker", text, {"output": tail(child.log.since(0))}),)
        self._retire()

    def _is_ready(self, child: Child) -> bool:
        try:
            child.ready = child.next(time.monotonic() + START_LIMIT_S) is not None
        except EOFError:
            return False
        return child.ready

    def _start(self) -> Child:
        self._started += 1
        return start(self.setup, self._logs / f"worker-{os.getpid()}-{self._started}.log")


def _ended(child: Child) -> bool:
    """Frees what is left of a dismissed child that has ended, or that has had time for it."""
    if child.alive() and time.monotonic() < child.leave_by:
        return False
    child.kill()
    return True


def _readable(reply: Message) -> Message:
    """ValueError for an answer that is none: a kernel wrote over the child's memory or into its pipe."""
    if "verdict" in reply:
        try:
            Verdict.from_json({**reply["verdict"], "environment": dict(reply["environment"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a verdict: {error}") from error
    elif not {"support", "collected", "user_error", "bug"} & reply.keys():
        raise ValueError(f"no answer: {sorted(reply)}")
    return reply


def _checked(reply: Message) -> Message:
    if "user_error" in reply:
        raise errors.PluginError(reply["text"]) if reply["user_error"] == "PluginError" else errors.MoecheckError(reply["text"])
    if "bug" in reply:
        raise WorkerBug(reply["bug"])
    return reply
