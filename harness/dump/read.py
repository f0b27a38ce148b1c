"""One folder of FlashInfer's flight recorder -> the call's arguments by name. Nothing in it is executed.

The format is that of flashinfer/api_logging.py, 0.6 to 0.7.2: metadata.jsonl, of which the last record counts, and
inputs.pt or inputs.safetensors with one tensor a key: arg_0, kwarg_name, kwarg_name__0 for what lies in a list.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.errors import MoecheckError
from harness.reading import opened, parse_json, printable, regular

METADATA = "metadata.jsonl"
MAX_METADATA = 1 << 24  # bytes; one record of a fused MoE call has some 10 KiB
MAX_TENSORS = 1 << 36  # bytes; the recorder stops at 20 GB in all (FLASHINFER_DUMP_MAX_SIZE_GB)
MAX_NAME = 200  # characters of a function's name, which messages repeat
MAX_SPREAD = 64  # times a tensor's elements that its strides may span
OPEN, CLOSE = "([{<", ")]}>"


class DumpError(MoecheckError):
    """A folder that is no dump, or one that says too little."""


@dataclass(frozen=True)
class Member:
    """A member of one of the library's enums: its numbers move between releases, its name does not."""

    enum: str
    name: str


@dataclass(frozen=True)
class Dump:
    """A recorded call. function: its name; arguments: by parameter name, tensors on the CPU with their strides; result: the
    tensors it returned in their order, None where the recorder never saw it return; versions: of flashinfer, torch, python;
    notes: what the recorder lost."""

    folder: Path
    function: str
    arguments: Mapping[str, Any]
    result: tuple[Tensor, ...] | None
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()


def folders(root: Path) -> list[Path]:
    """`root`, if it is one call's dump, or the dumps in it in the order of their names. DumpError if there are none."""
    if (root / METADATA).is_file():
        return [root]
    found = sorted(path.parent for path in root.glob(f"*/{METADATA}")) if root.is_dir() else []
    if not found:
        raise DumpError(f"{root}: no dump of FlashInfer; wanted a folder with {METADATA}, or one that holds such folders")
    return found


def read(folder: Path) -> Dump:
    """The call in `folder`; DumpError with the file for whatever is wrong."""
    record = _record(folder / METADATA)
    try:
        details = record["tensor_details"]
        tensors, notes = _tensors(folder, "inputs", details)
        notes += _devices({key: details[key]["device"] for key in tensors})
        given = {**{key: t for key, t in tensors.items() if "__" not in key}, **_values(record["input_metadata"], tensors)}
        arguments = _named(given, _parameters(record["function_signature"]))
        result = None
        if record["execution_status"] == "completed":
            result, more = _returned(folder, record)
            notes += more
        versions = {str(k): printable(str(v))[:100] for k, v in record["versions"].items()}
        function = printable(str(record["function_name"]))[:MAX_NAME]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"[:300]
        raise DumpError(f"{folder / METADATA}: not a record of FlashInfer's flight recorder: {printable(text)}") from error
    return Dump(folder, function, arguments, result, versions, notes)


def _record(path: Path) -> dict[str, Any]:
    try:
        lines = [line for line in regular(path, MAX_METADATA).splitlines() if line.strip()]
        record = parse_json(lines[-1]) if lines else None
    except (OSError, ValueError) as error:
        raise DumpError(f"{path}: cannot be read: {printable(str(error))[:300]}") from error
    if not isinstance(record, dict):
        raise DumpError(f"{path}: wanted a JSON object a line, as FlashInfer's flight recorder writes them")
    return record


def _tensors(folder: Path, kind: str, details: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of inputs or outputs with the strides they had, and what was lost."""
    for name, load in ((f"{kind}.pt", _unpickled), (f"{kind}.safetensors", _safe)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with opened(path, MAX_TENSORS) as file:
                found = load(file)
        except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            raise DumpError(f"{path}: cannot be read: {printable(str(error))[:300]}") from error
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise DumpError(f"{path}: wanted a dictionary of tensors")
        if name.endswith(".pt"):
            return found, ()
        placed = {key: _strided(t, details[key]["stride"]) for key, t in found.items()}
        lost = sorted(key for key, t in placed.items() if not t.is_contiguous())
        note = (f"{name} has no strides: {', '.join(lost)} are laid out again as the record says",) if lost else ()
        return placed, note
    raise DumpError(f"{folder}: neither {kind}.pt nor {kind}.safetensors; was the recorder killed before it wrote them?")


def _devices(found: Mapping[str, str]) -> tuple[str, ...]:
    """A note where the call's tensors were on several devices: here they will be on one."""
    places = sorted(set(found.values()), key=lambda place: -list(found.values()).count(place))
    if len(places) < 2:
        return ()
    odd = ", ".join(f"{key} on {place}" for key, place in found.items() if place != places[0])
    return (f"the arguments were on several devices: {odd}, the others on {places[0]}",)


def _returned(folder: Path, record: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The tensors that came back: keys result, result_1 of a tuple, result__1 of a list. No file is written where none did."""
    details = record["tensor_details"]
    if not any(key.startswith("result") for key in details):
        return (), ()
    found, notes = _tensors(folder, "outputs", details)
    return tuple(
        found[key] for key in sorted(found, key=lambda key: int(key.rpartition("_")[2] or 0) if "_" in key else 0)
    ), notes


def _unpickled(file: BufferedReader) -> Any:
    """weights_only: tensors and plain containers, no code."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _safe(file: BufferedReader) -> Any:
    return safetensors.torch.load(file.read())


def _strided(tensor: Tensor, stride: list[int]) -> Tensor:
    """The same values with these strides."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True)) if tensor.numel() else 0
    if tuple(stride) == tensor.stride():
        return tensor
    if min(stride, default=0) < 0 or span > MAX_SPREAD * max(1, tensor.numel()):
        raise ValueError(f"strides {stride} of a tensor of shape {list(tensor.shape)}")
    if span < tensor.numel():  # broadcast: one value at several places
        return tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)].expand(tensor.shape)
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _values(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is no plain tensor argument: numbers, dtypes, members of enums, lists of tensors."""
    return {key: _value(value, tensors) for key, value in metadata.items()}


def _value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value["type"]
    if kind == "torch.Tensor":
        return tensors[value["tensor_key"]]
    if kind == "torch.dtype":
        dtype = getattr(torch, str(value["value"]).removeprefix("torch."))
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['value']!r} is no dtype")
        return dtype
    if kind == "enum":
        enum, _, name = str(value["name"]).partition(".")
        return Member(enum, name)
    if kind in ("list", "tuple") and not value.get("truncated"):
        items = [_value(item, tensors) for item in value["items"]]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"a value of type {kind!r}, which the recorder keeps as text only")


def _named(given: Mapping[str, Any], parameters: list[str]) -> dict[str, Any]:
    """arg_3 -> the fourth parameter's name, kwarg_name -> name."""
    found = {}
    for key, value in given.items():
        place = re.fullmatch(r"arg_(\d{1,3})", key)
        name = parameters[int(place.group(1))] if place else key.removeprefix("kwarg_")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def _parameters(signature: str) -> list[str]:
    """The names in `str(inspect.signature(f))`, whose annotations and defaults need not be Python."""
    if len(signature) > MAX_METADATA // 64:
        raise ValueError("the signature is too long")
    names, depth, start = [], 0, 1
    for index, letter in enumerate(signature):
        depth += (letter in OPEN) - (letter in CLOSE and signature[index - 1] != "-")
        if (letter == "," and depth == 1) or depth == 0:
            names.append(re.split(r"[:=]", signature[start:index])[0].strip())
            start = index + 1
        if depth == 0:
            break
    return [name for name in names if name.isidentifier()]
