"""What a platform file knows besides the axes of its plans: paddings, shapes of scales, integers, hazards, entry points.

A `backend` of these models is the name of a backend, or the dotted name of a library's function. A function that no backend
calls is a contract only: its facts are stated and checked for sense, nothing runs it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from harness.case import ACTIVATION_FORMATS, Case, Recipe
from harness.errors import MoecheckError, UnknownName

_PLAIN = re.compile(r"(?:(\d+) \* )?(tokens|hidden|inter|experts|top_k)(?: / (\d+))?")
_PADDED = re.compile(r"pad\(([^,()]+), (\d+)\)(?: / (\d+))?")
LINK = r"^(https://\S+|docs/findings\.md#\S+)$"


class Strict(BaseModel):
    """No key that we do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _recipe(text: str) -> str:
    try:
        return str(Recipe.parse(text))
    except MoecheckError as error:
        raise ValueError(str(error)) from error


def _release(text: str) -> str:
    try:
        return str(SpecifierSet(text))
    except InvalidSpecifier as error:
        raise ValueError(f"{error}; wanted e.g. >=0.6.11") from error


RecipeText = Annotated[str, AfterValidator(_recipe)]
Release = Annotated[str, AfterValidator(_release)]
Source = Annotated[str, Field(min_length=8)]


class Sourced(Strict):
    """A number and where it comes from."""

    value: int = Field(ge=1)
    source: Source


class Range(Strict):
    """A number's least and greatest value."""

    least: int = Field(default=1, ge=0)
    most: int = Field(ge=1)
    source: Source

    @model_validator(mode="after")
    def ordered(self) -> Range:
        """least <= most."""
        if self.least > self.most:
            raise ValueError(f"least {self.least} exceeds most {self.most}")
        return self


class Widths(Strict):
    """What one width of the weights must be a multiple of; None: any. hidden: the K of GEMM 1 and the rows of w2; gate_up: the
    rows of w13, 2 * inter with a gate; inter: the K of GEMM 2. padded: the library's caller pads, else the kernel refuses or
    is wrong. recipes: of these only, all without any."""

    backend: str
    hidden: int | None = Field(default=None, ge=1)
    gate_up: int | None = Field(default=None, ge=1)
    inter: int | None = Field(default=None, ge=1)
    recipes: tuple[RecipeText, ...] = ()
    padded: bool = False
    source: Source


class ScaleShape(Strict):
    """The shape of one physical scale buffer, or argument of a library's function, () for 0-d. Factors: `experts`, `2 * inter`,
    `hidden / 32` (rounding up), `pad(2 * inter, 128)`, `pad(hidden / 16, 4) / 4`. Entries of one buffer are alternatives.
    release: of the library, e.g. `>=0.6.11`; all without one."""

    backend: str
    recipe: RecipeText
    buffer: str
    shape: tuple[int | str, ...]
    release: Release = ""
    source: Source

    @field_validator("shape")
    @classmethod
    def readable(cls, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Every factor can be evaluated."""
        for factor in shape:
            if isinstance(factor, str) and not (_PLAIN.fullmatch(factor) or _padded(factor)):
                raise ValueError(f"{factor!r} is no factor; wanted e.g. experts, 2 * inter, hidden / 16, pad(hidden / 16, 4)")
        return shape

    def at(self, case: Case) -> tuple[int, ...]:
        """The sizes for a case."""
        return tuple(_factor(factor, case) for factor in self.shape)

    def holds(self, version: str) -> bool:
        """Is it the shape in this release of the library? Post- and prereleases count."""
        return SpecifierSet(self.release).contains(Version(version), prereleases=True)


def _padded(factor: str) -> re.Match[str] | None:
    match = _PADDED.fullmatch(factor)
    return match if match and _PLAIN.fullmatch(match[1]) else None


def _factor(factor: int | str, case: Case) -> int:
    if isinstance(factor, int):
        return factor
    if match := _padded(factor):
        to = int(match[2])
        return -(-_factor(match[1], case) // to) * to // int(match[3] or 1)
    plain = _PLAIN.fullmatch(factor)
    assert plain is not None
    return -(-int(plain[1] or 1) * int(getattr(case.shape, plain[2])) // int(plain[3] or 1))


class Integers(Strict):
    """What integer operators do to operands that a kernel may be handed and its author may not have thought of. division: of a
    negative number; shift: by the width of the type or more, or by a negative number."""

    division: Literal["truncate", "floor"]
    shift: Literal["masked", "clamped"]
    source: Source

    def quotient(self, dividend: int, divisor: int) -> int:
        """dividend / divisor for divisor > 0."""
        floor = dividend // divisor
        return floor + 1 if self.division == "truncate" and floor * divisor != dividend and dividend < 0 else floor

    def shifted(self, value: int, by: int) -> int:
        """The 32-bit word value << by: the low 5 bits of `by` count, or as an unsigned number it is at most 32."""
        unsigned = by & 0xFFFFFFFF
        return value << (unsigned & 31 if self.shift == "masked" else min(unsigned, 32)) & 0xFFFFFFFF


class Hazard(Strict):
    """A way to be wrong that was seen on this platform. backends: whose; release: of their library."""

    text: Source
    backends: tuple[str, ...] = ()
    release: Release = ""
    source: Source
    link: str = Field(pattern=LINK)


class Contract(Strict):
    """A library's entry point on this platform. routing: it is handed "ids" and weights, or routes "logits" by itself."""

    entry: str = Field(pattern=r"^[a-z_]\w*(\.\w+)+$")
    library: str
    recipes: tuple[RecipeText, ...] = Field(min_length=1)
    activation_format: str = "standard"
    routing: Literal["ids", "logits"] = "ids"
    release: Release = ""
    source: Source

    @field_validator("activation_format")
    @classmethod
    def known(cls, name: str) -> str:
        """A name of harness.case."""
        if name not in ACTIVATION_FORMATS:
            raise ValueError(str(UnknownName("activation format", name, ACTIVATION_FORMATS)))
        return name
