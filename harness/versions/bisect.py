"""Which release of a package changed something: the search of `search.py` over releases, journalled, told in a report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.version import Version

from harness.errors import CannotTell, MoecheckError, RunFolderError
from harness.reading import parse_json, printable, regular
from harness.versions import store
from harness.versions.env import Overlay
from harness.versions.judging import environment
from harness.versions.properties import read_property
from harness.versions.search import Answer, Found, Model, Next, Stopped, Tally, rates, step

MAX_JOURNAL = 64 << 20
SKIP = 125  # as `git bisect run` has it: this version cannot be tested
ABORT = 128  # and from here on: a signal, or a shell that gave up


@dataclass(frozen=True)
class Outcome:
    """Of one run of one release; `text` is what was seen, the same for the same failure."""

    answer: Answer
    text: str


@dataclass(frozen=True)
class Question:
    """What is asked: a contract, a command or a case, `wanted`; with `fix` the first release without the failure; axis: what a
    version is, a release or, for "git", a commit."""

    package: str
    good: str
    bad: str
    wanted: str
    fix: bool = False
    by: str = "contract"
    axis: str = "release"


@dataclass(frozen=True)
class Run:
    """One line of the journal."""

    version: str
    answer: Answer
    text: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """The end of a bisect: the answer, or why there is none, and every run."""

    question: Question
    releases: tuple[str, ...]
    answer: Found | Stopped
    runs: tuple[Run, ...]
    rates: tuple[float, float]

    @property
    def first(self) -> str | None:
        """The first release that changed, the latest suspect if several cannot be told apart."""
        return self.releases[self.answer.first_bad] if isinstance(self.answer, Found) else None

    @property
    def before(self) -> str | None:
        """The last release that was seen without the change."""
        return self.releases[self.answer.suspects[0] - 1] if isinstance(self.answer, Found) else None


Try = Callable[[str], Outcome]
Watch = Callable[[Run, Next], None]


def between(releases: Sequence[str], first: str, last: str) -> tuple[str, ...]:
    """The releases from `first` to `last`, oldest first; pre-releases only as ends. MoecheckError for ends that are
    in the wrong order or not known."""
    low, high = store.parsed(first), store.parsed(last)
    if low >= high:
        raise MoecheckError(f"{first} is not older than {last}; the first end must be the older release")
    known = {Version(v): v for v in releases}
    for end, text in ((low, first), (high, last)):
        if end not in known:
            raise MoecheckError(f"{text} is none of the {len(known)} releases known, {releases[0]} to {releases[-1]}")
    return tuple(v for p, v in sorted(known.items()) if low <= p <= high and (not p.is_prerelease or p in (low, high)))


def bisect(
    question: Question, releases: Sequence[str], attempt: Try, journal: Journal | None, watch: Watch, model: Model
) -> Result:
    """Run `attempt` on releases (all those between the ends; commits as they are) until the first changed one is known.

    What the journal already has is not run again. An end that cannot be tested is replaced by its nearest testable neighbour.
    """
    ends = (question.bad, question.good) if question.fix else (question.good, question.bad)
    span = tuple(releases) if question.axis == "git" or model.verified else between(releases, *ends)
    runs: list[Run] = list(journal.runs) if journal else []
    while True:
        unknown = {r.version for r in runs if r.answer is Answer.UNKNOWN}
        while len(span) > 1 and span[0] in unknown:
            span = span[1:]
        while len(span) > 1 and span[-1] in unknown:
            span = span[:-1]
        seen = Tally(len(span), ((span.index(r.version), _turned(r.answer, question)) for r in runs if r.version in span))
        now = _nothing(runs) if len(span) < 2 and unknown else step(seen, model)
        if not isinstance(now, Next):
            middle = now.first_bad if isinstance(now, Found) else len(span)
            return Result(question, span, now, tuple(runs), rates(seen.fails, seen.passes, middle))
        run = _timed(span[now.version], attempt)
        if journal is not None:
            journal.append(run)
        runs.append(run)
        watch(run, now)


def _nothing(runs: Sequence[Run]) -> Stopped:
    untold = [r for r in runs if r.answer is Answer.UNKNOWN]
    return Stopped(f"{len(untold)} versions cannot be told and no two are left; the last of them, {untold[-1].text}")


def _turned(answer: Answer, question: Question) -> Answer:
    """To find a fix is to find the first release that is not bad."""
    if not question.fix or answer is Answer.UNKNOWN:
        return answer
    return Answer.GOOD if answer is Answer.BAD else Answer.BAD


def _timed(version: str, attempt: Try) -> Run:
    started = time.monotonic()
    outcome = attempt(version)
    return Run(version, outcome.answer, outcome.text, round(time.monotonic() - started, 3))


class Contracts:
    """Good and bad by the contract: bad is what the bad end says, good what the good end says, anything else cannot be told."""

    def __init__(self, package: str, entry: str, wanted: str, root: Path = store.ROOT) -> None:
        self._package, self._entry, self._wanted, self._root = package, entry, wanted, root
        self._good = self._bad = ""

    def ends(self, span: Sequence[str], fix: bool) -> tuple[str, ...]:
        """Learn what the ends say; the span between the outermost releases that say anything. MoecheckError if both say the
        same."""
        low = next((i for i, version in enumerate(span) if self.read(version) is not None), None)
        high = next((i for i in reversed(range(len(span))) if self.read(span[i]) is not None), None)
        if low is None or high is None:
            raise MoecheckError(f"{self._entry}: no release from {span[0]} to {span[-1]} says anything of {self._wanted}")
        oldest, newest = str(self.read(span[low])), str(self.read(span[high]))
        self._good, self._bad = (newest, oldest) if fix else (oldest, newest)
        if self._good == self._bad:
            raise MoecheckError(f"{self._entry}:{self._wanted} is {printable(self._good)[:300]} at both ends; nothing to find")
        return tuple(span[low : high + 1])

    def read(self, version: str) -> str | None:
        """What the release says."""
        return read_property(store.load(self._package, version, self._root), self._entry, self._wanted)

    def __call__(self, version: str) -> Outcome:
        """Ask one release."""
        said = self.read(version)
        if said is None:
            return Outcome(Answer.UNKNOWN, "its contract lacks it")
        if said == self._good:
            return Outcome(Answer.GOOD, said)
        return Outcome(Answer.BAD if said == self._bad else Answer.UNKNOWN, said)


class Command:
    """Good and bad by a command of the user's: `{version}` in it is replaced. Exit 0 is good, 125 cannot tell, 1..127 bad if it
    is the code of the first failure, the same failure being the same code; a signal, time or another code cannot tell.

    overlay: of a version, put in front of the command's PYTHONPATH; a release without one cannot be told."""

    def __init__(
        self, command: Sequence[str], limit_s: float, code: int | None = None, overlay: Callable[[str], Overlay] | None = None
    ) -> None:
        self._command, self._limit_s, self._code, self._overlay = tuple(command), limit_s, code, overlay

    def __call__(self, version: str) -> Outcome:
        """Run it once."""
        try:
            over = None if self._overlay is None else environment(self._overlay(version))
        except CannotTell as error:
            return Outcome(Answer.UNKNOWN, error.reason)
        command = [part.replace("{version}", version) for part in self._command]
        try:
            done = subprocess.run(command, capture_output=True, timeout=self._limit_s, check=False, env=over)
        except subprocess.TimeoutExpired:
            return Outcome(Answer.UNKNOWN, f"no end within {self._limit_s:g} s")
        except OSError as error:
            raise MoecheckError(f"{command[0]} cannot be run: {error.strerror}") from error
        code = done.returncode
        if code == 0:
            return Outcome(Answer.GOOD, "exit 0")
        if code == SKIP or not 0 < code < ABORT:
            return Outcome(Answer.UNKNOWN, f"exit {code}")
        self._code = code if self._code is None else self._code
        return Outcome(Answer.BAD if code == self._code else Answer.UNKNOWN, f"exit {code}")


class Journal:
    """The runs of one bisect, a fsynced JSON line each, after a line with the question; kill -9 loses the run in flight."""

    def __init__(self, path: Path, question: Question) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.runs = tuple(self._read(question))
            if not os.fstat(self._file).st_size:
                self._write(asdict(question))
        except BlockingIOError as error:
            os.close(self._file)
            raise RunFolderError(f"{path}: in use by another bisect; wait for it or stop it") from error
        except RunFolderError:
            os.close(self._file)
            raise

    def append(self, run: Run) -> None:
        """Record a run."""
        self._write(asdict(run))

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def _write(self, data: Mapping[str, object]) -> None:
        line = (json.dumps(data) + "\n").encode()
        try:
            if os.write(self._file, line) < len(line):  # a full disk takes what it can; the next reader drops it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot be written: {error.strerror}; free some room, only this run is lost"
            ) from error

    def _read(self, question: Question) -> Iterator[Run]:
        data = regular(self.path, MAX_JOURNAL)
        whole = data.rfind(b"\n") + 1
        os.truncate(self.path, whole)  # a line torn by a kill: its run was never recorded
        try:
            rows = [parse_json(line) for line in data[:whole].splitlines()]
            if rows and Question(**rows[0]) != question:
                raise RunFolderError(f"{self.path}: the journal of another question; name a new file")
            yield from (Run(r["version"], Answer(r["answer"]), r["text"], r["seconds"]) for r in rows[1:])
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.path}: not the journal of a bisect: {printable(str(error))[:300]}") from error
