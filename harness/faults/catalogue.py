"""Every planted fault and the clean subjects beside them: what the worker loads as a plugin."""

from __future__ import annotations

import importlib
import pkgutil

from harness.errors import PluginError
from harness.faults import bugs
from harness.faults.fault import Fault
from harness.faults.patched import CLEAN
from harness.twins import TWINS


def _collect() -> tuple[Fault, ...]:
    """Every planted fault, by name; PluginError if two have one name."""
    found: dict[str, Fault] = {}
    for info in pkgutil.iter_modules(bugs.__path__):
        module = importlib.import_module(f"{bugs.__name__}.{info.name}")
        for fault in module.FAULTS:
            if fault.name in found:
                raise PluginError(f"{module.__name__}: fault {fault.name!r} is already planted elsewhere; choose another name")
            found[fault.name] = fault
    return tuple(found[name] for name in sorted(found))


FAULTS = _collect()
# The clean subjects that are nowhere else: the twins, and what a fault's file builds on them.
BACKENDS = tuple({b.name: b for b in (*(t.backend() for t in TWINS), *(f.clean for f in FAULTS)) if b != CLEAN}.values())
