"""Planted faults, one real bug each: every file here defines FAULTS. `--plugin FILE.py` adds yours the same way.

A fault reproduces the historical mechanism inside a twin (or in our Triton kernels), not merely its symptom.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.errors import PluginError
from harness.faults.fault import Fault
from harness.twins import TWINS

TOOLS = ("campaign", "fault", "patched", "score", "rules", "mde", "wrong_layers", "matrix")  # files here that plant nothing


def _collect() -> tuple[Fault, ...]:
    """Every planted fault, by bug and name; PluginError if two have one name."""
    found: dict[str, Fault] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name in TOOLS:
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        for fault in module.FAULTS:
            if fault.name in found:
                raise PluginError(f"{module.__name__}: fault {fault.name!r} is already planted elsewhere; choose another name")
            found[fault.name] = fault
    return tuple(found[name] for name in sorted(found))


FAULTS = _collect()
BACKENDS = tuple(twin.backend() for twin in TWINS)  # the clean subjects
