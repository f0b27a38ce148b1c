"""Reads the text report of compute-sanitizer: which error, in which kernel, at which line, by which thread, on which address.

The format is that of the Compute Sanitizer manual (v2021 to v2026): a line of `=========` and one space begins an error, more
spaces go on with it, a SUMMARY ends the report. What is not understood is an error of ours, never a clean report.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from harness.errors import MoecheckError
from harness.verdict import Finding, Status

PREFIX = re.compile(r"^\s*=========( *)(.*)$")
SUMMARY = re.compile(r"(ERROR|RACECHECK|INITCHECK|SYNCCHECK) SUMMARY: ([\d,]+) (?:errors?|hazards?)\b(.*)")
HAZARDS = re.compile(r"\(([\d,]+) errors?, ([\d,]+) warnings?\)")
# A place: `kernel(args)+0x90 in file.cu:41`; older: `0x90 in file.cu:41:kernel(args)` or `0x90 in kernel(args)`.
PLACE = re.compile(
    r"^(?:0x[0-9a-f]+ in )?(?:(?P<old>[^\s:]+:\d+):(?!:))?(?P<name>.*?)(?:[+:]0x[0-9a-f]+)?(?: in (?P<file>\S+:\d+))?$"
)
ACCESS = re.compile(r"(__\w+__) (?:memory )?(read|write|atomic)?.*?of size ([\d,]+)")
RACE = re.compile(r"Race reported between (Read|Write|Atomic) access at (.*)")
HAZARD_OF = re.compile(r" \[[\d,]+ hazards?\]$")
THREAD = re.compile(r"by threads? (?:starting at )?(\(\d+,\d+,\d+\)) in block (\(\d+,\d+,\d+\))")
ADDRESS = re.compile(r"(?:Address|Access (?:to|at)|Uninitialized access at) (0x[0-9a-f]+)\b\s*(.*)")
CONTINUES = ("at ", "by thread", "Address ", "Access ", "and ", "Device Frame", "Host Frame", "Saved host")  # however indented
# Not errors of the kernel. The first two say what a context that was ended on purpose does to its process.
REMARKS = (
    "Error: process didn't terminate successfully",
    "Target application returned an error",
    "COMPUTE-SANITIZER",
    "LEAK SUMMARY",
    "Tracking kernels launched by child",
)
TROUBLE = ("Error:", "Internal Sanitizer Error", "Fatal", "Internal error")  # the tool's own: nothing can be said
HAZARD = re.compile(r"^(?:Error|ERROR|Warning|WARNING): (?=.*(?:Race reported|hazard detected))")
# cub's decoupled look-back reads flags that other blocks are about to write: reported, and meant (NVIDIA/cccl#2104, #1889).
BENIGN = {"initcheck": ("cub::", "cub3", "3cub")}
# What a result can depend on without anything being written where it must not.
UNSTABLE = ("read", "invalid __", "memory access error", "race", "hazard", "barrier", "sync", "deadlock")
SHOWN = 5  # kinds of error in a verdict; the report holds them all


class SanitizerError(MoecheckError):
    """compute-sanitizer is not here, did not finish, or wrote what cannot be read. Never a pass."""


@dataclass(frozen=True)
class Record:
    """One error. access: "read", "write" or ""; size in bytes; kernel and place "" where the report does not say."""

    text: str
    access: str = ""
    size: int = 0
    kernel: str = ""
    place: str = ""
    thread: str = ""
    block: str = ""
    address: str = ""
    detail: str = ""

    @property
    def status(self) -> Status:
        """A write or free where it must not: CORRUPTING. A read of what is not its own or of what nobody wrote, a race, a
        barrier that not all reach: the result depends on them, UNSTABLE. A failed call or a trap: CRASHED."""
        words = self.text.lower()
        if self.access == "write" or "free" in words:
            return Status.CORRUPTING
        return Status.UNSTABLE if any(word in words for word in UNSTABLE) else Status.CRASHED


@dataclass(frozen=True)
class Report:
    """What one tool said. errors: its own count; benign: errors of BENIGN kernels, which are not among the records."""

    tool: str
    errors: int
    records: tuple[Record, ...]
    benign: int = 0

    @property
    def status(self) -> Status | None:
        """The worst of its records; None for a clean report."""
        found = {record.status for record in self.records}
        return next((s for s in (Status.CORRUPTING, Status.CRASHED, Status.UNSTABLE) if s in found), None)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One for each kind of error at each place, the most frequent first."""
        groups = Counter((r.text, r.kernel, r.place) for r in self.records)
        found = []
        for key, count in groups.most_common(SHOWN):
            record = next(r for r in self.records if (r.text, r.kernel, r.place) == key)
            found.append(Finding(self.tool, f"{self.tool}: {_sentence(record, count)}", {**vars(record), "count": count}))
        return tuple(found)


def parse(text: str, tool: str) -> Report:
    """The report as data. SanitizerError if its end is missing, the tool speaks of trouble of its own, or it counts errors
    of which none can be read."""
    errors: int | None = None
    records: list[Record] = []
    for line in text.splitlines():
        match = PREFIX.match(line)
        if match is None or not match[2].strip():
            continue
        indent, words = len(match[1]), match[2].strip()
        if summary := SUMMARY.match(words):
            errors = _count(summary, tool) if errors is None else errors
        elif indent > 2 or words.startswith(CONTINUES):
            if records:
                records[-1] = _detailed(records[-1], words)
        elif words.startswith(TROUBLE) and not words.startswith(REMARKS) and not HAZARD.match(words):
            raise SanitizerError(f"{tool}: compute-sanitizer failed: {words}")
        elif not words.startswith(REMARKS) and (not words.startswith("Warning") or HAZARD.match(words)):
            records.append(_begun(HAZARD.sub("", words)))
    if errors is None:
        raise SanitizerError(
            f"{tool}: the report has no SUMMARY; compute-sanitizer did not finish. Its end: {text[-300:].strip()}"
        )
    return _checked(Report(tool, errors, tuple(records)))


def _count(summary: re.Match[str], tool: str) -> int:
    if (tool == "racecheck") != (summary[1] == "RACECHECK"):
        raise SanitizerError(f"{tool}: the report ends with {summary[0]}, which is another tool's")
    hazards = HAZARDS.search(summary[3])
    return sum(_int(n) for n in hazards.groups()) if hazards else _int(summary[2])


def _checked(report: Report) -> Report:
    mine = BENIGN.get(report.tool, ())
    kept = tuple(r for r in report.records if not any(word in r.kernel for word in mine))
    benign = len(report.records) - len(kept)
    if report.errors and not report.records:
        raise SanitizerError(f"{report.tool}: {report.errors} errors, none of which can be read; look at the report")
    if benign and not kept and report.errors > benign:
        unseen = report.errors - benign
        raise SanitizerError(f"{report.tool}: {unseen} errors were not printed behind {benign} known ones; nothing can be said")
    return replace(report, records=kept, benign=benign)


def _begun(words: str) -> Record:
    """The record that a head line begins."""
    if race := RACE.match(words):
        kernel, place = _place(race[2])
        return Record(f"Race reported between {race[1]} access", "", 0, kernel, place)
    access = ACCESS.search(words)
    if access is None:
        return Record(words)
    return Record(words, "write" if access[2] == "atomic" else access[2] or "", _int(access[3]))


def _detailed(record: Record, words: str) -> Record:
    """The record with what a further line says."""
    if thread := THREAD.search(words):
        return replace(record, thread=thread[1], block=thread[2])
    if address := ADDRESS.match(words):
        return replace(record, address=address[1], detail=address[2].strip())
    if words.startswith("Device Frame:"):  # callers, the kernel last
        kernel, place = _place(words.removeprefix("Device Frame:").strip())
        return replace(record, kernel=kernel, place=record.place or place)
    if words.startswith("at ") and not record.kernel:
        kernel, place = _place(words.removeprefix("at "))
        return replace(record, kernel=kernel, place=place)
    if words.startswith("and ") and " access at " in words:
        what, where = words.removeprefix("and ").split(" access at ", 1)
        other = " at ".join(part for part in _place(where) if part)
        return replace(record, detail=record.detail or f"and {what} access in {other}")
    return replace(record, detail=f"{record.detail} {words}") if words.startswith("and is ") else record


def _place(words: str) -> tuple[str, str]:
    """(kernel, file:line) of `kernel(args)+0x90 in file.cu:41`."""
    match = PLACE.match(HAZARD_OF.sub("", words))
    assert match is not None  # every part of it is optional
    return match["name"].strip(), match["file"] or match["old"] or ""


def _sentence(record: Record, count: int) -> str:
    where = f" in {record.kernel}" * bool(record.kernel) + f" at {record.place}" * bool(record.place)
    who = f", thread {record.thread} of block {record.block}" * bool(record.thread)
    which = (
        f", address {record.address} {record.detail}".rstrip() if record.address else f", {record.detail}" * bool(record.detail)
    )
    return f"{record.text}{where}{who}{which}" + (f" ({count} alike)" if count > 1 else "")


def _int(digits: str) -> int:
    return int(digits.replace(",", ""))
