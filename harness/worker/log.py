"""What a child prints: a file of bounded size, read from the end."""

from __future__ import annotations

from pathlib import Path

CAP = 8 << 20  # bytes a log may hold before it is cut: 50 kept logs stay below half a GiB
KEPT = 64 << 10  # bytes kept of what was cut, and read of what is there
KEPT_FILES = 50
TAIL_LINES = 12


class Log:
    """The log of one child. Opened for appending there, cut here: the next line lands at the new end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cut = 0  # bytes that are no longer there
        self._kept = b""

    def mark(self) -> int:
        """Bytes printed so far, the cut ones too."""
        self.bound()
        return self.cut + self._size()

    def bound(self) -> None:
        """Cut the file if it has outgrown its cap: a flood must not fill the disk."""
        size = self._size()
        if size > CAP:
            self._kept = self._end(size)
            with self.path.open("r+b") as file:
                file.truncate(0)
            self.cut += size

    def since(self, mark: int) -> str:
        """What was printed after `mark`, the last KEPT bytes of it."""
        size = self._size()
        new = self._end(size)[-max(0, min(KEPT, self.cut + size - mark)) :] if self.cut + size > mark else b""
        if self.cut > mark and len(new) < KEPT:
            new = self._kept[-min(KEPT - len(new), self.cut - mark) :] + new
        return new.decode(errors="replace")

    def discard(self) -> None:
        """Remove an empty log, and the oldest ones beside it when there are many."""
        if not self._size():
            self.path.unlink(missing_ok=True)
        logs = sorted(self.path.parent.glob("worker-*.log"), key=_age)
        for path in logs[:-KEPT_FILES]:
            path.unlink(missing_ok=True)

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _end(self, size: int) -> bytes:
        if not size:
            return b""
        with self.path.open("rb") as file:
            file.seek(max(0, size - KEPT))
            return file.read(KEPT)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def tail(output: str) -> str:
    """The end of an output, but the beginning of a Python stack: its first lines say where the process died."""
    lines = output.splitlines()
    stack = next((i for i, text in enumerate(lines) if "(most recent call first)" in text), None)
    if stack is None:
        return "\n".join(line[:500] for line in lines[-TAIL_LINES:])
    return "\n".join(line[:500] for line in lines[max(0, stack - TAIL_LINES // 2) : stack + TAIL_LINES // 2])
