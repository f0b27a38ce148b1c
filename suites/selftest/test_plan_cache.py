"""Kept plans: the same rows without the work, and a file is never believed for being there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import covering, plan_cache
from harness.case import LIMITS, Limit
from harness.plan_cache import cached
from harness.select import Axes, Grid, Rows, Table, cover

AXES: dict[str, list[int | str]] = {"tokens": [1, 17], "experts": [1, 4], "top_k": [1, 2], "fill": ["real"]}
TABLES = Grid(AXES, LIMITS).tables()


class Counted:
    """`cover`, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, axes: Axes, tables: list[Table], strength: int) -> Rows:  # type: ignore[override]
        self.calls += 1
        return cover(axes, tables, strength)


def test_the_second_time_nothing_is_computed(tmp_path: Path) -> None:
    make, told = Counted(), []
    first = cached(tmp_path, told.append, make)(AXES, TABLES, 2)
    again = cached(tmp_path, told.append, make)(AXES, TABLES, 2)
    assert first == again == cover(AXES, TABLES, 2)
    assert [list(row) for row in again] == [list(row) for row in again]
    assert (make.calls, told) == (1, [])


def test_whatever_decides_the_rows_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Counted()
    rows = cached(tmp_path, print, make)
    stricter = Grid(AXES, (*LIMITS, Limit(("tokens",), lambda c: "no" if c.shape.tokens == 17 else None))).tables()
    other = {**AXES, "tokens": [1, 18]}
    for arguments in ((AXES, TABLES, 2), (AXES, TABLES, 1), (AXES, stricter, 2), (other, TABLES, 2)):
        assert rows(*arguments) == cover(*arguments)
    assert make.calls == 4
    monkeypatch.setattr(covering, "RULE", "4.0")
    rows(AXES, TABLES, 2)
    assert make.calls == 5


def edited(change: Callable[[dict[str, object]], object], sign: bool = False) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        if sign:
            data["digest"] = plan_cache._digest(data["rows"])
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(path.read_text()[:-20]),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: (path.unlink(), path.mkdir()),
        edited(lambda data: data["rows"].pop()),  # type: ignore[attr-defined]
        edited(lambda data: data.update(key="another")),
        edited(lambda data: data["rows"][0].__setitem__(0, 9), sign=True),  # type: ignore[index]
        edited(lambda data: data["rows"][0].__setitem__(0, -1), sign=True),  # type: ignore[index]
        edited(lambda data: data["rows"][0].pop(), sign=True),  # type: ignore[index]
        edited(lambda data: data["rows"].append([0, 0, 1, 0]), sign=True),  # type: ignore[attr-defined]
        edited(lambda data: data.update(rows=[["x"]]), sign=True),
    ],
    ids=["torn", "bytes", "list", "empty", "folder", "a row less", "key", "level", "negative", "short", "forbidden", "text"],
)
def test_a_spoilt_file_is_planned_anew_with_a_note(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    """experts 1 with top_k 2 is what a limit forbids."""
    make, told = Counted(), []
    rows = cached(tmp_path, told.append, make)
    wanted = rows(AXES, TABLES, 2)
    (path,) = tmp_path.iterdir()
    spoil(path)
    assert rows(AXES, TABLES, 2) == wanted
    assert make.calls == 2
    assert str(path) in told[0]
    assert "planned anew" in told[0]
    if path.is_file():
        assert rows(AXES, TABLES, 2) == wanted
        assert make.calls == 2  # and the file is whole again


def test_a_folder_that_cannot_be_written_costs_the_time_only(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    told: list[str] = []
    assert cached(tmp_path / "taken", told.append)(AXES, TABLES, 2) == cover(AXES, TABLES, 2)
    assert "not kept" in told[-1]


def test_without_a_folder_it_is_the_plain_function() -> None:
    assert cached(None, print) is cover
