"""One number format a file, found by folder: a module here that defines `FORMATS` is registered by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from reference.format import Format


@cache
def all_formats() -> dict[str, Format]:
    """Every format of this folder by name. Two files that claim one name are an error."""
    found: dict[str, Format] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for fmt in importlib.import_module(f"{__name__}.{module.name}").FORMATS:
            if fmt.name in found:
                raise ValueError(f"format {fmt.name!r} is defined twice (second time in {module.name}.py)")
            found[fmt.name] = fmt
    return found


def get(name: str) -> Format:
    """The format called `name`; KeyError with the known names otherwise."""
    formats = all_formats()
    if name not in formats:
        raise KeyError(f"format {name!r} unknown; known: {', '.join(formats)}")
    return formats[name]
