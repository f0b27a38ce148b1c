"""Verdicts that are known to be of a fresh child, or not: a warm one as long as cases pass, a new one after a failure."""

from __future__ import annotations

from pathlib import Path

from harness.backends.base import Device
from harness.case import Case
from harness.verdict import Verdict
from harness.worker.supervisor import Supervisor


class Isolated:
    """Judges cases on one subject at a time. Use as a context manager. runs: cases given to a child so far."""

    def __init__(self, device: Device, plugins: tuple[str, ...], log_dir: Path, limit_s: float) -> None:
        self.checks: int | None = None
        self.runs = 0
        self._setup = (device, plugins, log_dir, limit_s)
        self._worker = Supervisor(*self._setup)
        self._clean = True

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *exc: object) -> None:
        self._worker.close()

    def warm(self, case: Case, subject: str) -> Verdict:
        """The verdict of a child that may have judged other cases, all of which passed."""
        self._worker.checks = self.checks
        self.runs += 1
        verdict = self._worker.judge(case, subject)
        self._clean = False
        if verdict.status.failed:
            self._renew()
        return verdict

    def fresh(self, case: Case, subject: str) -> Verdict:
        """The verdict of a child that has judged nothing else."""
        if not self._clean:
            self._renew()
        return self.warm(case, subject)

    def judge(self, case: Case, subject: str) -> Verdict:
        """A verdict that passes may be a warm child's, one that fails is a fresh child's."""
        clean = self._clean
        verdict = self.warm(case, subject)
        return verdict if clean or not verdict.status.failed else self.fresh(case, subject)

    def _renew(self) -> None:
        self._worker.close()
        self._worker = Supervisor(*self._setup)
        self._clean = True
