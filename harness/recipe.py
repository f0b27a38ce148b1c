"""A case's recipe: the formats of what the layer reads and writes, in one word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from harness.errors import CaseError, UnknownName
from reference.formats import all_formats


@dataclass(frozen=True, order=True)
class Recipe:
    """Format names of what the layer reads and writes: weights, activations, the input of GEMM 2, the output.

    Text: `weights[-acts[-middle[-out]]]`, trailing defaults dropped. Defaults: acts = weights where those are plain, else
    bf16; middle = acts; out = acts where plain, else bf16. The accumulator is the backend's: `Rounding.accumulate`. Where
    acts are quantised, the tokens' values are given in `out`'s type and are fixed points of the quantiser.
    """

    weights: str
    acts: str
    middle: str
    out: str

    @classmethod
    @lru_cache(maxsize=1024)  # a journal of 100,000 cases has a few dozen
    def parse(cls, text: str) -> Recipe:
        """The recipe written as `text`; CaseError if it has more than four parts, UnknownName for an unknown format."""
        parts = text.split("-")
        if len(parts) > 4 or not all(parts):
            raise CaseError(f"recipe {text!r} does not parse; wanted weights[-acts[-middle[-out]]], e.g. nvfp4 or mxfp4-fp16")
        for name in parts:
            if name not in all_formats():
                raise UnknownName("format", name, all_formats())
        weights = parts[0]
        acts = parts[1] if len(parts) > 1 else (weights if plain(weights) else "bf16")
        middle = parts[2] if len(parts) > 2 else acts
        out = parts[3] if len(parts) > 3 else (acts if plain(acts) else "bf16")
        return cls(weights, acts, middle, out)

    @property
    def carrier(self) -> str:
        """The plain format in which x is handed over."""
        return self.acts if plain(self.acts) else self.out

    @cached_property
    def _text(self) -> str:
        parts = [self.weights, self.acts, self.middle, self.out]
        while len(parts) > 1 and Recipe.parse("-".join(parts[:-1])) == self:
            parts.pop()
        return "-".join(parts)

    def __str__(self) -> str:
        return self._text


def plain(name: str) -> bool:
    """Has the format called `name` no scales?"""
    return all_formats()[name].scaling is None
