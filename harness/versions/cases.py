"""A release is good or bad by the verdict on one case over its overlay; the same failure is the same signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.select import Item
from harness.verdict import Status, Verdict
from harness.versions import store
from harness.versions.bisect import Outcome
from harness.versions.env import Overlay, Terms, judge
from harness.versions.search import Answer
from harness.versions.uv import NO_ROOM


def signature(verdict: Verdict) -> str:
    """What two verdicts of the same failure share: status, the checks that failed, the kind of the diagnosis."""
    checks = sorted({finding.check for finding in verdict.findings})
    kind = [verdict.diagnosis.kind] if verdict.diagnosis is not None else []
    return " ".join([str(verdict.status), *checks, *kind])


class Judged:
    """Judges `item` over the overlay of a version. failure: the signature that counts as bad, the first one seen if None;
    environment: of the last verdict."""

    def __init__(self, package: str, overlay: Callable[[str], Overlay], item: Item, terms: Terms, failure: str | None) -> None:
        self._package, self._overlay, self._item, self._terms, self.failure = package, overlay, item, terms, failure
        self.environment: dict[str, str] = {}

    def __call__(self, version: str) -> Outcome:
        """Judge once."""
        try:
            lacking(self._package, version, self._terms.entries)
            verdict = judge(self._overlay(version), self._item, self._terms.platform, self._terms)
        except CannotTell as error:
            return Outcome(Answer.UNKNOWN, error.reason)
        if NO_ROOM.search(verdict.reason):
            raise OverlayError(f"{self._package} {version}: {verdict.reason}; that says nothing of it, free some room")
        self.environment.update(verdict.environment)
        if verdict.status is Status.PASSED:
            return Outcome(Answer.GOOD, "PASSED")
        said = signature(verdict)
        if verdict.status.skipped or verdict.status is Status.UNTRUSTED:
            return Outcome(Answer.UNKNOWN, f"{verdict.status}: {verdict.reason}")
        self.failure = self.failure or said
        same = said == self.failure
        return Outcome(Answer.BAD if same else Answer.UNKNOWN, said if same else f"another failure: {said}")


def lacking(package: str, version: str, entries: Iterable[str]) -> None:
    """CannotTell where the stored contract of this release lacks an entry point; nothing where none is stored."""
    try:
        contract = store.load(package, version)
    except MoecheckError:  # a release, a commit or a package that nobody extracted: the child looks for itself
        return
    tops = {name.partition(".")[0] for name in contract.entries}
    for name in entries:
        if name.partition(".")[0] in tops and contract.find(name) is None:
            raise CannotTell(f"{package}=={version}: its contract lacks {name}")
