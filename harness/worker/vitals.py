"""What the kernel of the operating system knows of a process: memory, state, and whom its out-of-memory killer took."""

from __future__ import annotations

import os
import resource
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PAGE = resource.getpagesize()


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def state(pid: int) -> str:
    """The letter of proc(5): R runs, S sleeps, D waits for a device, T is stopped; "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def oom_kills() -> int:
    """Processes of our control group (version 2: memory.events, version 1: memory.oom_control) that the out-of-memory killer
    took so far; 0 where nobody counts."""
    for folder in _groups():
        for name in ("memory.events", "memory.oom_control"):
            try:
                words = dict(line.split() for line in (folder / name).read_text().splitlines())
            except (OSError, ValueError):
                continue
            return int(words.get("oom_kill", 0))
    return 0


@cache
def memory_limit() -> int:
    """Bytes that this process's control group may hold, the machine's memory where it sets no limit."""
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    for folder in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            return min(total, int(text)) if text.isdigit() else total
    return total


@cache
def _groups() -> tuple[Path, ...]:
    """Where our control group may be mounted: its own path, and the root, which is what a container sees of its own."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            found += [root / path.lstrip("/"), root]
    return tuple(folder for folder in found if any((folder / n).exists() for n in ("memory.events", "memory.oom_control")))
