"""All ranks of a group under one clock. When one dies or falls silent the group is killed; the next case gets another."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from harness.errors import MoecheckError, WorkerBug
from harness.parallel.blame import Answer
from harness.parallel.rank import RankSetup, main
from harness.worker import coredump, vitals
from harness.worker.process import Child, start
from harness.worker.protocol import CorruptedReply, Message
from harness.worker.supervisor import LEAVE_S

SETTLE_S = 0.5  # after the first bad news: a dead rank's neighbours may be heard first
START_LIMIT_S = 180.0  # a cold fork server imports torch (3..6 s, more on a loaded machine), then the ranks meet


@dataclass
class Group:
    """setup: what all ranks share; its rank, rendezvous and log are filled in here."""

    setup: RankSetup
    logs: Path
    limit_s: float
    _children: list[Child] = field(default_factory=list)
    _started: int = 0
    _meeting: tempfile.TemporaryDirectory[str] | None = None

    def ask(self, requests: Sequence[Message]) -> list[Answer]:
        """One request to each rank, and what became of it. The group is gone afterwards unless all answered."""
        if not self._children:
            self._start()
        marks = [child.log.mark() for child in self._children]
        for child, request in zip(self._children, requests, strict=True):
            with suppress(OSError):  # it is found dead below
                child.channel.send(request)
        answers = self._listen(time.monotonic() + self.limit_s, marks)
        if any(answer.reply is None for answer in answers):
            self.kill()
        return answers

    def close(self) -> None:
        """End the ranks."""
        for child in self._children:
            with suppress(OSError):
                child.channel.send({"stop": True})
        for child in self._children:
            child.process.join(timeout=LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """End the ranks now."""
        for child in self._children:
            child.kill()
        self._children = []
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def _start(self) -> None:
        self._started += 1
        name = f"{os.getpid()}-{self._started}"
        self._meeting = tempfile.TemporaryDirectory(prefix="moecheck-")  # NCCL comes back to it at the first exchange
        for rank in range(self.setup.ranks):
            setup = replace(self.setup, rank=rank, rendezvous=f"{self._meeting.name}/ranks")
            self._children.append(start(setup, self.logs / f"worker-{name}-rank{rank}.log", main))
        answers = self._listen(time.monotonic() + START_LIMIT_S, [0] * self.setup.ranks)
        late = next((answer for answer in answers if answer.reply is None), None)
        if late is not None:
            self.kill()
            raise WorkerBug(
                f"rank {late.rank} of {self.setup.ranks} did not start over {self.setup.transport}: {late.output[-2000:]}"
            )
        self._refuse(answers)

    def _refuse(self, answers: list[Answer]) -> None:
        for answer in answers:
            if answer.reply is not None and "user_error" in answer.reply:
                self.kill()
                raise MoecheckError(str(answer.reply["user_error"]))

    def _listen(self, deadline: float, marks: list[int]) -> list[Answer]:
        """What each rank says until all have answered, or a while after the first that did not."""
        answers = [Answer(rank) for rank in range(self.setup.ranks)]
        kills = vitals.oom_kills()
        while (left := min(deadline, *_patience(answers, deadline)) - time.monotonic()) > 0:
            open_ = {a.rank: self._children[a.rank] for a in answers if not a.over}
            if not open_:
                break
            sources = {source: rank for rank, c in open_.items() for source in (c.channel.pipe, c.process.sentinel)}
            for rank in {sources[source] for source in wait(list(sources), left)}:  # type: ignore[index]
                _hear(self._children[rank], answers[rank])
        for answer in answers:
            child = self._children[answer.rank]
            if not answer.over:
                answer.hang = child.question(marks[answer.rank])
            answer.output = child.log.since(marks[answer.rank])
            answer.resident, answer.oom_kills = child.resident, vitals.oom_kills() - kills
            if answer.dead and self.setup.device.kind == "cuda":
                answer.gpu = coredump.read(self.logs, child.pid, answer.output)
        return answers


def _patience(answers: list[Answer], deadline: float) -> list[float]:
    return [answer.at + SETTLE_S for answer in answers if answer.over and answer.reply is None] or [deadline]


def _hear(child: Child, answer: Answer) -> None:
    """Take in what a rank has said so far."""
    try:
        while (message := child.channel.receive(time.monotonic())) is not None:
            answer.hear(message)
            if answer.over:
                return
    except CorruptedReply as error:
        answer.link = str(error)
    except (EOFError, OSError):
        answer.link = "closed"
    else:
        child.resident = vitals.resident(child.pid) or child.resident
        if child.alive():
            return
        answer.link = "closed"
    answer.exit_code = child.exit_code()
    answer.dead, answer.at = True, time.monotonic()
