"""Failures as GitHub's workflow commands, which show beside the change: https://docs.github.com, "Workflow commands"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.known import Outcome, outcome
from harness.pooled import alarms
from harness.reading import printable
from harness.verdict import Verdict

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN = 10  # GitHub shows ten annotations of a kind in each step
MAX_TEXT = 1000  # characters: the page folds after a few lines, the journal has the rest


def errors(verdicts: Iterable[Verdict], files: Mapping[str, Path]) -> list[str]:
    """One line a failure, at most SHOWN. files: backend -> the file that declares it."""
    found = list(verdicts)
    lines = []
    for verdict in found:
        where = files.get(verdict.subject)
        if outcome(verdict) is Outcome.GONE:
            text = f"known issue {verdict.known} passes now: remove its entry\nrerun: {verdict.rerun}"
            lines.append(_error(ROOT / "configs" / "known_issues.yaml", f"GONE {verdict.known}", text))
        elif outcome(verdict) is Outcome.RED:
            text = f"{verdict.reason[:MAX_TEXT]}\nrerun: {verdict.rerun}"
            lines.append(_error(where, f"{verdict.status} {verdict.subject}", text))
    lines += [_error(files.get(pool.subject), f"WRONG {pool.subject}", str(pool)) for pool in alarms(found)]
    if len(lines) > SHOWN:
        lines[SHOWN - 1 :] = [_error(None, "moecheck", f"and {len(lines) - SHOWN + 1} more failures: see the summary")]
    return lines


def _error(file: Path | None, title: str, text: str) -> str:
    where = f"file={_property(_relative(file))}," if file is not None else ""
    return f"::error {where}title={_property(title)}::{_data(text)}"


def _relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)


def _data(text: str) -> str:
    """One line: a newline in a kernel's last words must not begin a command of its own."""
    lines = text.replace("%", "%25").splitlines()
    return "%0A".join(map(printable, lines))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
