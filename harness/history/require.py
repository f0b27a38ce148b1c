"""`moecheck coverage --require FILE`: cells that must really have run within so many days."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from harness import config
from harness.errors import UnknownName
from harness.hardware import RecipeText, Source, Strict
from harness.history.ledger import Cell, Key, Promise
from harness.matrix import Way

MAX_DAYS = 3650.0


class Requirement(Strict):
    """Cells of one platform. backends: names, or patterns with *; recipe, activation_format: all that the platform promises for
    them where not given; days: how old the last real run may be, the file's where not given."""

    platform: str
    backends: tuple[str, ...] = Field(min_length=1)
    recipe: tuple[RecipeText, ...] = ()
    activation_format: str = "*"
    days: float | None = Field(default=None, gt=0, le=MAX_DAYS)
    why: Source

    @field_validator("platform")
    @classmethod
    def a_platform(cls, name: str) -> str:
        """A file under configs/platforms."""
        if name not in config.names("platforms"):
            raise ValueError(str(UnknownName("platform", name, config.names("platforms"))))
        return name

    @field_validator("backends")
    @classmethod
    def a_backend(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Each must match one of the backends that `load` was given: a misspelt one requires nothing."""
        known = (info.context or {}).get("backends", ())
        for name in names:
            if not any(fnmatchcase(backend, name) for backend in known):
                raise ValueError(str(UnknownName("backend", name, known)))
        return names

    @model_validator(mode="after")
    def of_something(self, info: ValidationInfo) -> Requirement:
        """Each backend and each recipe must take a cell that the platform promises: else it requires nothing."""
        promises: Sequence[Promise] = (info.context or {}).get("promises", ())
        parts = [{"backends": (name,)} for name in self.backends] + [{"recipe": (recipe,)} for recipe in self.recipe]
        for part in parts:
            if not any(self.model_copy(update=part).takes(promise) for promise in promises):
                ((text,),) = part.values()
                raise ValueError(f"cells that moecheck list --platform {self.platform} shows; {text} takes none here")
        return self

    def takes(self, promise: Promise) -> bool:
        """Does it speak of that cell, and can something run there?"""
        named = any(fnmatchcase(promise.backend, name) for name in self.backends) and promise.arch == self.platform
        of_recipe = not self.recipe or promise.recipe in self.recipe
        of_format = fnmatchcase(promise.activation_format, self.activation_format)
        return named and of_recipe and of_format and promise.ways != (Way.CONTRACT,)


class Requirements(Strict):
    """The file. days: for every entry that gives none."""

    days: float = Field(gt=0, le=MAX_DAYS)
    require: tuple[Requirement, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Missing:
    """A required cell that has not really run within `allowed` days. entry: its place in the file, from 1."""

    cell: Cell
    allowed: float
    entry: int
    why: str

    def __str__(self) -> str:
        c = self.cell
        name = f"{c.backend} {c.recipe} {c.activation_format} on {c.arch}"
        if c.days is not None:
            return f"{name}: really ran {c.days:.1f} days ago, {self.allowed:g} are allowed" + (
                f"; {c.reason}" if c.reason else ""
            )
        return f"{name}: {c.state}" + (f": {c.reason}" if c.reason else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "cell": self.cell.to_json(), "text": str(self)}


def load(path: Path, backends: Iterable[str], promises: Sequence[Promise]) -> Requirements:
    """Read the file; ConfigError with file and line for what it should not say, and for an entry that names no cell."""
    return config.load(path, Requirements, {"backends": tuple(backends), "promises": tuple(promises)})


def missing(wanted: Requirements, cells: Iterable[Cell], promises: Iterable[Promise]) -> list[Missing]:
    """The required cells that did not really run in time, in the order of the file. cells: a ledger of these promises."""
    named = {(c.backend, c.recipe, c.activation_format, c.arch): c for c in cells}
    found: dict[Key, Missing] = {}
    promised = list(promises)
    for number, entry in enumerate(wanted.require, start=1):
        allowed = entry.days or wanted.days
        for promise in filter(entry.takes, promised):
            cell = named[promise.key]
            if cell.days is None or cell.days > allowed:
                found.setdefault(promise.key, Missing(cell, allowed, number, entry.why))
    return list(found.values())
