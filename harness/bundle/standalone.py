"""Embedded in every repro.py, below harness/hashing.py: tensors from file or hash, and the comparison. Only torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.hashing import Stream

# the types of a safetensors file (https://github.com/huggingface/safetensors, Format) that a bundle uses
STORED = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of header size, a JSON header, the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(bytearray(data[start + begin : start + end] or b"\0"), dtype=torch.uint8)
            found[name] = raw[: end - begin].clone().view(STORED[entry["dtype"]]).view(entry["shape"])
    return found


def laid_out(flat: Tensor, spec: dict[str, Any]) -> Tensor:
    """A buffer from its elements in memory order: its own dtype, shape and strides."""
    return flat.view(getattr(torch, spec["dtype"])).as_strided(spec["shape"], spec["stride"])


def drawn(name: str, draw: dict[str, Any], experts: range) -> Tensor:
    """x [tokens, hidden], w13 [experts, inter or 2 * inter (gate first), hidden] or w2 [experts, hidden, inter]: the random
    values of one seed, the same on any machine."""
    hidden, inter = draw["hidden"], draw["inter"]
    if name == "x":
        return _matrix(draw, "real/x", draw["tokens"], hidden)
    if name == "w2":
        return torch.stack([_matrix(draw, f"real.down.{e}", hidden, inter) for e in experts])
    halves = [half for half in ("gate", "up") if half in draw["factors"]]
    return torch.stack([torch.cat([_matrix(draw, f"real.{half}.{e}", inter, hidden) for half in halves]) for e in experts])


def _matrix(draw: dict[str, Any], name: str, rows: int, columns: int) -> Tensor:
    """Random bits as signs, mantissas and the low bits of a few exponents, times a power of two."""
    bits, mantissa = draw["bits"], draw["mantissa_bits"]
    field = Stream(draw["seed"], f"{name}/codes").raw(rows, columns, bits)
    exponent = draw["top_exponent"] - ((field >> mantissa) & (draw["binades"] - 1))
    codes = (field & ((1 << mantissa) - 1 - (1 << (bits - 1)))) | (exponent << mantissa)
    factor: float = draw["factors"][name.split(".")[1] if "." in name else "x"]
    values: Tensor = codes.contiguous().view(getattr(torch, draw["dtype"]))
    return values * factor


def compared(got: object, folder: Path, expected: dict[str, Any]) -> bool:
    """Print how far `got` is from the float64 expectation, in standard deviations of a right kernel; True if it is right or
    nothing is known. expected: shape, dtype, and file, exact, limit, mean_limit."""
    if not isinstance(got, Tensor) or [*got.shape] != expected["shape"] or str(got.dtype) != f"torch.{expected['dtype']}":
        print(f"MALFORMED: wanted {expected['dtype']} {expected['shape']}, got {got!r:.200}")  # noqa: T201
        return False
    if not expected["file"]:
        print(f"the call returned {[*got.shape]} {got.dtype}; this bundle holds no expectation")  # noqa: T201
        return True
    stored = read_tensors(folder / expected["file"])
    value, sigma, judged = stored["value"], stored["sigma"], ~stored["ambiguous"]
    error = (got.detach().cpu().double() - value).abs()
    z = torch.where(error == 0, 0.0, error / sigma)[judged]
    z = torch.where(error[judged].isfinite(), z, torch.inf)
    worst, mean = (float(z.max()), float(z[z.isfinite()].square().mean())) if z.numel() else (0.0, 0.0)
    beyond = int((z > expected["limit"]).sum())
    rule = "bits are due" if expected["exact"] else f"limit {expected['limit']:.2f}, of the mean {expected['mean_limit']:.2f}"
    print(f"worst z {worst:.6g}, mean z^2 {mean:.4g} ({rule}); {beyond} of {z.numel()} elements beyond")  # noqa: T201
    return beyond == 0 and (expected["exact"] or not mean > expected["mean_limit"])
