"""covering.py is covertable with a memory: the same rows in the same order, or every plan would change."""

from __future__ import annotations

import itertools

import covertable
import pytest
from hypothesis import given, settings
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
@settings(max_examples=40, deadline=None)
def test_any_tables_give_the_rows_of_covertable(given: tuple[dict[str, list[int | str]], list[Table]], strength: int) -> None:
    """Half-filled rows from which nothing valid follows, rows that are given up, combinations that nobody can cover."""
    axes, tables = given
    assert covering.rows(axes, strength, [(t.axes, t.allowed) for t in tables]) == by_covertable(axes, tables, strength)
