"""START HERE: run(case, backend, device) -> Verdict. One case, one subject, in this process.

    support -> inputs -> oracle -> prepare -> launch (twice) -> compare -> checks -> diagnosis

An exception of the subject is a verdict; an exception of ours propagates. Crashes and hangs are the worker's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.backends.base import Backend, Device, Launch, checked_probe
from harness.case import Case
from harness.checks import malformed, mutated, snapshot, unstable, untrusted
from harness.compare import compare
from harness.diagnose import diagnose
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass
class Progress:
    """Where the case is, told to the supervisor so that a death has a stage."""

    report: Callable[[Stage], None] = lambda stage: None
    stage: Stage = Stage.SUPPORT

    def at(self, stage: Stage) -> None:
        """Enter a stage."""
        self.stage = stage
        self.report(stage)


@dataclass
class OracleCache:
    """Inputs of the last case and its expectation per declared rounding: neighbours in a plan share them, until one of
    them fails: it may have written where it should not."""

    key: tuple[str, str] | None = None
    inputs: Inputs | None = None
    expected: dict[object, Expected] = field(default_factory=dict)

    def forget(self) -> None:
        """Draw everything anew for the next case."""
        self.key, self.inputs, self.expected = None, None, {}

    def get_inputs(self, case: Case, device: Device) -> Inputs:
        """The case's inputs, made once for consecutive subjects."""
        if self.key != (case.id, device.kind) or self.inputs is None:
            self.key, self.expected = (case.id, device.kind), {}
            self.inputs = make_inputs(case, device.kind)
        return self.inputs

    def get_expected(self, case: Case, inputs: Inputs, backend: Backend) -> Expected:
        """The expectation under the backend's rounding points."""
        rounding = backend.rounding(case)
        if rounding not in self.expected:
            self.expected[rounding] = expect(case, inputs, rounding)
        return self.expected[rounding]


def run(
    case: Case, backend: Backend, device: Device, progress: Progress | None = None, cache: OracleCache | None = None
) -> Verdict:
    """Judge one case on one subject."""
    started = time.perf_counter()
    progress, cache = progress or Progress(), cache or OracleCache()
    try:
        verdict = _judge(case, backend, device, progress, cache)
    except _SubjectError as caught:
        verdict = _died(case, backend, progress.stage, caught.error)
    if verdict.status.failed:
        cache.forget()
    return replace(verdict, seconds=round(time.perf_counter() - started, 4))


class _SubjectError(Exception):
    """Carries what the subject raised past our own code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def _subject(call: Callable[[], object]) -> object:
    """Run the subject's code; whatever it raises, sys.exit included, is its verdict."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _SubjectError(error) from error


def _died(case: Case, backend: Backend, stage: Stage, error: BaseException) -> Verdict:
    status = Status.OUT_OF_MEMORY if isinstance(error, OUT_OF_MEMORY) else Status.CRASHED
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    kind = type(error).__name__
    finding = Finding("exception", f"{kind} after the backend said yes: {text}", {"type": kind, "message": str(error)[:2000]})
    return Verdict(case.id, backend.name, status, stage, f"{kind}: {text}", (finding,))


def _judge(case: Case, backend: Backend, device: Device, progress: Progress, cache: OracleCache) -> Verdict:
    progress.at(Stage.SUPPORT)
    for support in (backend.supports(case, device), checked_probe(backend, device)):
        if not support.ok:
            status = Status.UNSUPPORTED if support.kind == "case" else Status.UNAVAILABLE
            return Verdict(case.id, backend.name, status, Stage.SUPPORT, support.reason)
    progress.at(Stage.INPUTS)
    inputs = cache.get_inputs(case, device)
    progress.at(Stage.ORACLE)
    expected = cache.get_expected(case, inputs, backend)
    if reason := untrusted(case, expected):
        return Verdict(case.id, backend.name, Status.UNTRUSTED, Stage.ORACLE, reason)
    progress.at(Stage.PREPARE)
    launch = _subject(lambda: backend.prepare(case, inputs))
    if not isinstance(launch, Launch):
        text = f"prepare() must return a Launch, got {type(launch).__name__}"
        return Verdict(case.id, backend.name, Status.CONTRACT, Stage.PREPARE, text, (Finding("prepare", text),))
    before = snapshot(inputs, launch)
    progress.at(Stage.LAUNCH)
    first = _subject(lambda: _launch(launch, device))
    if finding := malformed(case, first, device):
        return Verdict(case.id, backend.name, Status.MALFORMED, Stage.LAUNCH, finding.text, (finding,))
    assert isinstance(first, Tensor)
    output = first.detach().cpu().clone()
    finding = mutated(before, inputs, launch)
    if finding is None and backend.deterministic:
        second = _subject(lambda: _launch(launch, device))
        finding = mutated(before, inputs, launch) or unstable(output, second)
    progress.at(Stage.COMPARE)
    return _conclude(case, backend, expected, output, [] if finding is None else [finding])


def _launch(launch: Launch, device: Device) -> object:
    output = launch.call()
    if device.kind == "cuda":
        torch.cuda.synchronize()  # so that a device error is this call's, not the next one's
    return output


def _conclude(case: Case, backend: Backend, expected: Expected, output: Tensor, findings: list[Finding]) -> Verdict:
    comparison = compare(expected, output)
    diagnosis = None if comparison.agrees else diagnose(expected, output, comparison)
    status = _status(comparison, findings)
    reason = _reason(comparison, diagnosis, findings)
    return Verdict(case.id, backend.name, status, Stage.DONE, reason, tuple(findings), comparison, diagnosis)


def _status(comparison: Comparison, findings: list[Finding]) -> Status:
    """Corrupting beats wrong: a changed input explains wrong values. Wrong beats unstable."""
    checks = {f.check for f in findings}
    if "input_mutated" in checks:
        return Status.CORRUPTING
    if not comparison.agrees:
        return Status.WRONG
    return Status.UNSTABLE if checks else Status.PASSED


def _reason(comparison: Comparison, diagnosis: Diagnosis | None, findings: list[Finding]) -> str:
    parts = [f.text for f in findings]
    if diagnosis is not None:
        share = f"{comparison.beyond} of {comparison.total} elements beyond the bound"
        measure = "ratio" if comparison.lane == "ratio" else "z"
        if comparison.beyond == 0:
            share = f"mean z^2 {comparison.mean_z2:.3f} exceeds {comparison.mean_z2_limit:.3f}"
        parts.append(f"{diagnosis.kind}: {diagnosis.text} [{share}, worst {measure} {comparison.worst:.3g}]")
    return "; ".join(parts)
