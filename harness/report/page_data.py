"""Verdicts as the report page holds them: columns for the table, and everything about a failure for its own page.

All text is cut to a length and its control, bidi and other invisible characters are written as escapes, so that what a kernel
or a stranger's journal says can neither act nor look like something else.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.case import Case
from harness.known import Outcome, outcome
from harness.reading import printable
from harness.verdict import Comparison, Finding, Verdict

MAX_TEXT, MAX_NOTE, MAX_OUTPUT = 4000, 160, 8000  # characters of a reason, of a table row, of a process' last output
MAX_LIST = 32  # findings, samples, evidence entries, facts of one verdict
MACHINE = {"python", "arch", "device", "driver", "cuda", "sanitizer"}  # the rest of an environment are libraries
SEVERITY = (Outcome.RED, Outcome.GONE, Outcome.KNOWN, Outcome.GREEN, Outcome.SKIPPED)
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # ANSI control sequences: terminal colours are noise here


def clean(text: object, limit: int = MAX_TEXT) -> str:
    """`text` of at most `limit` characters, printable but for line ends; says where it was cut."""
    whole = str(text)
    if len(whole) <= limit and whole.isprintable():
        return whole
    shown = _COLOUR.sub("", whole[: 2 * limit]).expandtabs(4)
    lines = "\n".join(map(printable, shown.split("\n")))
    return lines if len(lines) <= limit and len(whole) <= 2 * limit else f"{lines[:limit]} … cut, {len(whole)} characters"


def one_line(text: object, limit: int = MAX_NOTE) -> str:
    """The beginning of `text` without line ends."""
    flat = clean(" ".join(str(text)[: 4 * limit].split()), 2 * limit)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def number(x: float, digits: int = 4) -> float | str:
    """So many digits of it; inf and nan, which JSON lacks, as text."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else str(x)


def recipe_of(case_id: str) -> str:
    """The second part of every case id."""
    return case_id.split(".", 2)[1]


def version_of(verdict: Verdict) -> str:
    """The last library that the environment names, as the terminal's table has it."""
    libraries = [f"{k} {v}" for k, v in verdict.environment.items() if k not in MACHINE]
    return one_line(libraries[-1], 60) if libraries else ""


class Coded:
    """Texts as numbers, equal ones alike."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self._index.setdefault(text, len(self._index))

    @property
    def texts(self) -> list[str]:
        """Every text at its number."""
        return list(self._index)


@dataclass
class Cell:
    """What one backend did with one recipe."""

    counts: Counter[Outcome] = field(default_factory=Counter)

    @property
    def red(self) -> int:
        """Failures, and known issues that are gone."""
        return self.counts[Outcome.RED] + self.counts[Outcome.GONE]

    @property
    def total(self) -> int:
        """Of any outcome."""
        return sum(self.counts.values())

    @property
    def worst(self) -> str:
        """The outcome that colours the cell; a skip beside passes does not."""
        return next((str(o) for o in SEVERITY if self.counts[o] and o is not Outcome.GONE), "red" if self.red else "none")

    @property
    def words(self) -> str:
        """For a reader that sees no colour."""
        names = {"red": "failed", "gone": "no longer failing", "known": "known", "green": "passed", "skipped": "skipped"}
        return ", ".join(f"{self.counts[o]} {names[o]}" for o in SEVERITY if self.counts[o])


@dataclass(frozen=True)
class Grid:
    """Backends x recipes. versions: backend -> library and version."""

    backends: tuple[str, ...]
    recipes: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    versions: Mapping[str, str]

    def row(self, backend: str) -> Cell:
        """All its recipes together."""
        return Cell(sum((self.cells[backend, r].counts for r in self.recipes if (backend, r) in self.cells), Counter()))


def grid(verdicts: Iterable[Verdict]) -> Grid:
    """The verdict matrix, backends that fail first."""
    cells: dict[tuple[str, str], Cell] = defaultdict(Cell)
    versions: dict[str, str] = {}
    for v in verdicts:
        subject = one_line(v.subject)
        cells[subject, recipe_of(v.case_id)].counts[outcome(v)] += 1
        if not v.status.skipped and subject not in versions:
            versions[subject] = version_of(v)
    backends, recipes = (tuple(sorted({key[i] for key in cells})) for i in (0, 1))
    found = Grid(backends, recipes, dict(cells), versions)
    return replace(found, backends=tuple(sorted(backends, key=lambda b: (not found.row(b).red, b))))


def ordered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Failures first, otherwise as judged."""
    rank = {kind: i for i, kind in enumerate(SEVERITY)}
    return sorted(verdicts, key=lambda v: rank[outcome(v)])


def columns(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Column-wise plain data of the table: per verdict numbers into lists of texts, case ids as lines, measures."""
    coded = {name: Coded() for name in ("subject", "recipe", "status", "outcome", "note", "lane", "suffix")}
    codes: dict[str, list[int]] = {name: [] for name in coded}
    measures: dict[str, list[float | str]] = {name: [] for name in ("worst", "limit", "mean_z2", "seconds")}
    for v in verdicts:
        prefix, c = f"moecheck repro {v.case_id}", v.comparison
        row = (
            one_line(v.subject),
            recipe_of(v.case_id),
            str(v.status),
            str(outcome(v)),
            note_of(v),
            c.lane if c is not None and c.total else "",
            clean(v.rerun.removeprefix(prefix)),
        )
        for name, text in zip(coded, row, strict=True):
            codes[name].append(coded[name](text))
        for name in ("worst", "limit", "mean_z2"):
            measures[name].append(0 if c is None else number(getattr(c, name), 3))
        measures["seconds"].append(number(v.seconds))
    return {
        "cases": "\n".join(v.case_id for v in verdicts),
        "texts": {name: c.texts for name, c in coded.items()},
        "codes": codes,
        "measures": measures,
    }


def note_of(verdict: Verdict) -> str:
    """What a table row says beside its numbers; nothing of a pass."""
    if outcome(verdict) is Outcome.GONE:
        return one_line(f"known issue {verdict.known} no longer fails")
    known = f"known: {verdict.known}. " if verdict.known else ""
    first = verdict.diagnosis.text if verdict.diagnosis is not None and not verdict.reason else verdict.reason
    return one_line(known + first) if verdict.status.failed or verdict.status.skipped else ""


def detail(verdict: Verdict, link: str = "") -> dict[str, Any]:
    """Everything a failure's page shows, bounded. link: of its known issue."""
    d, c = verdict.diagnosis, verdict.comparison
    outputs = [str(f.evidence["output"]) for f in verdict.findings if f.evidence.get("output")]
    return {
        "stage": str(verdict.stage),
        "reason": clean(verdict.reason),
        "known": one_line(verdict.known),
        "link": clean(link, 500),
        "diagnosis": None
        if d is None
        else {
            "kind": one_line(d.kind),
            "text": clean(d.text),
            "explained": number(d.explained),
            "evidence": _facts(d.evidence),
        },
        "statistics": [] if c is None else statistics(c),
        "samples": []
        if c is None
        else [[s.token, s.column, *(f"{x:.6g}" for x in (s.expected, s.got)), f"{s.z:.3g}"] for s in c.samples[:MAX_LIST]],
        "findings": [_finding(f) for f in verdict.findings[:MAX_LIST]],
        "output": clean("\n".join(outputs), MAX_OUTPUT),
        "notes": [_finding(f) for f in verdict.notes[:MAX_LIST]],
        "axes": _facts(Case.parse(verdict.case_id).axes),
        "environment": _facts({**verdict.environment, **{f"plugin {i + 1}": p for i, p in enumerate(verdict.plugins)}}),
        "rules": [[one_line(name), bool(accepts)] for name, accepts in list(verdict.rules.items())[:MAX_LIST]],
    }


def statistics(c: Comparison) -> list[list[Any]]:
    """[name, value, bound or "", beyond it] of a comparison, as text."""
    share = f"{c.beyond} of {c.total}" + (f" ({100 * c.beyond / c.total:.3g} %)" if c.total else "")
    rows: list[list[Any]] = [["elements beyond the bound", share, "0", c.beyond > 0]]
    if c.lane == "exact":
        rows = [["elements that differ in a bit", share, "0", c.beyond > 0]]
    elif c.lane == "ratio":
        rows.append(["worst tile's error / an emulation's", f"{c.worst:.3g}", f"{c.limit:.3g}", not c.worst <= c.limit])
    else:
        rows.append(["worst z", f"{c.worst:.3g}", f"{c.limit:.3g}", not c.worst <= c.limit])
        rows.append(["mean z²", f"{c.mean_z2:.3g}", f"{c.mean_z2_limit:.3g}", not c.mean_z2 <= c.mean_z2_limit])
    rows.append(["NaN or inf", str(c.nonfinite), "0", c.nonfinite > 0])
    rows.append(["relative L2 error", f"{c.rel_l2:.3g}", "", False])
    rows.append(["rows hit", str(c.rows_hit), "", False])
    if c.experts_hit:
        rows.append(["experts all of whose tokens are hit", one_line(", ".join(map(str, c.experts_hit))), "", False])
    return rows


def _finding(f: Finding) -> dict[str, Any]:
    evidence = {k: v for k, v in f.evidence.items() if k != "output"}
    return {"check": one_line(f.check), "text": clean(f.text), "evidence": _facts(evidence)}


def _facts(data: Mapping[str, Any]) -> list[list[str]]:
    """[name, value] as text; values that are no text as JSON."""
    plain = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in list(data.items())[:MAX_LIST]]
    return [[one_line(k), clean(v, 1000)] for k, v in plain]
