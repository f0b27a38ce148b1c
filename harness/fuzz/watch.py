"""Sees what a reader does: Python's audit events (PEP 578) of writing outside a folder, running code, starting processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "os.utime")
LIMIT_S = 10.0  # a file of some KiB; a hundred times what the slowest takes


class Violation(BaseException):
    """A reader did what no reader may; not an Exception, so that none of them can take it for a parse error."""


class _Watch:
    """The one audit hook of this process: hooks cannot be removed, so it is told whom to watch."""

    folder: Path | None = None
    busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or self.busy:
            return
        self.busy = True  # what is asked below raises events too
        try:
            self._check(event, arguments, self.folder)
        finally:
            self.busy = False

    def _check(self, event: str, arguments: tuple[Any, ...], folder: Path) -> None:
        if event in FORBIDDEN:
            raise Violation(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = Path(os.fsdecode(arguments[0])), arguments[2]
            if flags & WRITES and not _inside(path, folder):
                raise Violation(f"opened {path} for writing")
            if _inside(path, folder.parent / "outside") and not flags & os.O_NOFOLLOW:
                raise Violation(f"read {path}, which leads outside")
        if event in CHANGES and not all(_inside(Path(os.fsdecode(p)), folder) for p in arguments if isinstance(p, str | bytes)):
            raise Violation(f"{event} {arguments!r:.200}")
        if event == "exec" and _inside(Path(getattr(arguments[0], "co_filename", "")), folder):
            raise Violation(f"ran code of {arguments[0]!r:.200}")


def _inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a loop of links
        return False


_watch: _Watch | None = None


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Within: Violation for a write outside `folder`, a read of its neighbour `outside`, a process, code; TimeoutError after
    LIMIT_S. Main thread only."""
    global _watch
    if _watch is None:
        _watch = _Watch()
        sys.addaudithook(_watch)
    before = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    _watch.folder = folder
    try:
        yield
    finally:
        _watch.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _late(*_: object) -> None:
    raise Violation(f"did not answer within {LIMIT_S:g} s")
