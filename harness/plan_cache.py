"""Rows of covering arrays, kept between runs: a three-way plan takes seconds a backend, and is a pure function.

The key holds everything that decides the rows: the levels, what each limit allows of them, the strength, covering.RULE.
A file is read back as a stranger's: checked against its key, its digest, the levels and the limits; else made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import covering
from harness.errors import MoecheckError
from harness.reading import parse_json, regular
from harness.select import Axes, Cover, Rows, Table, cover

SCHEMA = 1
MAX_BYTES = 1 << 24  # a row is 40 bytes: some hundred thousand of them
Tell = Callable[[str], object]


def cached(where: Path | None, tell: Tell, make: Cover = cover) -> Cover:
    """`make`, its results kept in the folder `where`; None: nothing is kept. tell: gets a sentence about a file that is not
    what it should be, or a folder that cannot be written; the plan is the same either way."""
    if where is None:
        return make

    def rows(axes: Axes, forbidding: Sequence[Table], strength: int) -> Rows:
        key = _key(axes, forbidding, strength)
        path = where / f"{key}.json"
        try:
            if path.exists():
                return _read(path, key, axes, forbidding)
        except (OSError, ValueError, KeyError, TypeError, IndexError, MoecheckError) as error:
            tell(f"{path}: not a plan that can be used ({type(error).__name__}: {error}); planned anew")
        made = make(axes, forbidding, strength)
        try:
            _write(path, key, axes, made)
        except OSError as error:
            tell(f"{path}: the plan is not kept: {error.strerror}")
        return made

    return rows


def _key(axes: Axes, forbidding: Sequence[Table], strength: int) -> str:
    tables = [[table.axes, sorted(map(str, table.allowed))] for table in forbidding]
    given = [SCHEMA, covering.RULE, strength, [[name, list(values)] for name, values in axes.items()], tables]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _write(path: Path, key: str, axes: Axes, rows: Rows) -> None:
    """In one step: a neighbour that plans the same reads a whole file or none."""
    levels = {name: list(values) for name, values in axes.items()}
    numbers = [[levels[name].index(row[name]) for name in levels] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"key": key, "digest": _digest(numbers), "rows": numbers}))
    temporary.replace(path)


def _read(path: Path, key: str, axes: Axes, forbidding: Sequence[Table]) -> Rows:
    """OSError, ValueError, KeyError, TypeError or IndexError for anything but the rows written for this key."""
    data: dict[str, Any] = parse_json(regular(path, MAX_BYTES))
    if data["key"] != key or data["digest"] != _digest(data["rows"]):
        raise ValueError("its digest or key is another one")
    if any(number < 0 for row in data["rows"] for number in row):
        raise ValueError("a level below the first")
    rows = [{name: axes[name][number] for name, number in zip(axes, row, strict=True)} for row in data["rows"]]
    for table in forbidding:
        if not all(tuple(row[name] for name in table.axes) in table.allowed for row in rows):
            raise ValueError(f"a row that a limit on {', '.join(table.axes)} forbids")
    return rows
