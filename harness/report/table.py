"""The table at the end of a run, backend by backend."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.table import Table

from harness.case import Case
from harness.known import Outcome, outcome
from harness.verdict import Verdict

COLUMNS = ("backend", "version", "recipes", "passed", "failed", "known", "skipped", "bitwise", "worst z / limit", "mean z^2")


def summary(verdicts: Sequence[Verdict], versions: dict[str, str]) -> Table:
    """One row per backend. `versions`: backend -> library and version."""
    table = Table(title=f"{len(verdicts)} verdicts", title_justify="left", header_style="bold")
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="left" if name in COLUMNS[:3] else "right")
    by_subject: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_subject[verdict.subject].append(verdict)
    for subject in sorted(by_subject):
        table.add_row(subject, versions.get(subject, ""), *_cells(by_subject[subject]))
    return table


def _cells(verdicts: list[Verdict]) -> list[str]:
    counts = Counter(outcome(v) for v in verdicts)
    red = counts[Outcome.RED] + counts[Outcome.GONE]
    recipes = sorted({str(Case.parse(v.case_id).recipe) for v in verdicts if not v.status.skipped})
    green = [v.comparison for v in verdicts if outcome(v) is Outcome.GREEN and v.comparison is not None]
    exact = sum(c.lane == "exact" for c in green)
    real = [c for c in green if c.lane == "real" and c.total]
    worst = max(real, key=lambda c: c.worst / c.limit, default=None)
    mean = sum(c.mean_z2 * c.total for c in real) / max(1, sum(c.total for c in real))
    return [
        ", ".join(recipes),
        f"[green]{counts[Outcome.GREEN]}[/green]",
        f"[bold red]{red}[/bold red]" if red else "0",
        f"[yellow]{counts[Outcome.KNOWN]}[/yellow]" if counts[Outcome.KNOWN] else "0",
        str(counts[Outcome.SKIPPED]),
        str(exact),
        "" if worst is None else f"{worst.worst:.2f} / {worst.limit:.2f}",
        f"{mean:.3f}" if real else "",
    ]
