"""The table at the end of a run, backend by backend."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from harness.case import Case
from harness.known import Outcome, outcome
from harness.verdict import Verdict

COLUMNS = ("backend", "version", "recipes", "passed", "failed", "known", "skipped", "bitwise", "worst z / limit", "mean z^2")
MIN_WIDTH = 80  # of backends and counts
SPARED = ("bitwise", "recipes", "version", "mean z^2", "worst z / limit")  # left out of a narrow terminal's, in this order
FOLDING = ("backend", "recipes")  # the others hold numbers, of which no digit may be missing
FOLDED = 16  # columns for recipes at least: the longest names in halves


def summary(verdicts: Sequence[Verdict], versions: dict[str, str], width: int) -> Table:
    """One row per backend, in `width` columns of a terminal, MIN_WIDTH at least: what does not fit is left out, as a table that
    is too wide would be one of single letters. `versions`: backend -> library and version."""
    rows = _rows(verdicts, versions)
    texts = zip(COLUMNS, *rows, strict=True)
    needed = {name: max(Text.from_markup(text).cell_len for text in (name, *column)) + 3 for name, *column in texts}
    needed["recipes"] = FOLDED
    spared: list[str] = []
    while sum(needed.values()) + 1 > width and len(spared) < len(SPARED):
        spared.append(SPARED[len(spared)])
        del needed[spared[-1]]
    caption = f"no room for {', '.join(spared)}: COLUMNS=200 has it" if spared else None
    table = Table(title=f"{len(verdicts)} verdicts", title_justify="left", header_style="bold", caption=caption)
    for name in needed:
        table.add_column(name, overflow="fold", no_wrap=name not in FOLDING, justify="left" if name in COLUMNS[:3] else "right")
    for row in rows:
        table.add_row(*(text for name, text in zip(COLUMNS, row, strict=True) if name in needed))
    return table


def _rows(verdicts: Sequence[Verdict], versions: dict[str, str]) -> list[list[str]]:
    by_subject: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_subject[verdict.subject].append(verdict)
    return [[subject, versions.get(subject, ""), *_cells(by_subject[subject])] for subject in sorted(by_subject)]


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
