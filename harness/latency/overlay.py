"""Which packages of an overlay folder a child cannot use: it was forked from a process that had imported them already."""

from __future__ import annotations

import sys
from importlib import metadata

DECISIVE = ("torch", "triton")  # what every backend computes with; beside them the backend's own library


def unused(overlay: str) -> dict[str, tuple[str, str]]:
    """Distribution -> (its version in the folder, the version in use), where the two differ and the module was imported from
    elsewhere. A distribution's module is taken to have its name."""
    found = {}
    for distribution in metadata.distributions(path=[overlay]):
        name = distribution.name
        module = sys.modules.get(name.lower().replace("-", "_"))
        if module is None or str(getattr(module, "__file__", "")).startswith(overlay):
            continue
        others = metadata.distributions(name=name, path=[p for p in sys.path if p != overlay])
        used = next((other.version for other in others), "unknown")
        if used != distribution.version:
            found[name] = distribution.version, used
    return found


def refusal(overlay: str, library: str) -> tuple[str, list[str]]:
    """(why a backend of this library cannot be timed with the folder, "" if it can; notes on what else is not used)."""
    kept = unused(overlay) if overlay else {}
    notes = [f"{name} {theirs} of {overlay} is not used: {used} was imported before" for name, (theirs, used) in kept.items()]
    decisive = [note for name, note in zip(kept, notes, strict=True) if name in (*DECISIVE, library)]
    return "; ".join(decisive), notes
