"""covering.py gives rows of covertable in its order, or every plan would change; they are a covering, and each is wanted."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys

import covertable
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from harness import covering
from harness.case import LIMITS
from harness.select import Grid, Table

SERVED = {
    "tokens": [1, 2, 17, 33, 128],
    "experts": [1, 4, 8, 128],
    "top_k": [1, 2, 8],
    "routing": ["renormalize", "deepseek_v3", "llama4"],
    "activation": ["swiglu", "relu2"],
    "fill": ["exact", "real"],
    "skew": ["uniform", "half"],
}


def by_covertable(axes: dict[str, list[int | str]], tables: list[Table], strength: int) -> list[dict[str, int | str]]:
    constraints = [
        {"operator": "fn", "requires": list(t.axes), "evaluate": lambda row, t=t: tuple(row[n] for n in t.axes) in t.allowed}
        for t in tables
    ]
    return list(covertable.make(axes, strength=strength, constraints=constraints))


def combinations(rows: list[dict[str, int | str]], strength: int) -> set[tuple[tuple[str, int | str], ...]]:
    return {some for row in rows for some in itertools.combinations(sorted(row.items()), strength)}


@pytest.mark.parametrize("strength", [2, 3])
def test_the_axes_of_a_layer_give_the_rows_of_covertable(strength: int) -> None:
    tables = Grid(SERVED, LIMITS).tables()
    assert len(tables) >= 3
    rows = covering.rows(SERVED, strength, [(t.axes, t.allowed) for t in tables])
    assert rows == by_covertable(SERVED, tables, strength)


@st.composite
def grids(draw: st.DrawFn) -> tuple[dict[str, list[int | str]], list[Table]]:
    """Three to five axes of two to four levels, and tables that forbid any part of two or three of them."""
    axes: dict[str, list[int | str]] = {f"a{i}": list(range(draw(st.integers(2, 4)))) for i in range(draw(st.integers(3, 5)))}
    tables = []
    for _ in range(draw(st.integers(0, 3))):
        names = tuple(draw(st.lists(st.sampled_from(sorted(axes)), min_size=2, max_size=3, unique=True)))
        keys = list(itertools.product(*(axes[name] for name in names)))
        tables.append(Table(names, frozenset(draw(st.lists(st.sampled_from(keys), min_size=1, unique=True)))))
    return axes, tables


@given(grids(), st.integers(2, 3))
@settings(max_examples=80, deadline=None)
def test_any_tables_give_the_rows_of_covertable(given: tuple[dict[str, list[int | str]], list[Table]], strength: int) -> None:
    """Half-filled rows from which nothing valid follows, rows that are given up, combinations that nobody can cover. Where
    covertable gives up, ours are fewer."""
    axes, tables = given
    theirs, ours = by_covertable(axes, tables, strength), covering.rows(axes, strength, [(t.axes, t.allowed) for t in tables])
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    event("the same" if same == len(theirs) else "given up")
    left = combinations(theirs[same:], strength) - combinations(theirs[:same], strength)
    assert len(ours) <= len(theirs)
    assert all(combinations([row], strength) & left for row in ours[same:])
    assert combinations(ours, strength) == combinations(theirs, strength)


def test_where_covertable_gives_up_rows_go_on() -> None:
    """c and d are both a ^ b, and e = 1 wants them to differ: no table with one axis free sees that it cannot."""
    axes: dict[str, list[int | str]] = {**{name: [0, 1] for name in "abcde"}, **{name: [0, 1, 2, 3] for name in "fgh"}}
    bits = list(itertools.product((0, 1), repeat=3))
    parity = frozenset((a, b, x) for a, b, x in bits if x == a ^ b)
    differ = frozenset((c, d, e) for c, d, e in bits if e == 0 or c != d)
    tables = [Table(tuple("abc"), parity), Table(tuple("abd"), parity), Table(tuple("cde"), differ)]
    ours, theirs = covering.rows(axes, 2, [(t.axes, t.allowed) for t in tables]), by_covertable(axes, tables, 2)
    assert combinations(ours, 2) == combinations(theirs, 2)
    assert {row["e"] for row in ours} == {0}
    assert len(ours) <= 2 * 4 * 4 < len(theirs), (len(ours), len(theirs))


@given(grids(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_possible_combination_is_in_a_row(given: tuple[dict[str, list[int | str]], list[Table]], strength: int) -> None:
    """Against all rows there are, one by one."""
    axes, tables = given
    every = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    valid = [row for row in every if all(tuple(row[n] for n in t.axes) in t.allowed for t in tables)]
    rows = covering.rows(axes, strength, [(t.axes, t.allowed) for t in tables])
    assert all(row in valid for row in rows)
    assert combinations(rows, strength) == combinations(valid, strength)


def test_the_hash_seed_does_not_matter() -> None:
    tables = [(t.axes, sorted(t.allowed)) for t in Grid(SERVED, LIMITS).tables()]
    program = f"from harness import covering; print(covering.rows({SERVED}, 2, {tables}))"
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    told = [subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout for env in seeds]
    assert told[0] == told[1]
    assert ast.literal_eval(told[0].decode()) == covering.rows(SERVED, 2, tables)
