"""Units built in parallel, each once: an object file is kept under its content key and never made again."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import WarmError
from harness.warm.explain import explain
from harness.warm.units import Unit


@dataclass(frozen=True, slots=True)
class Built:
    """An object file, what it took (`seconds` by the clock, `cpu` seconds, the compiler's `peak_mib`), was it `kept`?"""

    name: str
    path: str
    seconds: float
    size: int
    peak_mib: int
    cpu: float = 0.0
    kept: bool = False


Report = Callable[[int, int, Built], None]


def build(units: Sequence[Unit], toolchain: str, folder: Path, jobs: int, report: Report) -> list[Built]:
    """Builds what is missing, `jobs` at a time, in the order given, and returns all, kept ones too.

    An object file appears under its final name only when it is whole, so a build that was killed goes on where it was.
    Raises WarmError with the compiler's first error and what to do; units in flight end, no further one starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop, done, lock = threading.Event(), [0], threading.Lock()

    def one(unit: Unit) -> Built | None:
        if stop.is_set():
            return None
        try:
            built = _one(unit, folder / f"{unit.name}-{unit.key(toolchain)}.o")
        except BaseException:
            stop.set()
            raise
        with lock:
            done[0] += 1
            report(done[0], len(units), built)
        return built

    pool = ThreadPoolExecutor(jobs)
    try:
        results = [future.result() for future in [pool.submit(one, unit) for unit in units]]
    except BaseException:  # Ctrl-C too: what waits is not begun
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [built for built in results if built is not None]


def _one(unit: Unit, target: Path) -> Built:
    if (kept := _kept(target)) is not None:
        return kept
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        built = _compile(unit, part, target)
        target.with_suffix(".json").write_text(json.dumps(asdict(built)))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return built


def _kept(target: Path) -> Built | None:
    """The object file of an earlier build, if it and what is known about it are whole."""
    try:
        known = json.loads(target.with_suffix(".json").read_text())
        return Built(**{**known, "path": str(target), "kept": True}) if target.exists() else None
    except (OSError, ValueError, TypeError):
        return None


def _compile(unit: Unit, part: Path, target: Path) -> Built:
    began = time.monotonic()
    command = [*unit.argv, "-c", str(unit.source), "-o", str(part)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or not part.exists():
        raise WarmError(explain(unit.name, child.returncode, said))
    seconds, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return Built(unit.name, str(target), round(seconds, 1), part.stat().st_size, usage.ru_maxrss >> 10, round(cpu, 1))
