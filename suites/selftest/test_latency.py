"""The latency lane on a CPU: what is timed, in which state, what a line says, and that no verdict notices."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import journal
from harness.backends import load_file, torch_grouped_mm
from harness.backends.base import CPU, Launch
from harness.case import Case
from harness.errors import TimingError
from harness.inputs import Inputs, make_inputs
from harness.latency import clocks, lane, record
from harness.latency.clocks import Clock
from harness.latency.measure import ROTATIONS, Stopwatch
from harness.latency.record import Timing
from harness.latency.work import work
from harness.plan import Plan, Request
from harness.select import Item
from harness.verdict import Comparison, Stage, Status, Verdict

CASE = Case.parse("moe.bf16.t3.h64.i64.e4.k2.renormalize.swiglu.standard.real.s0")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PADDED = str(EXAMPLES / "padded_kernels.py")
(GROUPED,) = torch_grouped_mm.BACKENDS
ZEROS = """
from dataclasses import replace
import torch
from harness.backends.torch_grouped_mm import BACKENDS, prepare
def empty(case, inputs):
    launch = prepare(case, inputs)
    return replace(launch, call=lambda: torch.zeros_like(launch.buffers["x"]))
BACKENDS = (replace(BACKENDS[0], name="fast_zeros", prepare=empty, script=None),)
"""
DIES = """
import os
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as (GOOD,), prepare
def dying(case, inputs):
    launch, seen = prepare(case, inputs), []
    def call():
        seen.append(1)
        if len(seen) > 8:
            os.abort()
        return launch.call()
    return replace(launch, call=call)
BACKENDS = (replace(GOOD, name="dies_at_the_ninth", prepare=dying, script=None),)
""".replace("BACKENDS as (GOOD,), prepare", "BACKENDS, prepare\n(GOOD,) = BACKENDS")


def test_a_run_times_what_passed_and_its_verdicts_do_not_change(moecheck: Callable[..., object], tmp_path: Path) -> None:
    """One that is wrong is fast for free: a kernel that returns zeros beats every other."""
    folder, plugin = tmp_path / "run", tmp_path / "zeros.py"
    plugin.write_text(ZEROS)
    chosen = ("--case", CASE.id, "--platform", "cpu", "--plugin", str(plugin))
    both = ("--backend", "torch_grouped_mm", "--backend", "fast_zeros")
    answer = moecheck("run", *chosen, *both, "--latency", "--out", str(folder))
    assert answer.code == 1, answer  # type: ignore[attr-defined]
    (timing,) = record.read(folder)
    assert (timing.case_id, timing.subject, timing.fill, timing.method) == (CASE.id, "torch_grouped_mm", "real", "clock")
    assert 0 < timing.p05_us <= timing.low_us <= timing.median_us <= timing.high_us <= timing.p95_us * 10
    assert timing.rotations == ROTATIONS
    assert timing.flops == 2 * 3 * 6 * 64 * 64
    assert timing.flops_share == pytest.approx(timing.flops / (timing.median_us / 1e6) / timing.flops_per_s, abs=1e-4)
    assert timing.environment["torch"] == torch.__version__
    verdicts, lines = journal.read(folder), (folder / record.NAME).read_bytes()
    assert {v.subject: v.status for v in verdicts} == {"torch_grouped_mm": Status.PASSED, "fast_zeros": Status.WRONG}
    moecheck("run", "--resume", str(folder), "--latency")
    assert (folder / record.NAME).read_bytes() == lines, "a timed case was timed again"
    assert journal.read(folder) == verdicts


def test_a_kernel_that_dies_while_it_is_timed_is_a_line_too(tmp_path: Path) -> None:
    plugin = tmp_path / "dies.py"
    plugin.write_text(DIES)
    timing = lane.Lane(CPU, (str(plugin),), tmp_path, 60.0).time(Item(CASE.id, "dies_at_the_ninth"))
    assert timing.problem == "dies_at_the_ninth: killed by SIGABRT while it was timed"
    assert timing.median_us == 0
    record.append(tmp_path, timing)
    assert record.read(tmp_path) == [timing]


def test_every_call_sees_other_data_than_the_last_and_never_zeros() -> None:
    """A loop over one input times a warm cache, and zeros draw less power than what people serve."""
    seen: list[torch.Tensor] = []

    def prepare(case: Case, inputs: Inputs) -> Launch:
        launch = torch_grouped_mm.prepare(case, inputs)

        def call() -> torch.Tensor:
            seen.append(torch.cat([launch.buffers[n].flatten().float() for n in ("x", "ids", "topk_weights")]))
            return launch.call()

        return replace(launch, call=call)

    watch = Stopwatch(replace(GROUPED, prepare=prepare), CPU, CASE.vary(fill="exact"))
    seen.clear()
    times = watch.slot(ROTATIONS * 2)["us"]
    assert len(times) == ROTATIONS * 2
    timed = seen[-ROTATIONS * 2 :]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(timed))
    assert all(torch.equal(a, b) for a, b in zip(timed, timed[ROTATIONS:], strict=False))
    assert all((x[: 3 * 64] != 0).float().mean() > 0.99 for x in timed)
    assert watch.facts["fill"] == "real"
    assert watch.facts["experts"] > CASE.shape.top_k


def test_a_subject_that_hides_its_buffers_is_told_of() -> None:
    hidden = replace(GROUPED, prepare=lambda case, inputs: replace(torch_grouped_mm.prepare(case, inputs), buffers={}))
    facts = Stopwatch(hidden, CPU, CASE).facts
    assert facts["rotations"] == 1
    assert facts["notes"] == ["its step buffers are not named: every call reads the same tokens"]


@pytest.mark.parametrize(
    ("case", "experts", "flops", "size"),
    [
        (CASE, 3.0, 2 * 6 * 64 * 64 * 3, 3 * (3 * 64 * 64 * 2) + 2 * 3 * 64 * 2 + 6 * 8),
        (CASE.vary(activation="relu"), 3.0, 2 * 6 * 64 * 64 * 2, 3 * (2 * 64 * 64 * 2) + 2 * 3 * 64 * 2 + 6 * 8),
        # MXFP4: half a byte a code and a byte for each 32 of a row
        (CASE.vary(recipe="mxfp4"), 4.0, 2 * 6 * 64 * 64 * 3, 4 * 3 * (64 * 32 + 64 * 2) + 2 * 3 * 64 * 2 + 6 * 8),
        (Case.parse("activate.bf16.t5.i96.swiglu.real.s0"), 0.0, 0.0, 5 * 96 * 3 * 2),
        (Case.parse("quantize.mxfp4.t5.h64.real.s0"), 0.0, 0.0, 5 * 64 * 2 + 5 * 32 + 5 * 2),
        (Case.parse("route.fp32.t5.e8.k2.renormalize.real.s0"), 0.0, 0.0, 5 * 8 * 4 + 10 * 8),
    ],
    ids=lambda v: v.id if isinstance(v, Case) else "",
)
def test_the_work_of_a_case_is_what_it_must_do_at_least(case: Case, experts: float, flops: float, size: float) -> None:
    assert (work(case, experts).flops, work(case, experts).bytes) == (flops, size)


def passed(case: Case, subject: str) -> Verdict:
    fine = Comparison("real", 10, 0, 1.0, 6.0, 1.0, 1.5, 0.0, 0, 0, ())
    return Verdict(case.id, subject, Status.PASSED, Stage.DONE, comparison=fine)


def planned(cases: tuple[str, ...], verdicts: list[Verdict]) -> list[str]:
    request = Request("cpu", "ci", cases=cases)
    return [i.case_id for i in lane.chosen(Plan(request, 60.0, ()), verdicts)]


def test_production_rows_are_timed_once_and_small_cases_only_when_named() -> None:
    """smoke and ci hold a row of mixtral_8x7b over 8 ranks with 4 experts: hidden 4096, inter 1792."""
    served = Case.parse("moe.bf16.t1.h4096.i1792.e4.k2.renormalize.swiglu.standard.exact.s0")
    verdicts = [passed(served, "a"), passed(served.vary(fill="real"), "a"), passed(served, "b"), passed(CASE, "a")]
    wrong = Verdict(served.vary(tokens=17).id, "a", Status.CRASHED, Stage.LAUNCH, "died")
    assert planned((), [*verdicts, wrong]) == [served.vary(fill="real").id, served.id]
    assert planned((CASE.id,), [passed(CASE, "a"), passed(CASE.vary(tokens=0), "a")]) == [CASE.id]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("{}", "case_id"),
        ('{"case_id": "a", "subject": "b", "schema": 9}', "schema 9"),
        ('{"case_id": "a", "subject": "b", "median_us": NaN}', "NaN"),
        ('{"case_id": "a", "subject": "b", "median_us": "fast"}', "median_us"),
    ],
)
def test_a_line_that_is_none_is_a_clear_error(tmp_path: Path, line: str, hint: str) -> None:
    record.append(tmp_path, Timing("a", "b"))
    with (tmp_path / record.NAME).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TimingError, match=rf"latency.jsonl:2: not a timing: .*{hint}"):
        record.read(tmp_path)


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    record.append(tmp_path, Timing("a", "b", median_us=1.5))
    with (tmp_path / record.NAME).open("a") as file:
        file.write('{"case_id": "c", "sub')
    assert [t.case_id for t in record.read(tmp_path)] == ["a"]
    record.append(tmp_path, Timing("d", "b"))
    assert [t.case_id for t in record.read(tmp_path)] == ["a", "d"]
    assert json.loads((tmp_path / record.NAME).read_text().splitlines()[1])["case_id"] == "d"


class Nvml:
    """As much of pynvml as is asked."""

    NVML_CLOCK_SM, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 1, 0
    NVMLError = OSError

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return 1755

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetTotalEccErrors(self, handle: object, kind: int, counter: int) -> int:
        raise OSError("not supported")


def test_a_clock_that_is_held_down_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_card", lambda uuid: (Nvml(), object()))
    seen = clocks.look("x")
    assert seen == Clock((1755, 1755), ("power cap", "thermal slowdown (hardware)"), -1)
    both = clocks.together([Clock(), Clock((1980, 1980), (), 0), seen])
    assert both == Clock((1755, 1980), seen.throttled, 0)
    assert not both.steady
    assert seen.steady
    assert clocks.together([Clock()]) == Clock()


def test_padded_kernels_are_right_and_do_more() -> None:
    """What the lane is to see must be nothing that the judge sees."""
    module = load_file(PADDED)
    padded = {b.name: b for b in module.BACKENDS}["torch_grouped_mm_padded"]
    case = CASE.vary(tokens=40)
    calls: list[int] = []
    layer = torch_grouped_mm.layer

    def counted(buffers: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        calls.append(len(buffers["x"]))
        return layer(buffers, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_grouped_mm, "layer", counted)
        first = padded.prepare(case, make_inputs(case)).call()
        second = GROUPED.prepare(case, make_inputs(case)).call()
    assert torch.equal(first, second)
    assert calls == [42, 40]
