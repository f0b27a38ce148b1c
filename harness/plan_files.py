"""Plans' files kept between runs of `moecheck plan`: planning is a pure function of the request and of this program.

The key holds the request, every source and configuration file, the distributions installed, and the environment variables that
a backend may read when it is imported. A kept file is believed only with its own digest; else the plan is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from harness import paths
from harness.reading import parse_json, regular

READ = ("CUDA", "MOECHECK", "TORCH", "TRITON")  # what the names of such variables begin with
METADATA = (".dist-info", ".egg-info")  # of a distribution: its folder, named after it and its version
SOURCES = Path(__file__).parents[1]
MAX_BYTES = 1 << 28  # of a plan: 150 bytes an item, more than a million of them
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Text:
    """A plan's file, and what is said about it."""

    content: str
    lines: tuple[str, ...]


def kept(where: Path | None, asked: Mapping[str, Any], make: Callable[[], Text], tell: Tell) -> Text:
    """`make`'s result for what is `asked`, plain data with `plugins` in it, from the folder `where` if it was made there
    before. Backends that come from elsewhere, by --plugin or an entry point, are not in the key: nothing is kept. tell: gets a
    sentence about a file that cannot be used or written."""
    if where is None or asked["plugins"] or entry_points(group=paths.GROUP):
        return make()
    mine = _sha(json.dumps(asked).encode())
    path = where / f"plan-{mine}-{_sha(_program().encode())}.json"
    try:
        if path.exists():
            return _read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        tell(f"{path}: not a plan that can be used ({type(error).__name__}: {error}); planned anew")
    made = make()
    try:
        _write(path, made)
        for old in set(where.glob(f"plan-{mine}-*.json")) - {path}:
            old.unlink(missing_ok=True)
    except OSError as error:
        tell(f"{path}: the plan is not kept: {error.strerror}")
    return made


def _read(path: Path) -> Text:
    head, _, content = regular(path, MAX_BYTES).partition(b"\n")
    data = parse_json(head)
    if data["digest"] != _sha(content):
        raise ValueError("its digest is another one")
    return Text(content.decode(), tuple(map(str, data["lines"])))


def _write(path: Path, made: Text) -> None:
    """In one step: a neighbour that plans the same reads a whole file or none."""
    content = made.content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(json.dumps({"digest": _sha(content), "lines": made.lines}).encode() + b"\n" + content)
    temporary.replace(path)


@cache
def _program() -> str:
    """What the plan of a request may hang on."""
    folders = [SOURCES / name for name in ("harness", "reference")]
    files = sorted(
        path for folder in (*folders, paths.CONFIGS) for path in folder.rglob("*") if path.suffix in (".py", ".yaml")
    )
    read = [[str(path), _sha(path.read_bytes())] for path in files]
    installed = sorted({name for place in sys.path for name in _names(Path(place)) if name.endswith(METADATA)})
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(READ))
    return json.dumps([sys.version, read, installed, variables])


def _names(place: Path) -> list[str]:
    return os.listdir(place) if place.is_dir() else []


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
