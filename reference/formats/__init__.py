"""One number format a file, found by folder: a module here that defines `FORMATS` is registered by being here.

Modules whose name begins with an underscore are shared by formats and hold none. `all_formats` are the logical formats;
the other ways in which libraries pick the codes of a format are its `variants`, named `<format>:<rule>`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from reference.format import Format


@cache
def all_formats() -> dict[str, Format]:
    """Every format of this folder by name. Two files that claim one name are an error."""
    found: dict[str, Format] = {}
    modules = (m for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    for module in sorted(modules, key=lambda m: m.name):
        for fmt in importlib.import_module(f"{__name__}.{module.name}").FORMATS:
            if fmt.name in found:
                raise ValueError(f"format {fmt.name!r} is defined twice (second time in {module.name}.py)")
            found[fmt.name] = fmt
    return found


def get(name: str) -> Format:
    """The format called `name`, or the variant called `format:rule`; KeyError with the known names otherwise."""
    formats = all_formats()
    base, _, rule = name.partition(":")
    if base not in formats:
        raise KeyError(f"format {name!r} unknown; known: {', '.join(formats)}")
    return formats[base].using(rule) if rule else formats[base]
