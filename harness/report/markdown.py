"""The run as Markdown, for a CI system's summary page: `cat runs/*/summary.md >> "$GITHUB_STEP_SUMMARY"`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.executed import Ways
from harness.known import Outcome, outcome
from harness.verdict import Verdict

SHOWN = 20  # failures: a summary page is cut at 1 MiB (GitHub), and nobody reads the hundredth line


def write(path: Path, verdicts: Sequence[Verdict], reached: Mapping[str, Sequence[Ways]]) -> None:
    """Counts and executed combinations of each backend, then the failures with their rerun lines; in one step."""
    by_subject: dict[str, Counter[Outcome]] = {}
    for verdict in verdicts:
        by_subject.setdefault(verdict.subject, Counter())[outcome(verdict)] += 1
    lines = ["| backend | passed | failed | known | skipped | executed |", "|---|---|---|---|---|---|"]
    for name in sorted({*by_subject, *reached}):
        counts = by_subject.get(name, Counter())
        cells = (
            counts[Outcome.GREEN],
            counts[Outcome.RED] + counts[Outcome.GONE],
            counts[Outcome.KNOWN],
            counts[Outcome.SKIPPED],
        )
        executed = ", ".join(map(str, reached.get(name, ())))
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {executed} |")
    red = [v for v in verdicts if outcome(v) in (Outcome.RED, Outcome.GONE)]
    lines += ["", *(f"* {v.status} `{v.rerun}`: {_flat(v.reason)}" for v in red[:SHOWN])]
    lines += [f"* and {len(red) - SHOWN} more"] if len(red) > SHOWN else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def _flat(reason: str) -> str:
    """One line that no Markdown renderer takes for markup of its own."""
    return " ".join(reason.split())[:300].translate({ord(c): f"&#{ord(c)};" for c in "<>|`*_[]"})
