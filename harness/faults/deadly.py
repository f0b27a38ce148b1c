"""Kernels that die, one way each, and what a verdict must say of them. A plugin: harness.faults.deadly.

Each does its harm in prepare() or in the call, by the parity of the case's seed, and is right otherwise.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.backends import torch_grouped_mm
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.inputs import Inputs
from harness.verdict import Status
from harness.worker.vitals import PAGE

CLEAN = torch_grouped_mm.BACKENDS[0]
FLOOD = 64 << 20  # bytes: eight times what a log may hold
ROOM = 256 << 20  # bytes an address space may still grow until a bomb is out of memory
HANDLES = 110  # more than a child judges before it is recycled, fewer than a soak of 128 cases


@dataclass(frozen=True)
class Deadly:
    """One way to fail. status, text: what the verdict is and its reason says; costs_limit: it takes the whole time limit."""

    harm: Callable[[], object]
    status: Status
    text: str
    costs_limit: bool = False

    @property
    def name(self) -> str:
        """The backend that does it."""
        return f"deadly_{self.harm.__name__}"


def segfault() -> None:
    """Reads address 0."""
    ctypes.string_at(0)


def abort() -> None:
    """A failed assertion in C++."""
    os.write(2, b"kernel.cu:17: void f(): Assertion `tokens > 0' failed.\n")
    os.abort()


def bad_alloc() -> None:
    """An exception in C++ that nobody catches."""
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def killed() -> None:
    """Somebody sends SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    """A library that calls exit()."""
    os._exit(3)


def spins() -> None:
    """A loop in Python whose condition never comes."""
    while True:
        pass


def deadlock_with_gil() -> None:
    """Locks a mutex twice in C, the GIL held."""
    _deadlock(ctypes.PyDLL(None))


def deadlock_without_gil() -> None:
    """Locks a mutex twice in C, the GIL released."""
    _deadlock(ctypes.CDLL(None))


def _deadlock(libc: ctypes.CDLL) -> None:
    mutex = ctypes.create_string_buffer(64)  # pthread_mutex_t, 40 bytes on x86-64: zeros are an unlocked normal one
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def overflow() -> None:
    """Recursion through C until the stack is full."""
    sys.setrecursionlimit(10**9)
    _descend(0)


def _descend(depth: int) -> list[Any]:
    return list(map(_descend, [depth + 1]))


def bomb() -> None:
    """Allocates until malloc refuses."""
    now = int(open("/proc/self/statm").read().split()[0]) * PAGE  # noqa: SIM115 - one read, and the process is done for
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    hoard = []
    while True:
        hoard.append(torch.ones(ROOM // 16, dtype=torch.uint8))


def flood() -> None:
    """Debug output left in a kernel's loop."""
    line = b"thread %d: acc = 0.5\n" * 50_000
    for _ in range(FLOOD // len(line)):
        os.write(1, line)


def complains() -> None:
    """Prints an error and carries on."""
    os.write(2, b"CUDA error: invalid argument at stream.cc:88, ignored\n")


def closes_pipe() -> None:
    """Closes descriptors that are not its own."""
    os.closerange(3, 256)


def corrupts_reply() -> None:
    """Writes into a descriptor that is not its own."""
    for descriptor in range(3, 256):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\x00\x01 tile 7 done\n")


def forks() -> None:
    """Leaves a copy of the whole process behind."""
    os.fork()


def spawns() -> None:
    """Leaves a helper process behind."""
    subprocess.Popen(["sleep", "1000"])


KINDS = (
    Deadly(segfault, Status.CRASHED, "killed by SIGSEGV"),
    Deadly(abort, Status.CRASHED, "killed by SIGABRT .*having said: kernel.cu:17"),
    Deadly(bad_alloc, Status.OUT_OF_MEMORY, r"killed by SIGABRT .*for lack of memory \(std::bad_alloc\)"),
    Deadly(killed, Status.CRASHED, "killed by SIGKILL"),
    Deadly(leaves, Status.CRASHED, "the process exited with code 3"),
    Deadly(spins, Status.HUNG, "it runs Python code at deadly.py:.* in spins", True),
    Deadly(deadlock_with_gil, Status.HUNG, "it is waiting in C code called from deadly.py:.*, the GIL held", True),
    Deadly(deadlock_without_gil, Status.HUNG, "it is waiting in C code called from deadly.py:.*, the GIL released", True),
    Deadly(overflow, Status.CRASHED, "killed by SIGSEGV, a stack overflow: .* Python frames are _descend"),
    Deadly(bomb, Status.OUT_OF_MEMORY, "can't allocate memory|no memory left|MemoryError"),
    Deadly(flood, Status.PASSED, ""),
    Deadly(complains, Status.PASSED, ""),
    Deadly(closes_pipe, Status.CRASHED, "something closed the worker's pipe under it"),
    Deadly(corrupts_reply, Status.CRASHED, "corrupted reply: .*tile 7"),
    Deadly(forks, Status.PASSED, ""),
    Deadly(spawns, Status.PASSED, ""),
)


def _backend(kind: Deadly) -> Backend:
    def prepare(case: Case, inputs: Inputs) -> Launch:
        if case.seed % 2:
            kind.harm()
        launch = CLEAN.prepare(case, inputs)

        def call() -> torch.Tensor:
            if not case.seed % 2:
                kind.harm()
            return launch.call()

        return replace(launch, call=call)

    return replace(CLEAN, name=kind.name, prepare=prepare, summary=(kind.harm.__doc__ or "").strip())


_handles: list[Launch] = []
_armed: list[str] = []


def _prepare_handles(case: Case, inputs: Inputs) -> Launch:
    """A table of prepared layers whose index wraps: from layer HANDLES on, the answer is NaN."""
    launch = CLEAN.prepare(case, inputs)
    _handles.append(replace(launch, buffers={}))
    if len(_handles) <= HANDLES:
        return launch
    return replace(launch, call=lambda: torch.full_like(launch.call(), torch.nan))


def _prepare_arms(case: Case, inputs: Inputs) -> Launch:
    """Right, but leaves behind what makes `deadly_after` die."""
    _armed.append(case.id)
    return CLEAN.prepare(case, inputs)


def _prepare_after(case: Case, inputs: Inputs) -> Launch:
    """Dies only where `deadly_arms` ran before it in the same process."""
    if _armed:
        segfault()
    return CLEAN.prepare(case, inputs)


STATEFUL = (
    replace(CLEAN, name="deadly_handles", prepare=_prepare_handles, summary="wrong from the 111th layer of a process on"),
    replace(CLEAN, name="deadly_arms", prepare=_prepare_arms, summary="right, and fatal for deadly_after"),
    replace(CLEAN, name="deadly_after", prepare=_prepare_after, summary="dies where deadly_arms ran before"),
)
BACKENDS = (*map(_backend, KINDS), *STATEFUL)
