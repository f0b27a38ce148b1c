"""A child died or fell silent: the facts, and what they are called."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.case import Case
from harness.verdict import Finding, Stage, Status, Verdict
from harness.worker.coredump import Facts
from harness.worker.hang import FRAME
from harness.worker.log import tail

NEAR = 0.9  # of the memory limit: between two looks at a growing process it can take the rest
FRAMES = 100  # CPython's Python/traceback.c, MAX_FRAME_DEPTH: faulthandler prints no more of a stack
NO_MEMORY = re.compile(r"std::bad_alloc|MemoryError|out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)
ALARMS = (
    r"CUDA error",
    r"Segmentation fault",
    r"terminate called",
    r"Assertion .* failed",
    r"double free or corruption|malloc\(\): |free\(\): |corrupted size|stack smashing detected",  # glibc
    r"illegal memory access|unspecified launch failure|misaligned address",  # CUDA runtime, cudaGetErrorString
)


@dataclass(frozen=True)
class Death:
    """The last of a child. exit_code: as subprocess has it, a signal negative, None where it lives on; hang: where, "" if
    it did not; link: what was wrong with its replies; resident: bytes when last seen; oom_kills: by the system, meanwhile;
    gpu: what the device said."""

    stage: Stage
    exit_code: int | None
    hang: str = ""
    link: str = ""
    output: str = ""
    resident: int = 0
    oom_kills: int = 0
    gpu: Facts | None = None

    @property
    def signature(self) -> tuple[bool, int | None, bool]:
        """What makes two deaths the same: hung or not, the signal or exit code, garbage in the pipe or not."""
        return bool(self.hang), None if self.hang else self.exit_code, self.link.startswith("corrupted")


def how(death: Death) -> str:
    """The way it died, in words that the facts carry."""
    if death.link.startswith("corrupted"):
        return death.link
    if death.exit_code is None:
        return f"it lives on, but its pipe is {death.link or 'closed'}"
    if death.exit_code < 0:
        text = f"killed by {_signal(-death.exit_code)}"
        return f"{text}, {deep}" if (deep := _deep(death.output)) and death.exit_code == -signal.SIGSEGV else text
    if death.exit_code == os.EX_IOERR and not death.output:
        return "something closed the worker's pipe under it"
    return f"the process exited with code {death.exit_code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _deep(output: str) -> str:
    """A stack overflow leaves a Python stack as long as faulthandler prints, most of it one function."""
    names = [frame["name"] for frame in FRAME.finditer(output)]
    repeated = max(names, key=names.count, default="")
    if len(names) < FRAMES or names.count(repeated) < FRAMES // 2:
        return ""
    return f"a stack overflow: {names.count(repeated)} of the {len(names)} innermost Python frames are {repeated}"


def last_words(output: str) -> str:
    """The last lines that are neither a stack nor faulthandler's: what a library said before it aborted."""
    said = []
    for line in output.splitlines():
        if line.startswith("Fatal Python error") or "(most recent call first)" in line:
            break
        said.append(line.strip())
    return " ".join(line for line in said[-2:] if line)[-300:]


def status(death: Death, memory_limit: int) -> tuple[Status, str]:
    """(status, evidence for lack of memory or "")."""
    if death.hang:
        return Status.HUNG, ""
    if death.exit_code == -signal.SIGKILL:
        if death.oom_kills:
            return Status.OUT_OF_MEMORY, "the system's out-of-memory killer struck meanwhile"
        if death.resident >= NEAR * memory_limit:
            return Status.OUT_OF_MEMORY, f"{death.resident >> 20} MiB resident of {memory_limit >> 20} MiB"
        return Status.CRASHED, ""
    if found := NO_MEMORY.search(last_words(death.output)):
        return Status.OUT_OF_MEMORY, found.group()
    return Status.CRASHED, ""


def verdict(case: Case, subject: str, death: Death, limit_s: float, memory_limit: int) -> Verdict:
    """The verdict on whoever ran when it died."""
    what, memory = status(death, memory_limit)
    text = f"no answer within {limit_s:g} s: {death.hang}" if death.hang else how(death)
    text += f" during {death.stage}"
    if death.gpu is not None:
        text += f": {death.gpu.text}"
    elif memory:
        text += f" for lack of memory ({memory})"
    elif not death.hang and death.exit_code and (words := last_words(death.output)):
        text += f", having said: {words}"
    evidence: dict[str, Any] = {"exit_code": death.exit_code, "output": tail(death.output)}
    evidence |= {"resident_mib": death.resident >> 20, "oom_kills": death.oom_kills}
    evidence |= {} if death.gpu is None else {"gpu": asdict(death.gpu)}
    return Verdict(case.id, subject, what, death.stage, text, (Finding("death", text, evidence),))


def on_device(verdict: Verdict, facts: Facts) -> Verdict:
    """A call that raised, with what the device said of it: the exception alone names no kernel."""
    if verdict.status is not Status.CRASHED:
        return verdict
    finding = Finding("death", facts.text, {"gpu": asdict(facts)})
    return replace(verdict, reason=f"{verdict.reason}: {facts.text}", findings=(*verdict.findings, finding))


def alarms(output: str, patterns: tuple[str, ...]) -> tuple[Finding, ...]:
    """Notes on lines that look like an error which the library printed and carried on from."""
    said = re.compile("|".join((*ALARMS, *patterns)))
    lines = [line.strip()[:300] for line in output.splitlines() if said.search(line)]
    if not lines:
        return ()
    return (Finding("printed", f"it printed and carried on: {lines[0]}", {"lines": lines[:10], "count": len(lines)}),)
