"""When, with what and which part of a plan a run folder was: run.json, for history, the coverage ledger and the report."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from harness import __version__
from harness.errors import RunFolderError
from harness.reading import parse_json, printable, regular

NAME = "run.json"
SCHEMA = 1
MAX_BYTES = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RunInfo:
    """started, finished: UTC, ISO 8601 with seconds, finished "" while it runs or where it was killed; seconds: wall clock of
    all its parts; revision: git commit of this checkout, "" outside one; plan: the plan's digest; shard: (i, n), 1-based."""

    started: str
    platform: str
    tier: str
    plan: str
    finished: str = ""
    seconds: float = 0.0
    shard: tuple[int, int] | None = None
    version: str = __version__
    revision: str = ""
    schema: int = SCHEMA

    def stopped(self, seconds: float, whole: bool) -> RunInfo:
        """The same run after `seconds` more of it; finished if it is whole."""
        return replace(self, seconds=round(self.seconds + seconds, 3), finished=now() if whole else "")


_TYPED = TypeAdapter(RunInfo)


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def timestamp(text: str) -> float:
    """Seconds since 1970 of such a time; one without an offset is UTC."""
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def revision() -> str:
    """The commit this moecheck was checked out at, with + where files differ from it; "" where git cannot say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write(folder: Path, info: RunInfo) -> None:
    """Write run.json, whole or not at all."""
    temporary = folder / f".{NAME}"
    temporary.write_text(json.dumps(asdict(info), indent=1) + "\n")
    temporary.replace(folder / NAME)


def read(folder: Path) -> RunInfo | None:
    """What run.json says; None where there is none, as in folders of older releases. RunFolderError for anything else."""
    path = folder / NAME
    try:
        info = _TYPED.validate_python(parse_json(regular(path, MAX_BYTES)))
        for text in (info.started, info.finished):
            if text:
                datetime.fromisoformat(text)
        if info.schema != SCHEMA:
            raise ValueError(f"schema {info.schema}, this moecheck reads {SCHEMA}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        text = printable(str(error))[:500]
        raise RunFolderError(f"{path}: not a moecheck run.json ({text}); delete it to go on without") from error
    return info
