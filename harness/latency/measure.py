"""In the child: one prepared subject, called and timed. Steps of its data rotate, caches are flushed before every call.

Method, in the order of preference: `graph`, CUDA events around the replay of a captured call; `events`, CUDA events around
the call, which then counts the host's gaps too; `clock`, perf_counter_ns on a CPU. Modelled on triton.testing.do_bench
(events, a flush before each call) and DeepGEMM's bench; unlike them the flush reads: dirty lines of a cleared buffer would be
written back during the timed call. Between the first and the last event of a slot nothing waits for the device.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from harness.backends.base import Backend, Device, Launch
from harness.case import Case
from harness.inputs import Inputs, make_inputs
from harness.latency import clocks
from harness.latency.overlay import refusal
from harness.latency.statistics import typical
from harness.relations import step
from harness.subject import SubjectError, guarded, same
from harness.worker.protocol import Message

ROTATIONS = 4  # steps of the same layer, other tokens and routing each
FLUSH = {"cuda": 4, "cpu": 2}  # times the L2 that is read between two calls, so that nothing stays whatever its policy is
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")  # a core's own; the shared L3 is nobody's to flush
CPU_CACHE_BYTES = 1 << 21  # where the system does not say
UNTIMED = 2  # calls at the head of a slot: the card was another process's
WINDOW, AGREE = 4, 0.02  # steady: so many windows of one rotation within 2 %
WARM_S = {"cuda": 1.0, "cpu": 0.3}  # given up after: an H200 boosts within milliseconds, a shared core never rests
MATMUL = {"cuda": 8192, "cpu": 512}  # a square product that fills an H200 (790 TFLOP/s were seen at 8192); 30 ms of one core
COPIED = {"cuda": 1 << 30, "cpu": 1 << 25}  # bytes: many times the L2
CEILING_RUNS = 10  # the best of them is the ceiling


def answer(held: dict[str, Stopwatch], backend: Backend, device: Device, request: Message) -> Message:
    """The reply to one request of a Timer; what the subject raises is told as its problem."""
    asked = request["latency"]
    try:
        if asked == "ceilings":
            return {"timed": ceilings(device, str(request["dtype"]))}
        if asked == "prepare":
            why, notes = refusal(str(request.get("overlay", "")), backend.library)
            if why:
                return {"problem": why}
            held.clear()
            case, graph = Case.parse(str(request["case"])), bool(request["graph"])
            held["now"] = guarded(lambda: Stopwatch(backend, device, case, graph))
            return {"timed": {**held["now"].facts, "notes": [*notes, *held["now"].facts["notes"]]}}
        if asked == "warm":
            return {"timed": guarded(held["now"].warm)}
        return {"timed": guarded(lambda: held["now"].slot(int(request["calls"])))}
    except SubjectError as caught:
        return {"problem": f"{type(caught.error).__name__}: {str(caught.error).strip()[:500]}"}


class Stopwatch:
    """A subject bound to the weights of a case; `slot` times its calls. The case's data is dense: an exact case's sparse
    integers would be faster than what people serve."""

    def __init__(self, backend: Backend, device: Device, case: Case, graph: bool = True) -> None:
        self._device, self._notes = device, list[str]()
        case = case.vary(fill="real") if case.fill != "real" else case
        given = make_inputs(case, device.kind)
        launch = backend.prepare(case, given)
        if not isinstance(launch, Launch):
            raise TypeError(f"prepare() must return a Launch, got {type(launch).__name__}")
        self._launch, self._steps = launch, _steps(given, launch, self._notes)
        self._flushed = _flush_buffer(device)
        self._call, self.method = self._fastest(backend, graph)
        reached = [len(s.topk_ids.unique()) for s in self._steps] if case.op in ("moe", "route") else [0]
        self.facts: Message = {"method": self.method, "experts": sum(reached) / len(reached), "fill": case.fill}
        self.facts |= {"flush_mib": self._flushed.nbytes >> 20, "rotations": len(self._steps), "notes": self._notes}

    def _fastest(self, backend: Backend, graph: bool) -> tuple[Callable[[], object], str]:
        """The replay of a graph where one can be captured and gives what the call gives."""
        direct = self._launch.call()
        if self._device.kind == "cpu":
            return self._launch.call, "clock"
        torch.cuda.synchronize()
        if why := backend.exempt.get("graph", "" if graph else "it was not asked for"):
            self._notes.append(f"no graph: {why}")
            return self._launch.call, "events"
        try:
            replay = self._launch.capture() if self._launch.capture is not None else _graph(self._launch.call)
            replayed = replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            self._notes.append(f"no graph: {str(error).strip().splitlines()[0][:200]}")
            return self._launch.call, "events"
        if backend.deterministic and not same(direct, replayed):
            self._notes.append("no graph: its replay gives other bits than the call")
            return self._launch.call, "events"
        return replay, "graph"

    def warm(self) -> Message:
        """Call until WINDOW rotations in a row agree, for WARM_S at most."""
        started, seen = time.monotonic(), list[float]()
        rotations = len(self._steps)
        while time.monotonic() - started < WARM_S[self._device.kind] or len(seen) < WINDOW:
            seen.append(typical(self._times(rotations), rotations, lowest=self._device.kind == "cpu"))
            if len(seen) >= WINDOW and max(seen[-WINDOW:]) - min(seen[-WINDOW:]) < AGREE:
                return {"steady": True, "us": self._times(rotations)}
        return {"steady": False, "us": self._times(rotations)}

    def slot(self, calls: int) -> Message:
        """UNTIMED calls, then `calls` timed ones, call i on step i % rotations: microseconds each, and the clock."""
        gc.disable()  # a collection in the middle would be one call's
        try:
            self._times(UNTIMED)
            times = self._times(calls)
        finally:
            gc.enable()
        return {"us": times, "clock": asdict(self._clock)}

    def _times(self, calls: int) -> list[float]:
        return self._on_device(calls) if self._device.kind == "cuda" else self._on_host(calls)

    def _on_host(self, calls: int) -> list[float]:
        found = []
        for i in range(calls):
            self._next(i)
            started = time.perf_counter_ns()
            self._call()
            found.append((time.perf_counter_ns() - started) / 1e3)
        self._clock = clocks.Clock()
        return found

    def _on_device(self, calls: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for i, (start, end) in enumerate(events):
            self._next(i)
            start.record()
            self._call()
            end.record()
        self._clock = clocks.look(str(torch.cuda.get_device_properties(0).uuid))  # the card is still busy
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def _next(self, call: int) -> None:
        step(self._launch, self._steps[call % len(self._steps)])
        self._flushed.sum()


def _steps(given: Inputs, launch: Launch, notes: list[str]) -> list[Inputs]:
    """Other tokens and routing for the layer `given`, made and routed ahead of time."""
    if "x" not in launch.buffers and "logits" not in launch.buffers:
        notes.append("its step buffers are not named: every call reads the same tokens")
        return [given]
    found = [make_inputs(given.case, given.device, variant=f"/latency{i}") for i in range(ROTATIONS)]
    for inputs in found if given.case.op == "moe" else ():
        assert len(inputs.routing.ids) == given.case.shape.tokens  # routed here, not between two calls
    return found


def _flush_buffer(device: Device) -> Tensor:
    if device.kind == "cuda":
        size = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        text = CPU_CACHE.read_text().strip() if CPU_CACHE.exists() else ""
        size = int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else CPU_CACHE_BYTES
    return torch.ones(FLUSH[device.kind] * size // 4, dtype=torch.float32, device=device.kind)


def _graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # lazy initialisation must not happen inside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def ceilings(device: Device, dtype: str) -> dict[str, float]:
    """Measured here and now: bytes per second of a copy (read and written ones count), floating-point operations per second
    of a square matrix product of random values in `dtype`, a name of torch. The best of CEILING_RUNS."""
    kind, size = device.kind, MATMUL[device.kind]
    a, b = (torch.randn(size, size, device=kind).to(getattr(torch, dtype)) for _ in range(2))
    source = torch.randint(256, (1 << 20,), dtype=torch.uint8, device=kind).repeat(COPIED[kind] >> 20)
    target = torch.empty_like(source)
    copy, matmul = _best(lambda: target.copy_(source), kind), _best(lambda: a @ b, kind)
    return {"bytes_per_s": 2 * COPIED[kind] / copy, "flops_per_s": 2 * size**3 / matmul}


def _best(call: Callable[[], object], kind: str) -> float:
    """Seconds of the fastest of CEILING_RUNS calls, two untimed ones before them."""
    found = []
    for _ in range(CEILING_RUNS + UNTIMED):
        if kind == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[UNTIMED:])
