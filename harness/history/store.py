"""A history is a folder, or an object store's prefix, of run folders. `add` copies a run there: run.json, journal.jsonl, and
its rows as verdicts.parquet, in this order.

A copy's name holds the time, the run's identity and its journal's digest: what it names is never changed, so that adding is
idempotent and two at once do no harm. A run that went on and is added again lies beside its shorter self; readers take the
longer. Folders as `moecheck run` leaves them are read too, through Parquet files in this user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import journal, run_info
from harness.errors import HistoryError, MoecheckError, RunFolderError
from harness.history.rows import COLUMNS, SCHEMA, Run, row
from harness.reading import printable, regular
from harness.run_info import RunInfo
from harness.verdict import Verdict

NAME = "verdicts.parquet"
EXTRA = "pip install 'moecheck[history]'"
HINT = "give a folder, or a URL of fsspec whose package is installed and whose bucket, credentials and endpoint work here"
PARTS = (run_info.NAME, journal.NAME, NAME)


def duckdb() -> Any:
    """The module; HistoryError where it is not installed."""
    try:
        import duckdb as module
    except ImportError as error:
        raise HistoryError(f"history is queried with DuckDB, which is not installed here: {EXTRA}") from error
    return module


@dataclass(frozen=True)
class Entry:
    """One run folder in a history: its name, and file name -> (bytes, when it was written, as the store says it)."""

    name: str
    files: dict[str, tuple[int, str]]

    @property
    def compact(self) -> bool:
        """Is its Parquet file there? It is written last."""
        return NAME in self.files


class Place:
    """A folder or URL that fsspec knows. What goes wrong there is a HistoryError."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._told("opened"):
            from fsspec.core import url_to_fs

            self.fs, path = url_to_fs(url)
        self.path = str(path).rstrip("/") or "/"
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        self.local = protocol in ("file", "local")
        self._prefix = "" if self.local else f"{protocol}://"

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except MoecheckError:
            raise
        except Exception as error:  # every store's client has its own: botocore's are no OSError
            said = printable(f"{type(error).__name__}: {error}")[:300]
            raise HistoryError(f"{self.url}: cannot be {what}: {said}; {HINT}") from error

    def check(self) -> None:
        """HistoryError where the bucket is not there: some clients would make one, others call it empty."""
        bucket, _, _ = self.path.partition("/")
        with self._told("read"):
            if bucket and not self.local and not self.fs.exists(bucket):
                raise HistoryError(f"{self.url}: there is no bucket {bucket}, or it is not yours to see; {HINT}")

    def entries(self) -> list[Entry]:
        """The run folders in it, by name; itself, where it is one, under the name ""."""
        with self._told("read"):
            self.fs.invalidate_cache()
            found = self.fs.find(self.path, maxdepth=2, detail=True)
        if not found:
            self.check()
        folders: dict[str, dict[str, tuple[int, str]]] = {}
        for path, info in found.items():
            name, _, file = str(path)[len(self.path) :].lstrip("/").rpartition("/")
            if file in PARTS:
                when = next((info[key] for key in ("mtime", "LastModified", "updated", "created") if key in info), "")
                folders.setdefault(name, {})[file] = (int(info["size"]), str(when))
        return [Entry(name, files) for name, files in sorted(folders.items()) if journal.NAME in files or NAME in files]

    def address(self, *names: str) -> str:
        """Of a file, as DuckDB takes it once the file system is registered."""
        return self._prefix + "/".join((self.path, *filter(None, names)))

    def has(self, *names: str) -> bool:
        """Is this file there?"""
        with self._told("read"):
            return bool(self.fs.exists("/".join((self.path, *names))))

    def write(self, file: Path, *names: str) -> None:
        """Copy a file there, whole or not at all: a store puts whole objects, a disk renames."""
        with self._told("written"):
            self._put(file, "/".join((self.path, *names)))

    def _put(self, file: Path, target: str) -> None:
        if not self.local:
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(file), target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(target).with_name(f".{Path(target).name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(file, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def folder(self, entry: Entry) -> Iterator[Path]:
        """The run folder on this machine: itself, or a copy of what history reads of it."""
        if self.local:
            yield Path(self.path) / entry.name
            return
        with tempfile.TemporaryDirectory(prefix="moecheck-") as name:
            for file, (size, _) in entry.files.items():
                if file != NAME and size <= journal.MAX_BYTES:
                    with self._told("read"):
                        self.fs.get_file("/".join(filter(None, (self.path, entry.name, file))), str(Path(name) / file))
            yield Path(name)


@dataclass(frozen=True)
class Added:
    """A run in a history. new: it was not there before; verdicts: how many it has."""

    name: str
    new: bool
    verdicts: int


def add(folder: Path, place: Place) -> Added:
    """Copy a run folder into a history. RunFolderError if it is none, HistoryError if the place cannot be written."""
    module = duckdb()
    with tempfile.TemporaryDirectory(prefix="moecheck-") as name:
        copy = Path(name)
        lines, info = _snapshot(folder, copy), run_info.read(folder)
        if info is not None:
            run_info.write(copy, info)
        verdicts = journal.read(copy)
        if not verdicts:
            raise HistoryError(f"{folder}: no verdict in it yet; nothing is added")
        started, dated = _when(info, folder / journal.NAME)
        identity = _identity(info, lines)
        ending = f"-{identity}-{hashlib.sha256(lines).hexdigest()[:12]}"
        there = [e for e in place.entries() if e.name.endswith(ending) and e.compact]
        if there:
            return Added(there[0].name, False, len(verdicts))
        target = f"{started[:19].replace('-', '').replace(':', '')}Z{ending}"
        write_parquet(module, copy / NAME, verdicts, _run(target, identity, started, dated, info))
        for part in PARTS:
            if (copy / part).exists() and not place.has(target, part):
                place.write(copy / part, target, part)
        return Added(target, True, len(verdicts))


def compacted(place: Place, entry: Entry, cache: Path) -> Path:
    """The Parquet file of a plain run folder, in `cache`; made when the folder's files are not what it was made of."""
    where = hashlib.sha256(place.address(entry.name).encode()).hexdigest()[:16]
    state = json.dumps([SCHEMA, sorted(entry.files.items())])
    path = cache / f"{where}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.parquet"
    if path.exists() and all(when for _, when in entry.files.values()):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with place.folder(entry) as folder:
        info, verdicts = run_info.read(folder), journal.read(folder)
        first = regular(folder / journal.NAME, journal.MAX_BYTES)
        started, dated = _when(info, folder / journal.NAME, entry)
        run = _run(entry.name or Path(place.path).name, _identity(info, first), started, dated, info)
    temporary = cache / f".{path.name}.{os.getpid()}"
    write_parquet(duckdb(), temporary, verdicts, run)
    for old in cache.glob(f"{where}-*.parquet"):
        old.unlink(missing_ok=True)
    temporary.replace(path)
    return path


def write_parquet(module: Any, path: Path, verdicts: list[Verdict], run: Run) -> None:
    """The verdicts' rows; a file with the columns and no row for none."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8", errors="backslashreplace") as lines:
        for verdict in verdicts:
            lines.write(json.dumps(row(verdict, run)) + "\n")
        lines.flush()
        columns = ", ".join(f"{name}: '{kind}'" for name, kind in COLUMNS.items())
        read = f"read_json('{_quoted(lines.name)}', format = 'newline_delimited', columns = {{{columns}}})"
        with module.connect() as connection:
            connection.execute(f"COPY (SELECT * FROM {read}) TO '{_quoted(str(path))}' (FORMAT parquet, COMPRESSION zstd)")


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _snapshot(folder: Path, copy: Path) -> bytes:
    """The whole lines of the journal, now, also written to `copy`."""
    path = folder / journal.NAME
    try:
        data = regular(path, journal.MAX_BYTES)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}; give a folder made by moecheck run") from error
    data = data[: data.rfind(b"\n") + 1]
    (copy / journal.NAME).write_bytes(data)
    return data


def _identity(info: RunInfo | None, lines: bytes) -> str:
    """Of a run, the same however far it has come: what run.json says of its beginning, and the first verdict, whose seconds no
    other run repeats."""
    about = (
        None if info is None else [info.started, info.platform, info.tier, info.plan, info.shard, info.version, info.revision]
    )
    return hashlib.sha256(json.dumps(about).encode() + lines[: lines.find(b"\n") + 1]).hexdigest()[:12]


def _when(info: RunInfo | None, path: Path, entry: Entry | None = None) -> tuple[str, str]:
    """(start of the run in UTC, who says so)."""
    if info is not None:
        return datetime.fromisoformat(info.started).astimezone(UTC).isoformat(timespec="seconds"), run_info.NAME
    return datetime.fromtimestamp(_written(path, entry), UTC).isoformat(timespec="seconds"), "mtime"


def _written(path: Path, entry: Entry | None) -> float:
    """Seconds since 1970: what the store says, which may be a number or a date, else the file."""
    said = entry.files.get(journal.NAME, (0, ""))[1] if entry is not None else ""
    try:
        return float(said)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(said).timestamp()
    except ValueError:
        return path.stat().st_mtime


def _run(name: str, identity: str, started: str, dated: str, info: RunInfo | None) -> Run:
    if info is None:
        return Run(name, identity, started, dated, "", "", "", "", "")
    shard = "" if info.shard is None else f"{info.shard[0]}/{info.shard[1]}"
    code = f"{info.version} {info.revision}".strip()
    return Run(name, identity, started, dated, info.platform, info.tier, info.plan, shard, code)
