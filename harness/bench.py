"""`make bench`: the ratios behind README's figures. Prints; asserts nothing, because clocks differ from machine to machine."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.inputs import make_inputs
from harness.journal import Journal
from harness.oracle import expect
from harness.pipeline import run
from harness.worker.child import THREADS
from harness.worker.supervisor import Supervisor
from reference.rounding import Rounding

CASES = 300
CRASHES = 10
SMALL = "moe.bf16.t{tokens}.h256.i128.e8.k2.renormalize.swiglu.standard.real.s{seed}"
PRODUCTION = "moe.mxfp4.t33.h7168.i512.e384.k8.kimi_k2.swiglu.standard.real.s0"
console = Console(highlight=False, soft_wrap=True)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def for_each(cases: Iterable[Case], call: Callable[[Case], object]) -> None:
    """Call once per case."""
    for case in cases:
        call(case)


def isolation() -> None:
    """300 small cases through the worker and the journal against the same cases in this process, alternating in tens."""
    backend = discover()["torch_grouped_mm"]
    torch.set_num_threads(THREADS)
    cases = [Case.parse(SMALL.format(tokens=1 + i % 33, seed=i)) for i in range(CASES)]
    bare = through = 0.0
    with tempfile.TemporaryDirectory() as folder, Supervisor(CPU, (), Path(folder), 60) as worker:
        journal = Journal(Path(folder))
        run(cases[0], backend, CPU)
        worker.judge(cases[0], backend.name)
        for start in range(0, CASES, 10):
            group = cases[start : start + 10]
            bare += timed(partial(for_each, group, lambda case: run(case, backend, CPU)))
            through += timed(partial(for_each, group, lambda case: journal.append(worker.judge(case, backend.name))))
    console.print(f"isolation: {CASES} cases bare {bare:.2f} s, worker and journal {through:.2f} s, ratio {through / bare:.3f}")


def replacement() -> None:
    """From noticing a death to the next child's first answer."""
    case = Case.parse(SMALL.format(tokens=3, seed=0))
    gaps = []
    with tempfile.TemporaryDirectory() as folder, Supervisor(CPU, (), Path(folder), 60) as worker:
        worker.judge(case, "torch_grouped_mm")
        warm = statistics.median(timed(lambda: worker.judge(case, "torch_grouped_mm")) for _ in range(5))
        for _ in range(CRASHES):
            worker.judge(case, "torch_grouped_mm")
            os.kill(worker.pid, signal.SIGSEGV)
            worker.judge(case, "torch_grouped_mm")  # dies or finds the corpse
            gaps.append(timed(lambda: worker.judge(case, "torch_grouped_mm")) - warm)
    fresh = timed(lambda: subprocess.run([sys.executable, "-c", "import harness.worker.child"], check=True))
    middle = statistics.median(gaps)
    console.print(f"replacement: a crash costs {middle:.3f} s over a warm case (median of {CRASHES}, worst {max(gaps):.3f} s)")
    console.print(
        f"replacement: a fresh interpreter with torch takes {fresh:.2f} s, {fresh / max(middle, 1e-3):.0f} times as long"
    )


def production() -> None:
    """Inputs and oracle of a served shape on all cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    case = Case.parse(PRODUCTION)
    rounding = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = timed(lambda: expect(case, make_inputs(case), rounding))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    console.print(f"production: {case.id}")
    console.print(
        f"production: inputs and oracle {seconds:.1f} s, peak memory {peak / 2**20:.2f} GiB (before {before / 2**20:.2f} GiB)"
    )


if __name__ == "__main__":
    production()
    isolation()
    replacement()
