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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from harness import config
from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.inputs import make_inputs
from harness.journal import Journal
from harness.oracle import expect, weight_source
from harness.pipeline import Options, run
from harness.report import junit, page
from harness.select import Item
from harness.verdict import Status
from harness.worker.child import THREADS
from harness.worker.replay import Budget
from harness.worker.supervisor import Supervisor
from reference import fused
from reference.activation import ACTIVATIONS
from reference.experts import ExpertWeights
from reference.formats import all_formats, get
from reference.moe import Experts, moe
from reference.rounding import Rounding
from reference.routing import Routing

CASES = 300
CRASHES = 10
STORM, EVERY = 1000, 10  # cases, one in so many of which dies
DEADLY, RIGHT = "harness.faults.deadly", "torch_grouped_mm"  # the plugin, and the kernel that its own are made of
ENCODED_ROWS = 2048
SMALL = "moe.bf16.t{tokens}.h256.i128.e8.k2.renormalize.swiglu.standard.real.s{seed}"
PRODUCTION = "moe.mxfp4.t33.h7168.i512.e384.k8.kimi_k2.swiglu.standard.real.s0"
T = TypeVar("T")
console = Console(highlight=False, soft_wrap=True)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def for_each(items: Iterable[T], call: Callable[[T], object]) -> None:
    """Call once per item."""
    for item in items:
        call(item)


def isolation() -> None:
    """300 small cases of a smoke run through worker and journal against the same in this process, alternating in tens."""
    asked = Options(config.tier("smoke").checks)
    backend = discover()["torch_grouped_mm"]
    torch.set_num_threads(THREADS)
    cases = [Case.parse(SMALL.format(tokens=1 + i % 33, seed=i)) for i in range(CASES)]
    bare = through = 0.0
    with tempfile.TemporaryDirectory() as folder, Supervisor(CPU, (), Path(folder), 60) as worker:
        journal = Journal(Path(folder))
        worker.checks = asked.checks
        run(cases[0], backend, CPU, options=asked)
        worker.judge(cases[0], backend.name)
        for start in range(0, CASES, 10):
            group = cases[start : start + 10]
            bare += timed(partial(for_each, group, lambda case: run(case, backend, CPU, options=asked)))
            through += timed(partial(for_each, group, lambda case: journal.append(worker.judge(case, backend.name))))
    console.print(f"isolation: {CASES} cases bare {bare:.2f} s, worker and journal {through:.2f} s, ratio {through / bare:.3f}")


def recording() -> None:
    """What journal, JUnit and the report page of 1,000 small cases take, of the seconds that judging them takes."""
    backend, many = discover()["torch_grouped_mm"], 1000
    asked = Options(config.tier("smoke").checks)
    torch.set_num_threads(THREADS)
    cases = [Case.parse(SMALL.format(tokens=1 + i % 33, seed=i)) for i in range(many // 10)]
    run(cases[0], backend, CPU, options=asked)
    started = time.perf_counter()
    judged = [run(case, backend, CPU, options=asked) for case in cases]
    whole = 10 * (time.perf_counter() - started)
    seeded = [(replace(cases[i % len(cases)], seed=i), judged[i % len(cases)]) for i in range(many)]
    verdicts = [replace(verdict, case_id=case.id) for case, verdict in seeded]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = Journal(folder)
        parts = {
            "journal": timed(lambda: for_each(verdicts, journal.append)),
            "JUnit": timed(lambda: junit.write(folder / "junit.xml", [Item(v.case_id, v.subject) for v in verdicts], verdicts)),
            "page": timed(lambda: page.write(folder / "report.html", page.load(folder, {}))),
        }
        journal.close()
    told = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
    share = 100 * sum(parts.values()) / whole
    console.print(f"recording: {many} small cases judged in {whole:.0f} s; {told}: {share:.2f} % of it")


def replacement() -> None:
    """From noticing a death to the next child's first answer."""
    case = Case.parse(SMALL.format(tokens=3, seed=0))
    gaps = []
    with tempfile.TemporaryDirectory() as folder, Supervisor(CPU, (), Path(folder), 60) as worker:
        worker.checks = 0
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


def crashes() -> None:
    """1,000 small cases of a smoke run, 100 of them on a kernel that dies, each death explained as that tier does, against the
    same cases with a right kernel in its place; alternating in fifties."""
    tier, kernels = config.tier("smoke"), ("deadly_segfault", "deadly_abort")
    cases = [Case.parse(SMALL.format(tokens=1 + i % 33, seed=i)) for i in range(STORM)]
    clean = stormy = 0.0
    died = 0
    with tempfile.TemporaryDirectory() as folder, Supervisor(CPU, (DEADLY,), Path(folder), 60) as worker:
        worker.checks, worker.budget = tier.checks, Budget(tier.replay_runs, tier.replay_s)
        for name in ("clean", "stormy"):
            (Path(folder) / name).mkdir()
        journals = [Journal(Path(folder) / name) for name in ("clean", "stormy")]
        worker.judge(cases[0], RIGHT)

        def judged(journal: Journal, items: Iterable[tuple[str, Case]]) -> None:
            nonlocal died
            for subject, case in items:
                verdict = worker.judge(case, subject)
                died += verdict.status is Status.CRASHED
                journal.append(verdict)

        for start in range(0, STORM, 50):
            right = [(RIGHT, case) for case in cases[start : start + 50]]
            mixed = [(kernels[i // EVERY % 2] if i % EVERY == EVERY - 1 else own, c) for i, (own, c) in enumerate(right)]
            clean += timed(partial(judged, journals[0], right))
            stormy += timed(partial(judged, journals[1], mixed))
    console.print(
        f"crashes: {STORM} cases without {clean:.1f} s, {died} of them dying {stormy:.1f} s, ratio {stormy / clean:.2f}"
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


def reference_layer() -> None:
    """The float64 layer, expert by expert, against a loop over tokens and slots, on the same decoded weights."""
    torch.set_num_threads(os.cpu_count() or 1)
    case = Case.parse("moe.bf16.t512.h2048.i1024.e64.k8.renormalize.swiglu.standard.real.s0")
    inputs = make_inputs(case)
    source = weight_source(inputs)
    decoded = [source(e) for e in range(case.shape.experts)]
    experts = Experts(case.shape.experts, decoded.__getitem__, ACTIVATIONS[case.activation])
    ours = min(timed(lambda: moe(inputs.x, inputs.routing, experts)) for _ in range(3))
    tokens = 32  # of 512: the loop is linear in tokens
    loop = timed(lambda: token_loop(inputs.x[:tokens].double(), inputs.routing, experts)) * case.shape.tokens / tokens
    console.print(f"reference: {case.id}: {ours:.2f} s, a loop over tokens {loop:.1f} s, {loop / ours:.0f} times as long")


def token_loop(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The layer one token and one slot at a time."""
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for e, weight in zip(routing.ids[t].tolist(), routing.weights[t], strict=True):
            w = experts.weights(e)
            assert w.up is not None
            out[t] += weight * (w.down @ experts.activation.combine(w.gate @ x[t], w.up @ x[t]))
    return out


def device_layer() -> None:
    """On a GPU: the float64 layer's share of the float64 matmul rate measured in the same run."""
    if not torch.cuda.is_available():
        console.print("device: no GPU here, the float64 rate of a GPU was not measured")
        return
    case = Case.parse("moe.mxfp4.t4096.h7168.i2048.e32.k8.renormalize.swiglu.standard.real.s0")
    inputs = make_inputs(case, "cuda")
    a = torch.randn(8192, 8192, dtype=torch.float64, device="cuda")
    matmul = min(synchronized(lambda: a @ a) for _ in range(5))
    rate = 2 * 8192**3 / matmul / 1e12
    drawn = [(inputs.gate_up(e), inputs.down(e)) for e in range(case.shape.experts)]
    fmt = get(case.recipe.weights)

    def decode(e: int) -> ExpertWeights:
        (gate, up), down = drawn[e]
        assert up is not None
        return ExpertWeights(fmt.decode(gate), fmt.decode(up), fmt.decode(down))

    experts = Experts(case.shape.experts, decode, ACTIVATIONS[case.activation])
    seconds = min(synchronized(lambda: moe(inputs.x, inputs.routing, experts)) for _ in range(3))
    flops = 2 * 3 * case.shape.tokens * case.shape.top_k * case.shape.hidden * case.shape.inter / seconds / 1e12
    console.print(f"device: {case.id}: {flops:.1f} TFLOP/s in float64 of {rate:.1f} measured, {flops / rate:.2f} of it")


def few_rows() -> None:
    """33 tokens of 384 experts: the layer in one compiled pass over the codes against what reading them once takes."""
    cuda = torch.cuda.is_available()
    case = Case.parse(PRODUCTION if cuda else PRODUCTION.replace("h7168.i512", "h512.i128"))
    inputs, timer = make_inputs(case, "cuda" if cuda else "cpu"), synchronized if cuda else timed
    drawn = [(*inputs.gate_up(e), inputs.down(e)) for e in range(case.shape.experts)]
    stacked = tuple(fused.stack([q for q in half if q is not None]) for half in zip(*drawn, strict=True))
    activation, active = ACTIVATIONS[case.activation], inputs.topk_ids.unique()
    fmt = get(case.recipe.weights)
    experts = Experts(
        case.shape.experts, lambda e: ExpertWeights(*(fmt.decode(q) for q in drawn[e] if q is not None)), activation
    )
    fused.moe(inputs.x, inputs.routing, stacked, activation)  # compiles
    seconds = min(timer(lambda: fused.moe(inputs.x, inputs.routing, stacked, activation)) for _ in range(3))
    eager = min(timer(lambda: moe(inputs.x, inputs.routing, experts)) for _ in range(2))
    held = sum(t[0].numel() * t.element_size() for w in stacked for t in (w.codes, w.scales)) * len(active)
    copied = torch.empty(2**32 if cuda else 2**28, dtype=torch.uint8, device=inputs.device)
    rate = 2 * copied.numel() / min(timer(copied.clone) for _ in range(5))
    share = held / rate / seconds
    console.print(f"few rows: {case.id}: {len(active)} active experts, {held / 1e6:.0f} MB of codes and scales, a byte a code")
    console.print(
        f"few rows: fused {seconds:.4f} s, expert by expert {eager:.4f} s; reading takes {share:.2f} of the fused time"
    )


def encoders() -> None:
    """MB of bf16 input per second of every format's encoder, all its rules, the slowest rule of each format."""
    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.randn(ENCODED_ROWS, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    megabytes = x.numel() * x.element_size() / 1e6
    rates = {}
    for fmt in all_formats().values():
        scale = fmt.fit_global_scale(x)
        for rule in fmt.rules():
            rule.encode(x[:8], scale if scale is None or scale.dim() == 0 else scale[:8])
            rates[rule.name] = megabytes / min(timed(partial(rule.encode, x, scale)) for _ in range(3))
    slow = sorted(rates, key=rates.__getitem__)[:4]
    median = statistics.median(rates.values())
    worst = ", ".join(f"{name} {rates[name]:.0f}" for name in slow)
    console.print(f"encoders: {len(rates)} rules, median {median:.0f} MB/s of bf16 input; slowest: {worst}")


def synchronized(call: Callable[[], object]) -> float:
    """Seconds of one call on the GPU."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    production()  # first: it reports the peak memory of this process
    isolation()
    recording()
    replacement()
    crashes()
    encoders()
    reference_layer()
    few_rows()
    device_layer()
