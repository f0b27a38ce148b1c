"""One physical layout a file, found by folder: a module here that defines `LAYOUTS` is registered by being here."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from reference.layout import Layout


@cache
def all_layouts() -> dict[str, Layout]:
    """Every layout of this folder by name. Two files that claim one name are an error."""
    found: dict[str, Layout] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        for layout in importlib.import_module(f"{__name__}.{module.name}").LAYOUTS:
            if layout.name in found:
                raise ValueError(f"layout {layout.name!r} is defined twice (second time in {module.name}.py)")
            found[layout.name] = layout
    return found


def get(name: str) -> Layout:
    """The layout called `name`; KeyError with the known names otherwise."""
    layouts = all_layouts()
    if name not in layouts:
        raise KeyError(f"layout {name!r} unknown; known: {', '.join(layouts)}")
    return layouts[name]
