"""What a bundle says of itself. Read from strangers: every field is bounded, every name one of a few."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.config import Strict

SCHEMA = 1
MANIFEST, ENVIRONMENT, VERDICT = "manifest.json", "environment.json", "verdict.json"
REPORT, SCRIPT, INPUTS, EXPECTED = "report.txt", "repro.py", "inputs.safetensors", "expected.safetensors"
MAX_TEXT = 1 << 20  # bytes of a text file: a verdict may have as many on its way from the worker (worker/protocol.py)
MAX_TENSORS = 2 << 30  # bytes of inputs: the largest file that a GitHub release takes
MAX_EXPECTED = 8 << 20  # bytes of expectation and sigma: 64 tokens of hidden 7168 in float64
MAX_NAMES, MAX_DIMENSIONS = 256, 8

Name = Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,63}$")]
Text = Annotated[str, Field(max_length=2000)]
Extent = Annotated[int, Field(ge=0, le=2**40)]
FileName = Literal["environment.json", "verdict.json", "report.txt", "repro.py", "inputs.safetensors", "expected.safetensors"]


class File(Strict):
    """One file of the bundle: size in bytes, SHA-256 in hex."""

    bytes: Annotated[int, Field(ge=0, le=MAX_TENSORS + MAX_TEXT)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Buffer(Strict):
    """A tensor as the kernel gets it. dtype: torch's name; stride in elements; source: "file": its elements from the first to
    the last in memory stand flat in inputs.safetensors, types that other readers lack as uint8; "hash": repro.py draws it."""

    dtype: Name
    shape: Annotated[tuple[Extent, ...], Field(max_length=MAX_DIMENSIONS)]
    stride: Annotated[tuple[Extent, ...], Field(max_length=MAX_DIMENSIONS)]
    source: Literal["file", "hash"]


class Manifest(Strict):
    """standalone: repro.py calls the kernel by itself; note: why not. arch: where it was judged."""

    schema_version: Literal[1]
    moecheck: Text
    case_id: Annotated[str, Field(max_length=256)]
    backend: Name
    library: Text
    arch: Name
    standalone: bool
    note: Text
    files: Annotated[dict[FileName, File], Field(max_length=6)]
    tensors: Annotated[dict[Name, Buffer], Field(max_length=MAX_NAMES)]
