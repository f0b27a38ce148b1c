"""Reads what strangers may have written: bounded, strict, nothing executed. What is wrong is a ValueError that says so."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 32  # a verdict nests 6 deep
MAX_INTEGER = 2**63 - 1  # what another reader of JSON keeps (RFC 8259, 6, speaks of doubles); no count here comes near
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)  # an open string runs to the end: linear on any text


@contextmanager
def opened(path: Path, limit: int, follow: bool = True) -> Iterator[BufferedReader]:
    """A regular file of at most `limit` bytes. ValueError for a pipe, a device, more bytes, or, unless `follow`, a symbolic
    link; OSError where it cannot be opened."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise ValueError("it is a symbolic link") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        if info.st_size > limit:
            raise ValueError(f"it has {info.st_size} bytes, at most {limit} are read")
        yield file


def regular(path: Path, limit: int, follow: bool = True) -> bytes:
    """The bytes of such a file."""
    with opened(path, limit, follow) as file:
        return file.read(limit)


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it, in UTF-8: no NaN, no number beyond a double or 64 bits, no key twice, MAX_DEPTH levels."""
    text = data.decode()
    depth = 0
    for token in _TOKEN.finditer(text) if text.count("[") + text.count("{") > MAX_DEPTH else ():
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded, object_pairs_hook=_unique)


def printable(text: str) -> str:
    """`text` without what drives a terminal or cannot be encoded: those characters are written as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is beyond a double")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > MAX_INTEGER:
        raise ValueError(f"the number {text:.40} is beyond 64 bits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it gives a key twice")
    return found
