"""How much of each backend's space a run executed: in words, and as a file for readers without moecheck."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from harness.executed import Ways

SCHEMA = 1


def text(reached: Mapping[str, Sequence[Ways]]) -> str:
    """One line a backend."""
    width = max(map(len, reached), default=0)
    lines = [f"  {name:<{width}}  {', '.join(map(str, ways))}" for name, ways in reached.items()]
    return "\n".join(["Combinations of axis values that were executed, of those that are possible:", *lines])


def write(path: Path, reached: Mapping[str, Sequence[Ways]]) -> None:
    """{"schema": 1, "backends": {name: [{"strength", "covered", "possible"}]}}, in one step."""
    data = {"schema": SCHEMA, "backends": {name: [asdict(w) for w in ways] for name, ways in reached.items()}}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
