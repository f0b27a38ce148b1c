"""Opens a stranger's bundle. Nothing in it is executed, unpickled, or followed out of its folder; all of it is bounded."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from harness.bundle import manifest as m
from harness.bundle.standalone import STORED
from harness.case import Case
from harness.config import Strict
from harness.errors import BundleError, MoecheckError
from harness.journal import typed
from harness.reading import opened, parse_json, printable, regular
from harness.verdict import Verdict

REQUIRED = {m.ENVIRONMENT, m.VERDICT, m.REPORT, m.SCRIPT}
LIMITS = {m.INPUTS: m.MAX_TENSORS + m.MAX_TEXT, m.EXPECTED: m.MAX_EXPECTED + m.MAX_TEXT}  # bytes; MAX_TEXT for the rest
MAX_LAYER = 2**35  # elements of a layer: twice Kimi-K2's (384 experts of 3 x 7168 x 2048)
HEADER_BYTES = 8  # of a safetensors file: the size of its JSON header
T = TypeVar("T")


class _Entry(Strict):
    """One tensor of a safetensors header."""

    dtype: Literal["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"]
    shape: Annotated[tuple[m.Extent, ...], Field(max_length=m.MAX_DIMENSIONS)]
    data_offsets: tuple[m.Extent, m.Extent]


_HEADER = TypeAdapter(Annotated[dict[str, _Entry], Field(max_length=m.MAX_NAMES)])
_ENVIRONMENT = TypeAdapter(dict[str, dict[str, str]])


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its manifest says."""

    manifest: m.Manifest
    case: Case
    verdict: Verdict
    environment: dict[str, dict[str, str]]


def read(folder: Path) -> Bundle:
    """The bundle in `folder`; BundleError names the file that is not what it should be."""
    path = folder / m.MANIFEST
    manifest = _checked(path, lambda: m.Manifest.model_validate(parse_json(regular(path, m.MAX_TEXT, follow=False))))
    if missing := REQUIRED.difference(manifest.files):
        raise BundleError(f"{path}: names no {', '.join(sorted(missing))}")
    case = _case(path, manifest.case_id)
    data: dict[str, bytes] = {}
    files = {str(name): entry for name, entry in manifest.files.items()}
    for name, entry in files.items():
        data[name] = _checked(folder / name, partial(_verified, folder / name, entry))
    verdict = _checked(folder / m.VERDICT, lambda: _verdict(data[m.VERDICT], manifest))
    facts = _checked(folder / m.ENVIRONMENT, lambda: _ENVIRONMENT.validate_python(parse_json(data[m.ENVIRONMENT])))
    stored = {name for name, buffer in manifest.tensors.items() if buffer.source == "file"}
    for name, tensors in ((m.INPUTS, stored), (m.EXPECTED, {"value", "sigma", "ambiguous"})):
        if name in files:
            _checked(folder / name, partial(_tensors, data[name], files[name].bytes, tensors))
        elif name == m.INPUTS and stored:
            raise BundleError(f"{path}: names no {name}, which it says holds {printable(', '.join(sorted(stored)))[:200]}")
    return Bundle(manifest, case, verdict, facts)


def _checked(path: Path, parse: Callable[[], T]) -> T:
    """`parse()`, every complaint of it as a BundleError that names the file."""
    try:
        return parse()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; give a folder made by moecheck repro --bundle") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = printable(".".join(map(str, first["loc"]))[:200])
        raise BundleError(f"{path}: {place}: {printable(first['msg'])[:300]}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: {type(error).__name__}: {printable(str(error))[:300]}") from error


def _verified(path: Path, entry: m.File) -> bytes:
    """The text, or of a tensor file its first MAX_TEXT bytes, of a file with the size and the hash of the manifest."""
    with opened(path, LIMITS.get(path.name, m.MAX_TEXT), follow=False) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise ValueError(f"it has {size} bytes, the manifest says {entry.bytes}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise ValueError("its SHA-256 is not the manifest's: it was changed or damaged")
        file.seek(0)
        return file.read(m.MAX_TEXT)


def _case(path: Path, text: str) -> Case:
    try:
        case = Case.parse(text)
    except MoecheckError as error:
        raise BundleError(f"{path}: case_id: {error}") from error
    shape = case.shape
    layer = shape.experts * (3 * shape.inter * shape.hidden + shape.tokens)
    if layer > MAX_LAYER:
        raise BundleError(f"{path}: case_id: a layer of {layer} elements; at most {MAX_LAYER} of a bundle are judged")
    return case


def _verdict(data: bytes, manifest: m.Manifest) -> Verdict:
    verdict = typed(parse_json(data))
    if (verdict.case_id, verdict.subject) != (manifest.case_id, manifest.backend):
        raise ValueError(f"it judges {verdict.subject!r:.80} on {verdict.case_id!r:.200}, the manifest another")
    return verdict


def _tensors(data: bytes, total: int, names: set[str]) -> None:
    """ValueError unless `data` begins a safetensors file of `total` bytes with exactly these tensors, each as large as its
    shape."""
    size = int.from_bytes(data[:HEADER_BYTES], "little")
    if size > len(data) - HEADER_BYTES:
        raise ValueError("it is no safetensors file: its header does not fit")
    header = _HEADER.validate_python(parse_json(data[HEADER_BYTES : HEADER_BYTES + size]))
    if set(header) != names:
        raise ValueError(f"it holds {sorted(header)!r:.200}, wanted {sorted(names)!r:.200}")
    for name, entry in header.items():
        begin, end = entry.data_offsets
        room = total - HEADER_BYTES - size
        if not begin <= end <= room or end - begin != math.prod(entry.shape) * STORED[entry.dtype].itemsize:
            raise ValueError(f"tensor {name!r:.80} does not lie where its header says")
