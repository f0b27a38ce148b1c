"""GPU coredumps: which exception killed a child, in which kernel, and what a hung device is busy with.

The driver writes a dump when a kernel traps, or when a byte arrives in a pipe, and then aborts the process. Lightweight: no
memory, only what names the kernel. `skip_abort` stays out: it can swallow the very error. Flags, log lines and the 1 MiB that
the pipe wants: blog.vllm.ai, "CUDA Core Dump" (2025-08-11) and on hangs (2025-11-27); CUDA-GDB manual, GPU core dump support.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

SKIPPED = ("nonrelocated_elf_images", "global_memory", "shared_memory", "local_memory", "constbank_memory")
DEBUGGERS = ("cuda-gdb", "/usr/local/cuda/bin/cuda-gdb")
DEBUGGER_LIMIT_S = 60.0  # it loads the dump's ELF images; seconds
TRIGGER_BYTES = 1 << 20  # fewer can go unnoticed
POLL_S = 0.05
SETTLED_S = 1.0  # a dump that has not grown for so long is whole
SHOWN = 300  # characters of a kernel's name: CUTLASS writes thousands

# cuda-gdb: `CUDA Exception: Warp Illegal Address`, `... triggered at PC 0x7f31  kernel(int) (file.cu:11)`, `#0 0x7f in name<<<`
# without the address at a line's start.
GDB_EXCEPTION = re.compile(r"^CUDA Exception: (.+)$", re.MULTILINE)
GDB_AT = re.compile(r"^The exception was triggered at PC 0x[0-9a-f]+[ \t]*(.*?)[ \t]*(?:\(([^()\s]+:\d+)\))?$", re.MULTILINE)
GDB_FRAME = re.compile(r"^#\d+\s+(?:0x[0-9a-f]+ in )?(.+?)\s*<<<", re.MULTILINE)
GDB_PLACE = re.compile(r"^#0 .* at (\S+:\d+)$", re.MULTILINE)
# The driver's own log, CUDA_COREDUMP_SHOW_PROGRESS: the name is mangled.
LOG_EXCEPTION = re.compile(r"coredump: Detected an exception of type CUDBG_EXCEPTION_(\w+)")
LOG_FRAME = re.compile(r"coredump:\s+#0\s+0x[0-9a-f]+\s+(\S+)")
ASSERTION = re.compile(r"^(.*?):(\d+): (.*?):? block: \[[\d,]+\], thread: \[[\d,]+\] Assertion `(.*?)` failed", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What is known of the device at a death. source: where from, "cuda-gdb", "log" or "file"; dump: the file, "" for none;
    exception "" where the device was merely busy, kernel and place (file:line) "" where nobody says."""

    source: str
    exception: str = ""
    kernel: str = ""
    place: str = ""
    dump: str = ""

    @property
    def text(self) -> str:
        """One clause for a verdict, with its source."""
        what = f"CUDA exception {self.exception}" if self.exception else "the device was busy"
        where = f" in {self.kernel[:SHOWN]}" * bool(self.kernel) + f" at {self.place}" * bool(self.place)
        if self.source == "file":
            return f"a GPU coredump lies in {self.dump}; cuda-gdb could not read it here"
        return f"{what}{where} (said by {'the coredump' if self.source == 'cuda-gdb' else 'the process log'})"


def variables(folder: Path) -> dict[str, str]:
    """The environment in which a process dumps into `folder`; it counts when CUDA is initialised."""
    return {
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1",
        "CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1",
        "CUDA_COREDUMP_SHOW_PROGRESS": "1",
        "CUDA_COREDUMP_GENERATION_FLAGS": ",".join(f"skip_{what}" for what in SKIPPED),
        "CUDA_COREDUMP_FILE": str(_dump(folder, "%p")),
        "CUDA_COREDUMP_PIPE": str(pipe(folder, "%p")),
    }


def pipe(folder: Path, pid: int | str) -> Path:
    """Where the driver of that process listens for a request."""
    return folder.absolute() / f"gpu.{pid}.pipe"


def _dump(folder: Path, pid: int | str) -> Path:
    return folder.absolute() / f"gpu.{pid}.nvcudmp"


def tidy(folder: Path) -> None:
    """Remove the pipes that killed processes have left."""
    for left in folder.glob(pipe(folder, "*").name):
        left.unlink(missing_ok=True)


def trigger(folder: Path, pid: int, limit_s: float) -> bool:
    """Ask a hung process for a dump; True once it is written. False at once if the process never initialised CUDA."""
    deadline = time.monotonic() + limit_s
    try:
        request = os.open(pipe(folder, pid), os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no pipe, or nobody reads it
        return False
    try:
        _fill(request, deadline)
    finally:
        os.close(request)
    size, since = 0, time.monotonic()
    while time.monotonic() < deadline:
        now = _size(_dump(folder, pid))
        if now != size:
            size, since = now, time.monotonic()
        elif size and time.monotonic() - since > SETTLED_S:
            return True
        time.sleep(POLL_S)
    return size > 0


def _fill(request: int, deadline: float) -> None:
    left = TRIGGER_BYTES
    while left and time.monotonic() < deadline:
        try:
            left -= os.write(request, bytes(min(left, 1 << 16)))
        except BlockingIOError:
            time.sleep(POLL_S)
        except BrokenPipeError:  # the reader has what it wants
            return


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def read(folder: Path, pid: int, log: str) -> Facts | None:
    """What the dump of that process says, else what its log says; None where neither says anything. Of a failed assertion
    cuda-gdb 13.0 knows the kernel and no exception: the log has that."""
    dump = _dump(folder, pid)
    path = str(dump) if _size(dump) else ""
    logged = parse_log(log, path)
    if path and (said := _debugged(dump)) and (facts := parse_debugger(said, path)):
        return facts if facts.exception or logged is None else replace(facts, exception=logged.exception)
    return logged or (Facts("file", dump=path) if path else None)


def _debugged(dump: Path) -> str:
    """What cuda-gdb says of the dump, "" where it is not here or gives up."""
    debugger = next((found for name in DEBUGGERS if (found := shutil.which(name))), None)
    if debugger is None:
        return ""
    line = [debugger, "-batch", "-nx", "-ex", "set width 0", "-ex", f"target cudacore {dump.name}", "-ex", "bt"]
    try:
        done = subprocess.run(line, cwd=dump.parent, capture_output=True, timeout=DEBUGGER_LIMIT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def parse_debugger(said: str, dump: str) -> Facts | None:
    """Exception, kernel and line from `cuda-gdb -batch -ex "target cudacore FILE" -ex bt`; None if it names neither."""
    exception, at = GDB_EXCEPTION.search(said), GDB_AT.search(said)
    frame, place = GDB_FRAME.search(said), GDB_PLACE.search(said)
    kernel = frame[1] if frame else at[1] if at else ""
    line = (at[2] if at else None) or (place[1] if place else "")
    if exception is None and not kernel:
        return None
    return Facts("cuda-gdb", exception[1].strip() if exception else "", kernel, line, dump)


def parse_log(log: str, dump: str = "") -> Facts | None:
    """The same from what the driver and a device assertion print; None if they printed nothing of the kind."""
    if assertion := ASSERTION.search(log):
        file, line, kernel, condition = assertion.groups()
        return Facts("log", f"Assert: {condition}", kernel, f"{Path(file).name}:{line}", dump)
    if exception := LOG_EXCEPTION.search(log):
        frame = LOG_FRAME.search(log)
        return Facts("log", exception[1].replace("_", " ").title(), frame[1] if frame else "", "", dump)
    return None
