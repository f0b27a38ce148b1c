"""Holds the clock: hands cases to a child, turns its death or silence into a Verdict, and replaces it from a warm spare.

Children come from a fork server that has imported torch but never initialised CUDA, so a replacement costs a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

from harness import errors
from harness.backends.base import Device, Support
from harness.case import Case
from harness.verdict import Finding, Stage, Status, Verdict
from harness.worker.child import Setup, main
from harness.worker.protocol import Message, receive, send

START_LIMIT_S = 120.0  # a cold fork server imports torch: 3..6 s measured, more on a loaded machine
GRACE_S = 0.5  # for the Python stack of a hung child to reach the log
TAIL_LINES = 12


class WorkerBug(Exception):
    """moecheck itself failed in the child; the text is its traceback."""


@dataclass
class _Child:
    process: ForkServerProcess
    pipe: Connection
    ready: bool = False


@dataclass(frozen=True)
class _Death:
    stage: Stage
    exit_code: int | None
    hung: bool
    tail: str


class Supervisor:
    """One device, one case in flight. Use as a context manager. checks: relations asked of each case, None for all;
    rules: verdicts also tell what the acceptance rules in use would have said."""

    checks: int | None = None
    rules: bool = False

    def __init__(
        self, device: Device, plugins: tuple[str, ...], log_dir: Path, limit_s: float, run_folder: Path | None = None
    ) -> None:
        self.limit_s = limit_s
        self._log = log_dir / f"worker-{os.getpid()}.log"
        self._setup = Setup(device, plugins, str(self._log), "" if run_folder is None else str(run_folder))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["harness.worker.child"])
        self._environments: dict[str, dict[str, str]] = {}
        self._spare: _Child | None = None
        self._child = self._start()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop both children; a deaf one is killed."""
        for child in (self._child, self._spare):
            if child is not None:
                with suppress(OSError):
                    send(child.pipe, {"stop": True})
                child.process.join(timeout=GRACE_S)
                self._kill(child)
        self._spare = None

    @property
    def pid(self) -> int:
        """Process id of the child that judges now."""
        return self._alive().process.pid or 0

    def probe(self, subject: str) -> tuple[Support, dict[str, str]]:
        """(can the backend run on this device, the environment it would run in). A probe that dies is a refusal."""
        reply = self._ask({"probe": subject})
        if isinstance(reply, _Death):
            return Support.no("library", f"its probe died: {_how(reply)}"), {}
        self._environments[subject] = dict(reply["environment"])
        return Support(**reply["support"]), self._environments[subject]

    def judge(self, case: Case, subject: str) -> Verdict:
        """The verdict on one case; MoecheckError for a user's fault, WorkerBug for ours."""
        started = time.perf_counter()
        reply = self._ask({"judge": case.id, "subject": subject, "checks": self.checks, "rules": self.rules})
        seconds = round(time.perf_counter() - started, 4)
        plugins = self._setup.plugins
        if isinstance(reply, _Death):
            environment = self._environments.get(subject) or self.probe(subject)[1]
            verdict = _verdict_of_death(case, subject, reply, self.limit_s)
            return replace(verdict, environment=environment, seconds=seconds, plugins=plugins)
        if reply.get("retire"):
            self._replace()
        self._environments[subject] = dict(reply["environment"])
        extra = {"environment": reply["environment"], "seconds": seconds, "plugins": list(plugins)}
        return Verdict.from_json({**reply["verdict"], **extra})

    def collect(self, case: Case, subject: str, folder: Path) -> Message:
        """What `harness.bundle.collect` finds, in a child that has judged nothing: a kernel may have scribbled on this one."""
        self._replace()
        reply = self._ask({"bundle": case.id, "subject": subject, "folder": str(folder)})
        if not isinstance(reply, _Death):
            return dict(reply["collected"])
        how = f"no answer within {self.limit_s:g} s" if reply.hung else _how(reply)
        return {"tensors": {}, "draw": None, "expected": {}, "problem": f"the inputs could not be collected: {how}"}

    def _ask(self, request: Message) -> Message | _Death:
        child, stage = self._alive(), Stage.SUPPORT
        mark = self._log.stat().st_size if self._log.exists() else 0
        deadline = time.monotonic() + self.limit_s
        try:
            send(child.pipe, request)
            while child.pipe.poll(max(0.0, deadline - time.monotonic())):
                reply = receive(child.pipe)
                if "stage" not in reply:
                    return _checked(reply)
                stage = Stage(reply["stage"])
        except (EOFError, OSError):
            child.process.join(timeout=GRACE_S)
            return self._bury(child, stage, hung=False, mark=mark)
        return self._bury(child, stage, hung=True, mark=mark)

    def _bury(self, child: _Child, stage: Stage, hung: bool, mark: int) -> _Death:
        if hung and child.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGUSR1)
            child.process.join(timeout=GRACE_S)
        death = _Death(stage, child.process.exitcode, hung, self._tail(mark))
        self._replace()
        return death

    def _replace(self) -> None:
        """The spare takes over."""
        self._kill(self._child)
        self._child, self._spare = self._spare or self._start(), None

    def _alive(self) -> _Child:
        """The current child, ready; a spare is started behind it."""
        if not self._child.ready:
            if not self._child.pipe.poll(START_LIMIT_S):
                raise WorkerBug(f"the worker did not start within {START_LIMIT_S:.0f} s; see {self._log}")
            receive(self._child.pipe)
            self._child.ready = True
        if self._spare is None:
            self._spare = self._start()
        return self._child

    def _start(self) -> _Child:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=main, args=(theirs, self._setup), daemon=True)
        with _no_main_module():
            process.start()
        theirs.close()
        return _Child(process, ours)

    def _kill(self, child: _Child) -> None:
        if child.process.is_alive():
            child.process.kill()
        child.process.join()
        child.process.close()
        child.pipe.close()

    def _tail(self, mark: int) -> str:
        """What the dead child printed during its last case, the end of it."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as log:
            log.seek(mark)
            return _tail(log.read().decode(errors="replace").splitlines())


def _tail(lines: list[str]) -> str:
    """The end of the output, but the beginning of a Python stack: its first lines say where it died."""
    stack = next((i for i, text in enumerate(lines) if "(most recent call first)" in text), None)
    if stack is None:
        return "\n".join(lines[-TAIL_LINES:])
    return "\n".join(lines[max(0, stack - TAIL_LINES // 2) : stack + TAIL_LINES // 2])


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Children must not import the caller's __main__ (pytest, the CLI): it costs 0.1 s a fork and can run user code."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real


def _checked(reply: Message) -> Message:
    if "user_error" in reply:
        raise errors.PluginError(reply["text"]) if reply["user_error"] == "PluginError" else errors.MoecheckError(reply["text"])
    if "bug" in reply:
        raise WorkerBug(reply["bug"])
    return reply


def _how(death: _Death) -> str:
    if death.exit_code is None:
        return "it vanished without an exit status"
    if death.exit_code < 0:
        name = signal.Signals(-death.exit_code).name
        return f"killed by {name}" + (" (the out-of-memory killer does that)" if name == "SIGKILL" else "")
    return f"the process exited with code {death.exit_code}"


def _verdict_of_death(case: Case, subject: str, death: _Death, limit_s: float) -> Verdict:
    how = f"no answer within {limit_s:g} s" if death.hung else _how(death)
    status = Status.HUNG if death.hung else Status.CRASHED
    finding = Finding("death", f"{how} during {death.stage}", {"exit_code": death.exit_code, "output": death.tail})
    return Verdict(case.id, subject, status, death.stage, f"{how} during {death.stage}", (finding,))
