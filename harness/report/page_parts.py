"""What stands beside the verdicts on a report page: when and where, coverage, a kill matrix, timings; read bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import RunFolderError
from harness.executed import Ways
from harness.history.ledger import Cell, State
from harness.reading import parse_json, printable, regular
from harness.report.page_data import number, one_line
from harness.run_info import RunInfo
from harness.verdict import Verdict

FIRST = ("case_id", "subject", "median_us", "low_us", "high_us", "ratio", "flops_share", "bytes_share", "problem")
COVERAGE, LATENCY = "coverage.json", "latency.jsonl"
NAMES = {0: "its only case", 1: "single values", 2: "pairs", 3: "triples"}  # of combinations, by strength
MAX_FILE = 64 << 20
MAX_ROWS, MAX_FACTS, MAX_COLUMNS = 1000, 24, 16  # shown of timings; of an environment; of a timing's fields


@dataclass(frozen=True)
class Killed:
    """One planted fault of `moecheck faults --json`; older files lack what has a default."""

    fault: str
    verdicts: int
    kills: int
    lanes: dict[str, int]
    named: bool
    after: int | None = None
    first: str | None = None
    names: dict[str, int] | None = None
    mechanism: str = ""
    thread: str = ""


@dataclass(frozen=True)
class Kills:
    """The kill matrix; what: a sentence about where it comes from, in files that have one."""

    planted: int
    killed: int
    clean_verdicts: int
    clean_alarms: int
    matrix: list[Killed]
    what: str = ""

    @property
    def lanes(self) -> list[str]:
        """Every lane that killed, the deadliest first."""
        totals = Counter[str]()
        for row in self.matrix:
            totals.update(row.lanes)
        return [name for name, _ in totals.most_common(MAX_COLUMNS)]

    @property
    def rows(self) -> list[Killed]:
        """Survivors first, then those that were named otherwise, then by name."""
        return sorted(self.matrix, key=lambda k: (k.kills > 0, k.named, k.fault))


def kills(path: Path) -> Kills:
    """The file that `moecheck faults --json` wrote; RunFolderError for anything else."""
    try:
        return TypeAdapter(Kills).validate_python(parse_json(regular(path, MAX_FILE)))
    except (OSError, ValueError, ValidationError) as error:
        raise RunFolderError(f"{path}: not what `moecheck faults --json` writes: {printable(str(error))[:500]}") from error


def coverage(folder: Path) -> dict[str, list[Ways]]:
    """Backend -> executed combinations, from coverage.json; none without the file."""
    path = folder / COVERAGE
    try:
        data = parse_json(regular(path, MAX_FILE))
        return TypeAdapter(dict[str, list[Ways]]).validate_python(data["backends"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        text = printable(str(error))[:500]
        raise RunFolderError(f"{path}: not a moecheck {COVERAGE} ({text}); delete it to go on without") from error


@dataclass(frozen=True)
class Timings:
    """latency.jsonl as a table: column names, rows of text, how many rows there were in all."""

    columns: list[str]
    numeric: list[bool]
    rows: list[list[str]]
    total: int


def timings(folder: Path) -> Timings | None:
    """The fields of latency.jsonl, FIRST and then what differs from line to line; None without the file."""
    path = folder / LATENCY
    try:
        lines = [line for line in regular(path, MAX_FILE).split(b"\n") if line.strip()]
        found = [parse_json(line) for line in lines[:MAX_ROWS]]
        if not all(isinstance(row, dict) for row in found):
            raise ValueError("a line is no object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        text = printable(str(error))[:500]
        raise RunFolderError(f"{path}: not a moecheck {LATENCY} ({text}); delete it to go on without") from error
    plain = [{k: _flat(v) for k, v in row.items() if not isinstance(v, dict)} for row in found]
    told = [k for k in dict.fromkeys(k for row in plain for k in row) if len({row.get(k) for row in plain} - {"", None}) > 1]
    names = [n for n in FIRST if any(row.get(n) for row in plain)]
    names = [*names, *(n for n in told if n not in names)][:MAX_COLUMNS]
    numeric = [all(isinstance(row.get(n, 0), int | float) for row in plain) for n in names]
    rows = [[_cell(row.get(n, "")) for n in names] for row in plain]
    return Timings([one_line(n, 40) for n in names], numeric, rows, len(lines))


def _flat(value: Any) -> Any:
    """A list as text; the rest as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _cell(value: Any) -> str:
    return str(number(value)) if isinstance(value, float) else one_line(value, 120)


def facts(verdicts: Iterable[Verdict]) -> list[tuple[str, str]]:
    """(name, value) of the run's environments: the values that a name had, the commonest first."""
    seen: dict[str, Counter[str]] = {}
    for environment, count in Counter(tuple(v.environment.items()) for v in verdicts).items():
        for name, value in environment:
            seen.setdefault(name, Counter())[value] += count
    return [(one_line(name, 60), _values(values)) for name, values in list(seen.items())[:MAX_FACTS]]


def _values(values: Counter[str]) -> str:
    shown = [one_line(value, 120) for value, _ in values.most_common(3)]
    return "; ".join(shown) + (f"; and {len(values) - 3} more" if len(values) > 3 else "")


def when(info: RunInfo | None, journal_time: datetime) -> str:
    """When the run was, for people."""
    if info is None:
        return f"{journal_time:%Y-%m-%d %H:%M} UTC, by the journal's date (the folder has no run.json)"
    took = f", took {duration(info.seconds)}" if info.seconds else ""
    return f"{datetime.fromisoformat(info.started):%Y-%m-%d %H:%M} UTC{took}" + ("" if info.finished else ", not finished")


def states(ledger: Sequence[Cell]) -> list[tuple[str, int]]:
    """How many cells are in each state."""
    return [(str(state), n) for state, n in Counter(cell.state for cell in ledger).most_common()]


def state_of(cell: Cell) -> tuple[str, str]:
    """(words, css class) of a cell's state."""
    if cell.state is State.EXECUTED:
        return ("no longer executed", "red") if cell.stopped else ("executed", "green")
    return str(cell.state), "known" if cell.state is State.SKIPPED else "skipped"


def worst_first(ledger: Sequence[Cell]) -> list[Cell]:
    """What stopped, what never ran, then what ran, the longest ago first."""
    rank = {State.SKIPPED: 1, State.UNPLANNED: 2, State.CONTRACT: 4}
    return sorted(ledger, key=lambda c: (0 if c.stopped else rank.get(c.state, 3), c.last))


def why_not(cell: Cell) -> str:
    """The commonest refusal, or the run that went without it."""
    stopped = f"not in {cell.stopped}" if cell.stopped else ""
    refusal = f"{cell.reason} ({cell.refused} times)" if cell.reason else ""
    return "; ".join(filter(None, (stopped, refusal)))


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 4.5 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def headline(info: RunInfo | None, arch: str) -> list[tuple[str, str]]:
    """(name, value) of what the run was."""
    if info is None:
        return [("platform", one_line(arch, 80))] if arch else []
    found = [("platform", info.platform), ("tier", info.tier), ("plan", info.plan)]
    found += [("shard", "{} of {}".format(*info.shard))] if info.shard else []
    found += [("moecheck", info.version)] + ([("revision", info.revision)] if info.revision else [])
    return [(name, one_line(value, 80)) for name, value in found]


def strengths(reached: Mapping[str, Sequence[Ways]]) -> list[int]:
    """The strengths that some backend has."""
    return sorted({w.strength for ways in reached.values() for w in ways})


def by_strength(ways: Sequence[Ways]) -> dict[int, Ways]:
    """Strength -> its ways."""
    return {w.strength: w for w in ways}


def percent(ways: Ways) -> str:
    """Rounded down: 100 % means all."""
    return f"{int(1000 * ways.covered / ways.possible) / 10:g} %" if ways.possible else "not counted"


def widths(counts: Sequence[tuple[str, int]]) -> list[tuple[str, float, float]]:
    """(name, start, width) in percent of a bar with these parts."""
    total, start, parts = sum(n for _, n in counts) or 1, 0.0, []
    for name, n in counts:
        parts.append((name, round(start, 3), round(100 * n / total, 3)))
        start += 100 * n / total
    return parts


def first_of(data: Mapping[str, int] | None) -> str:
    """The commonest names of a fault's kills."""
    return one_line(", ".join(f"{name} {n}" for name, n in list((data or {}).items())[:3]), 120)
