"""One timed child as its supervisor sees it. Several may live at once; who is asked has the device to itself."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.backends.base import Device
from harness.case import Case
from harness.errors import MoecheckError, TimingError, WorkerBug
from harness.latency.clocks import Clock
from harness.verdict import Stage, Verdict
from harness.worker import death
from harness.worker.child import Setup
from harness.worker.death import Death
from harness.worker.process import start
from harness.worker.protocol import Message

_COUNT = itertools.count()


@dataclass(frozen=True)
class Side:
    """A version of a kernel. overlay: a folder in front of the child's sys.path, "" for none; name: for people."""

    backend: str
    plugins: tuple[str, ...] = ()
    overlay: str = ""
    name: str = ""


class Timer:
    """A fresh child for one side, killed at the end. Use as a context manager. environment: the facts its times hold for, known
    after the first answer."""

    def __init__(self, side: Side, device: Device, logs: Path, limit_s: float) -> None:
        self.side, self.environment = side, dict[str, str]()
        self._limit_s, self._deadline = limit_s, 0.0
        log = logs / f"latency-{os.getpid()}-{next(_COUNT)}.log"
        self._child = start(Setup(device, side.plugins, "", overlay=side.overlay, timed=True), log)

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._child.kill()

    def send(self, request: Message) -> None:
        """Ask; `wait` has the answer. A child that is gone is `wait`'s business."""
        self._deadline = time.monotonic() + self._limit_s
        try:
            if not self._child.ready:
                self._child.ready = self._child.next(self._deadline) is not None
            self._child.channel.send({**request, "subject": self.side.backend})
        except (EOFError, OSError):
            return

    def wait(self) -> Message:
        """The answer; TimingError for a kernel that raised, died or fell silent, MoecheckError for a user's fault."""
        try:
            while (reply := self._child.next(self._deadline)) is not None:
                if "stage" not in reply and "ready" not in reply:
                    return self._read(reply)
            raise TimingError(f"{self.side.name}: no answer within {self._limit_s:g} s while it was timed")
        except (EOFError, OSError) as error:
            said = Death(Stage.LAUNCH, self._child.exit_code(), link="closed", output=self._child.log.since(0))
            words = death.last_words(said.output)
            text = f"{self.side.name}: {death.how(said)} while it was timed{f', having said: {words}' if words else ''}"
            raise TimingError(text) from error

    def prepare(self, case: Case, graph: bool) -> None:
        """Ask for the case to be packed and called once; `wait` has the facts."""
        self.send({"latency": "prepare", "case": case.id, "graph": graph, "overlay": self.side.overlay})

    def ask(self, request: Message) -> Message:
        """`send` and `wait`."""
        self.send(request)
        return self.wait()

    def verdict(self, case: Case) -> Verdict:
        """The judgement of this very child, which may go on to be timed: values, memory and the second call; no relations."""
        reply = self.ask({"judge": case.id, "checks": 0, "repeats": 0, "rules": False})
        return Verdict.from_json({**reply["verdict"], "environment": self.environment})

    def slot(self, calls: int) -> tuple[list[float], Clock]:
        """(microseconds of each call, the clock meanwhile)."""
        reply = self.ask({"latency": "slot", "calls": calls})["timed"]
        seen: dict[str, Any] = reply["clock"]
        return reply["us"], Clock(tuple(seen["sm_mhz"]), tuple(seen["throttled"]), seen["ecc"])

    def _read(self, reply: Message) -> Message:
        self.environment = reply.get("environment", self.environment)
        if "problem" in reply:
            raise TimingError(f"{self.side.name}: {reply['problem']} while it was timed")
        if "bug" in reply:
            raise WorkerBug(reply["bug"])
        if "user_error" in reply:
            raise MoecheckError(reply["text"])
        return reply
