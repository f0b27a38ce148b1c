"""One child as its supervisor sees it: started from the fork server, listened to, questioned when silent, killed."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

from harness.select import Item
from harness.worker import hang, vitals
from harness.worker.child import Setup, main
from harness.worker.log import Log
from harness.worker.protocol import Channel, Message

GRACE_S = 0.5  # for an exit status, and for the Python stack of a hung child to reach the log
SLICE_S = 0.1  # between two looks at a silent child's memory and log: a flood writes some 100 MB meanwhile
KILL_LIMIT_S = 10.0  # a process that waits in a driver dies when the driver lets it go, if ever
START_TRIES = 3  # a fork server that is killed while it forks


@dataclass
class Child:
    """A process that judges. history: what it was asked to judge so far; resident: bytes in memory when last seen."""

    process: ForkServerProcess
    channel: Channel
    log: Log
    server: int | None
    ready: bool = False
    history: list[Item] = field(default_factory=list)
    resident: int = 0
    leave_by: float = 0.0  # time.monotonic() at which a dismissed child is killed
    _poll: select.poll | None = None

    @property
    def pid(self) -> int:
        """Its process id, its process group's too."""
        return self.process.pid or 0

    def alive(self) -> bool:
        """False once it has ended or its server has."""
        return self.process.is_alive()

    def next(self, deadline: float) -> Message | None:
        """Its next message, None when the deadline passes; EOFError when it is gone, CorruptedReply for bytes that are none."""
        while not self.channel.pending:
            ready = self._heard(min(deadline - time.monotonic(), SLICE_S))
            if self.channel.pipe.fileno() in ready:
                self.channel.fill()
            elif ready:
                raise EOFError("closed")
            else:
                self.resident = vitals.resident(self.pid) or self.resident
                self.log.bound()
            if not self.channel.pending and time.monotonic() >= deadline:
                return None
        return self.channel.take()

    def _heard(self, seconds: float) -> set[int]:
        """Which of its descriptors say something within so long: its pipe, its end. One poll object for all: a selector
        a message, as multiprocessing.connection.wait makes, was a sixth of the supervisor's time for a case."""
        if self._poll is None:
            self._poll = select.poll()
            for descriptor in (self.channel.pipe.fileno(), self.process.sentinel):
                self._poll.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in self._poll.poll(max(0.0, 1000 * seconds))}

    def question(self, mark: int) -> str:
        """Where it hangs, asked of itself."""
        letter = vitals.state(self.pid)
        with suppress(ProcessLookupError):
            os.kill(self.pid, hang.ASK)
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and not hang.complete(self.log.since(mark)):
            time.sleep(0.01)
        return hang.where(self.log.since(mark), letter)

    def exit_code(self) -> int | None:
        """How it ended, None if it lives on."""
        self.process.join(timeout=GRACE_S)
        return self.process.exitcode

    def orphaned(self) -> bool:
        """Did the fork server die? The system then kills its children, which is no fault of what they ran."""
        if self.process.exitcode not in (None, 255):  # 255: nobody is left to tell, see multiprocessing.popen_forkserver
            return False
        end = time.monotonic() + (GRACE_S if self.process.exitcode == 255 else 0.0)
        while not (gone := _server_gone(self.server)) and time.monotonic() < end:
            time.sleep(0.01)
        return gone

    def kill(self) -> None:
        """End it and whatever it started, and free what it held here."""
        assert self.process.pid, "killpg(0) would be ours"
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(timeout=KILL_LIMIT_S)
        with suppress(ValueError):  # it waits in a driver and cannot even be killed
            self.process.close()
        self.channel.pipe.close()
        self.log.discard()


def _server() -> int | None:
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def _server_gone(pid: int | None) -> bool:
    """Ended or replaced. Looks without reaping: multiprocessing wants to do that itself."""
    if pid is None or pid != _server():
        return True
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def start(setup: Setup, path: Path, target: Callable[..., None] = main) -> Child:
    """Fork a child that runs `target` and prints to `path`. It is ready when it says so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.worker.child"])
    setup = replace(setup, log=str(path))
    for attempt in range(START_TRIES):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, setup), daemon=True)
        try:
            with _no_main_module():
                process.start()
        except (OSError, EOFError):
            ours.close()
            if attempt == START_TRIES - 1:
                raise
            continue
        finally:
            theirs.close()
        return Child(process, Channel(ours), Log(path), _server())
    raise AssertionError("unreachable")


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Children must not import the caller's __main__ (pytest, the CLI): it costs 0.1 s a fork and can run user code."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real
