"""START HERE: run(case, backend, device) -> Verdict. One case, one subject, in this process.

    support -> inputs -> oracle -> prepare -> launch (twice, two poisons) -> compare -> relations -> diagnosis

An exception of the subject is a verdict; an exception of ours propagates. Crashes and hangs are the worker's business.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harness.backends.base import Backend, Device, checked_probe
from harness.case import Case
from harness.checks import STATUS, Snapshot, mutated, overrun, repeated, snapshot, untrusted
from harness.compare import compare
from harness.diagnose import diagnose
from harness.entry import recording
from harness.guard import Violation
from harness.inputs import Inputs, make_inputs
from harness.memory import NAN, RedZones, poisoned
from harness.named import named
from harness.op_symptoms import describe
from harness.oracle import Expected, expect
from harness.relations import chosen
from harness.repeats import unrepeatable
from harness.subject import Subject, SubjectError, guarded, malformed, prepared, synchronised
from harness.variants import copied, judged_on
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc|Failed to allocate memory"
)  # torch, C++, ORT


@dataclass
class Progress:
    """Where the case is, told to the supervisor so that a death has a stage; `show` may draw what was judged."""

    report: Callable[[Stage], None] = lambda stage: None
    show: Callable[[Expected, Tensor, Verdict], Verdict] = lambda expected, output, verdict: verdict
    stage: Stage = Stage.SUPPORT

    def at(self, stage: Stage) -> None:
        """Enter a stage."""
        self.stage = stage
        self.report(stage)


@dataclass(frozen=True)
class Options:
    """checks: how many relations to ask of a case, None for all that apply; rules(subject): what other acceptance rules say
    of the first call's output, for the record only; zones: red zones around the buffers, which a sanitizer would take for
    memory that the kernel may use; repeats: bare calls at the end, each to give the first one's bits."""

    checks: int | None = None
    rules: Callable[[Subject], dict[str, bool]] | None = None
    zones: bool = True
    repeats: int = 0


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

    def get_inputs(self, case: Case, device: Device, backend: Backend) -> Inputs:
        """The case's inputs, made once for consecutive subjects."""
        if backend.recorded is not None:
            self.forget()
            return backend.recorded(device.kind)
        if self.key != (case.id, device.kind) or self.inputs is None:
            self.key, self.expected = (case.id, device.kind), {}
            self.inputs = make_inputs(case, device.kind)
        return self.inputs

    def get_expected(self, case: Case, inputs: Inputs, backend: Backend) -> Expected:
        """The expectation under the backend's rounding points."""
        rounding = backend.rounding(case)
        if rounding not in self.expected:
            self.expected[rounding] = expect(case, judged_on(inputs), rounding)
        return self.expected[rounding]


def run(
    case: Case,
    backend: Backend,
    device: Device,
    progress: Progress | None = None,
    cache: OracleCache | None = None,
    options: Options | None = None,
) -> Verdict:
    """Judge one case on one subject."""
    started = time.perf_counter()
    progress, cache = progress or Progress(), cache or OracleCache()
    with recording() as returned:
        try:
            verdict = _judge(case, backend, device, progress, cache, options or Options())
        except SubjectError as caught:
            verdict = _died(case, backend, progress.stage, caught.error)
    if verdict.status.failed:
        cache.forget()
    return replace(verdict, seconds=round(time.perf_counter() - started, 4), returned=returned)


def _died(case: Case, backend: Backend, stage: Stage, error: BaseException) -> Verdict:
    if isinstance(error, Violation):
        return Verdict(case.id, backend.name, Status.CONTRACT, stage, str(error), error.findings)
    status = Status.OUT_OF_MEMORY if isinstance(error, OUT_OF_MEMORY) or NO_MEMORY.search(str(error)) else Status.CRASHED
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    kind = type(error).__name__
    finding = Finding("exception", f"{kind} after the backend said yes: {text}", {"type": kind, "message": str(error)[:2000]})
    return Verdict(case.id, backend.name, status, stage, f"{kind}: {text}", (finding,))


def _judge(case: Case, backend: Backend, device: Device, progress: Progress, cache: OracleCache, options: Options) -> Verdict:
    progress.at(Stage.SUPPORT)
    for support in (backend.supports(case, device), checked_probe(backend, device)):
        if not support.ok:
            status = Status.UNSUPPORTED if support.kind == "case" else Status.UNAVAILABLE
            return Verdict(case.id, backend.name, status, Stage.SUPPORT, support.reason)
    progress.at(Stage.INPUTS)
    inputs = cache.get_inputs(case, device, backend)
    progress.at(Stage.ORACLE)
    expected = cache.get_expected(case, inputs, backend)
    reason = untrusted(case, expected)
    if reason and not inputs.recorded:
        return Verdict(case.id, backend.name, Status.UNTRUSTED, Stage.ORACLE, reason)
    progress.at(Stage.PREPARE)
    given = copied(inputs)
    launch = prepared(backend, given, device)
    zones = RedZones()
    zones.move(dict(launch.buffers) if options.zones else {})
    before = snapshot(given, launch)
    progress.at(Stage.LAUNCH)
    with poisoned(NAN, device):
        first = guarded(lambda: synchronised(launch.call, device))
    if finding := malformed(case, first, device):
        return Verdict(case.id, backend.name, Status.MALFORMED, Stage.LAUNCH, finding.text, (finding,))
    assert isinstance(first, Tensor)
    subject = Subject(case, backend, device, inputs, expected, launch, first, first.detach().cpu().clone())
    findings = _memory(subject, zones, before, given)
    progress.at(Stage.COMPARE)
    comparison = compare(expected, subject.result)
    if comparison.agrees and not findings:
        progress.at(Stage.RELATIONS)
        findings = _relations(subject, options)
    verdict = _conclude(subject, comparison, findings)
    if reason:  # recorded data is what it is: a wrong output is wrong, a right one says less
        verdict = replace(verdict, notes=(*verdict.notes, Finding("weak_data", f"this data cannot tell everything: {reason}")))
    if options.rules is not None and case.op == "moe" and case.shape.tokens:
        verdict = replace(verdict, rules=options.rules(subject))
    return progress.show(expected, subject.result, verdict)


def _memory(subject: Subject, zones: RedZones, before: Snapshot, given: Inputs) -> list[Finding]:
    """What the first call and a second one left behind; the first kind of damage explains the rest."""

    def damage() -> Finding | None:
        return mutated(before, given, subject.launch) or overrun(zones)

    finding = damage()
    if finding is None and subject.backend.deterministic:
        finding = repeated(subject, zones) or damage()
    return [] if finding is None else [finding]


def _relations(subject: Subject, options: Options) -> list[Finding]:
    for check in chosen(subject, options.checks):
        if finding := check.run(subject):
            return [finding]
    finding = unrepeatable(subject, options.repeats)
    return [] if finding is None else [finding]


def _conclude(subject: Subject, comparison: Comparison, findings: list[Finding]) -> Verdict:
    diagnosis = None
    if not comparison.agrees:
        diagnosis = _diagnosed(subject, comparison, findings)
    status = _status(comparison, findings)
    reason = _reason(comparison, diagnosis, findings)
    name = subject.backend.name
    return Verdict(subject.case.id, name, status, Stage.DONE, reason, tuple(findings), comparison, diagnosis)


def _diagnosed(subject: Subject, comparison: Comparison, findings: list[Finding]) -> Diagnosis:
    if subject.case.op != "moe":
        return describe(subject.case, subject.expected, subject.result, comparison)
    diagnosis = diagnose(subject.expected, subject.result, comparison, findings)
    return named(diagnosis, subject.expected, subject.result)


def _status(comparison: Comparison, findings: list[Finding]) -> Status:
    """Corrupting beats wrong: a changed input explains wrong values. Wrong beats unstable."""
    found = {STATUS[f.check] for f in findings}
    if Status.CORRUPTING in found:
        return Status.CORRUPTING
    if not comparison.agrees or Status.WRONG in found:
        return Status.WRONG
    return Status.UNSTABLE if found else Status.PASSED


def _reason(comparison: Comparison, diagnosis: Diagnosis | None, findings: list[Finding]) -> str:
    parts = [f.text for f in findings]
    if diagnosis is not None:
        share = f"{comparison.beyond} of {comparison.total} elements beyond the bound"
        measure = "ratio" if comparison.lane == "ratio" else "z"
        if comparison.beyond == 0:
            share = f"mean z^2 {comparison.mean_z2:.3f} exceeds {comparison.mean_z2_limit:.3f}"
        parts.append(f"{diagnosis.kind}: {diagnosis.text} [{share}, worst {measure} {comparison.worst:.3g}]")
    return "; ".join(parts)
