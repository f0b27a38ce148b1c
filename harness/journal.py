"""The truth of a run: one fsynced JSON line per verdict. kill -9 loses at most the case in flight."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from pydantic import TypeAdapter

from harness import paths
from harness.case import Case
from harness.errors import MoecheckError, RunFolderError
from harness.reading import parse_json, printable, regular
from harness.select import Item
from harness.verdict import Verdict

NAME = paths.JOURNAL
MAX_LINE = 2 << 20  # bytes: twice what the worker may answer
MAX_BYTES = 1 << 30  # a verdict is a few KiB: some hundred thousand of them
HINT = "--resume drops only a last line without its end; delete this line and its case is judged again"
_TYPED = TypeAdapter(Verdict)


class Journal:
    """Appends verdicts to `folder`/journal.jsonl; `done` holds the items it already has."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            self.done = self._lock_and_read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock_and_read(self) -> set[Item]:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(f"{self.path}: in use by another moecheck; wait for it or stop it") from error
        verdicts, whole = _parse(self.path)
        if self.path.stat().st_size > whole:
            os.truncate(self.path, whole)  # a line torn by a kill: its case was never recorded
        return {Item(v.case_id, v.subject) for v in verdicts}

    def append(self, verdict: Verdict) -> None:
        """Write and fsync one verdict, or RunFolderError; a case already recorded is our bug, not another line."""
        item = Item(verdict.case_id, verdict.subject)
        assert item not in self.done, f"{item} is already in {self.path}"
        line = (json.dumps(verdict.to_json(), allow_nan=False) + "\n").encode()
        whole = os.fstat(self._descriptor).st_size
        try:
            while line:  # a write may be short
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:  # half a line, were another to follow, would make the whole journal unreadable
            os.truncate(self._descriptor, whole)
            go_on = f"then moecheck run --resume {self.path.parent}"
            raise RunFolderError(f"{self.path}: cannot be written: {error.strerror}; make room, {go_on}") from error
        self.done.add(item)

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)


class Joined(Journal):
    """The journal of a run that another process holds: what it had of `size` bytes is done; appends under the lock file."""

    def __init__(self, folder: Path, size: int, lock: Path) -> None:
        self._size, self._lock = size, os.open(lock, os.O_RDWR | os.O_CREAT)
        super().__init__(folder)

    def _lock_and_read(self) -> set[Item]:
        return {Item(v.case_id, v.subject) for v in _parse(self.path, self._size)[0]}

    def append(self, verdict: Verdict) -> None:
        """Write and fsync one verdict; half a line that a killed neighbour left goes first."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            os.truncate(self.path, _whole(self.path))
            super().append(verdict)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release file and lock."""
        os.close(self._lock)
        super().close()


def _whole(path: Path) -> int:
    """Bytes up to the last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - MAX_LINE)
        file.seek(start)
        data = file.read()
    return start + data.rfind(b"\n") + 1 if b"\n" in data else start


def read(folder: Path) -> list[Verdict]:
    """The verdicts of a run folder, in order."""
    return _parse(folder / NAME)[0]


def read_from(path: Path) -> list[Verdict]:
    """The verdicts of a run folder or of a journal file; RunFolderError where there is no journal."""
    file = path / NAME if path.is_dir() else path
    if not file.exists():
        wanted = "a run folder or a journal" if file == path else f"a folder with a {NAME}"
        raise RunFolderError(f"{path}: there is no journal; give {wanted}, as moecheck run makes them")
    return _parse(file)[0]


def typed(data: object) -> Verdict:
    """The verdict that `data` is, every field of the type that its readers rely on; ValueError, KeyError, TypeError or
    AttributeError if it is none."""
    return _TYPED.validate_python(_plain(Verdict.from_json(data)))  # type: ignore[arg-type]


def _plain(verdict: Verdict) -> dict[str, object]:
    """What asdict makes of it, without its deep copies: they are half the time that a long journal takes to read."""
    fields: dict[str, object] = dict(vars(verdict))
    for name in ("findings", "notes"):
        fields[name] = [vars(finding) for finding in getattr(verdict, name)]
    if verdict.comparison is not None:
        fields["comparison"] = {**vars(verdict.comparison), "samples": [vars(s) for s in verdict.comparison.samples]}
    if verdict.diagnosis is not None:
        fields["diagnosis"] = vars(verdict.diagnosis)
    return fields


def _parse(path: Path, size: int | None = None) -> tuple[list[Verdict], int]:
    """(verdicts, bytes up to the last whole line) of the first `size` bytes. RunFolderError with file and line for anything
    that is no verdict."""
    if not path.exists():
        return [], 0
    try:
        data = regular(path, MAX_BYTES)[:size]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error
    whole = data.rfind(b"\n") + 1
    verdicts: list[Verdict] = []
    lines: dict[Item, int] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            verdict = typed(parse_json(line))
            Case.parse(verdict.case_id)
            first = lines.setdefault(Item(verdict.case_id, verdict.subject), number)
            if first != number:
                raise ValueError(f"{verdict.subject} on {verdict.case_id} has one on line {first} already")
        except (ValueError, KeyError, TypeError, AttributeError, MoecheckError) as error:
            text = printable(f"{type(error).__name__}: {error}")[:500]
            raise RunFolderError(f"{path}:{number}: not a verdict: {text}; {HINT}") from error
        verdicts.append(verdict)
    return verdicts, whole
