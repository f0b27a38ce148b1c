"""The coverage ledger: which cells have ever really run, when, on what; which were only skipped, and which nobody planned.

A cell is backend x recipe x activation format x arch. Pure: facts come from a history (`query.History.facts`) or from the
verdicts of one run (`facts_of`), promises from the platform files (`promises`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from harness.backends.base import Backend
from harness.config import Platform
from harness.history.rows import Run, row
from harness.matrix import Way, matrix
from harness.verdict import Verdict

Key = tuple[str, str, str, str]


class State(StrEnum):
    """How far a cell ever came."""

    EXECUTED = "executed"  # its kernel ran and the case was a test (harness/executed.py), at least once
    SKIPPED = "only ever skipped"  # planned, and always refused, held back by a contract, or a test of nothing
    UNPLANNED = "never planned"  # the platform file promises it, no run has had a case of it
    CONTRACT = "contract only"  # an entry point that no backend calls: nothing can run


@dataclass(frozen=True)
class Fact:
    """What verdicts say of one cell. last: when it last really ran, "" for never; device, library and run are of that run,
    executed and failed count its verdicts; asked: when it was last planned; stopped: the first later run of the same platform,
    tier and shard, at least half as large, in which it did not run, "" for none; reason: the commonest of the refusals after
    `last`, given `refused` times."""

    backend: str
    recipe: str
    activation_format: str
    arch: str
    last: str
    device: str
    library: str
    run: str
    executed: int
    failed: int
    asked: str
    stopped: str
    reason: str
    refused: int

    @property
    def key(self) -> Key:
        """The cell it speaks of."""
        return self.backend, self.recipe, self.activation_format, self.arch


@dataclass(frozen=True)
class Promise:
    """A cell that a platform file promises. ways: how it is judged there (harness/matrix.py)."""

    backend: str
    recipe: str
    activation_format: str
    arch: str
    ways: tuple[Way, ...]

    @property
    def key(self) -> Key:
        """The cell it speaks of."""
        return self.backend, self.recipe, self.activation_format, self.arch


@dataclass(frozen=True)
class Cell:
    """One cell of the ledger. ways: as promised, () for what ran without a promise; days: since it last really ran, None for
    never; the rest as in Fact."""

    backend: str
    recipe: str
    activation_format: str
    arch: str
    state: State
    ways: tuple[str, ...] = ()
    last: str = ""
    days: float | None = None
    device: str = ""
    library: str = ""
    run: str = ""
    executed: int = 0
    failed: int = 0
    asked: str = ""
    stopped: str = ""
    reason: str = ""
    refused: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "state": str(self.state), "ways": list(self.ways)}


def ledger(facts: Iterable[Fact], promises: Iterable[Promise], now: datetime) -> list[Cell]:
    """Every promised or seen cell once, by arch, backend, recipe. now: with its time zone."""
    seen = {fact.key: fact for fact in facts}
    promised = {promise.key: promise for promise in promises}
    keys = sorted({*seen, *promised}, key=lambda key: (key[3], *key[:3]))
    return [_cell(key, seen.get(key), promised.get(key), now) for key in keys]


def _cell(key: Key, fact: Fact | None, promise: Promise | None, now: datetime) -> Cell:
    ways = tuple(str(way) for way in promise.ways) if promise else ()
    if fact is None:
        return Cell(*key, State.CONTRACT if Way.CONTRACT in ways else State.UNPLANNED, ways)
    days = round((now - datetime.fromisoformat(fact.last)).total_seconds() / 86400, 3) if fact.last else None
    told = {name: value for name, value in vars(fact).items() if name not in ("backend", "recipe", "activation_format", "arch")}
    return Cell(*key, State.EXECUTED if fact.last else State.SKIPPED, ways, days=days, **told)


def promises(platforms: Iterable[Platform], backends: Mapping[str, Backend]) -> list[Promise]:
    """What the platform files promise, cell by cell."""
    found = ((platform.arch, cell) for platform in platforms for cell in matrix(platform, backends))
    return [Promise(cell.subject, cell.recipe, cell.activation_format, arch, cell.ways) for arch, cell in found]


def facts_of(verdicts: Iterable[Verdict], run: Run) -> list[Fact]:
    """What one run says of the cells it planned."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for one in (row(verdict, run) for verdict in verdicts):
        groups[one["subject"], one["recipe"], one["activation_format"], one["arch"]].append(one)
    return [_fact(key, group, run) for key, group in sorted(groups.items())]


def _fact(key: Key, group: list[dict[str, Any]], run: Run) -> Fact:
    here = [one for one in group if one["ran"]]
    refusals = Counter(f"{one['status']}: {one['reason']}" for one in group if not one["ran"])
    reason, refused = min(refusals.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
    ran = here[-1] if here else dict.fromkeys(("started", "device", "library", "run"), "")
    failed = sum(bool(one["failed"]) for one in here)
    seen = Fact(
        *key, ran["started"], ran["device"], ran["library"], ran["run"], len(here), failed, run.started, "", reason, refused
    )
    return seen if not here else replace(seen, reason="", refused=0)
