"""What a call returned, in words: list[bfloat16[33, 256]]. No value is looked at, so nothing waits for a device. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MOST = 400  # characters: a list of 40 tensors
MOST_PARTS = 8  # of a list that are described one by one


def form(value: object, depth: int = 2) -> str:
    """Type, length, shapes and dtypes: `none`, `bfloat16[33, 256]`, `tuple[...]`, the name of any other class."""
    if value is None:
        return "none"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    parts: list[str] | None = None
    if depth and isinstance(value, list | tuple):
        name = "list" if isinstance(value, list) else "tuple"
        parts = [form(v, depth - 1) for v in value[:MOST_PARTS]]
        parts += [f"and {len(value) - MOST_PARTS} more"] if len(value) > MOST_PARTS else []
    elif depth and isinstance(value, Mapping):
        name, parts = "dict", [f"{k}: {form(v, depth - 1)}" for k, v in list(value.items())[:MOST_PARTS]]
    return f"{name}[{', '.join(parts)}]"[:MOST] if parts is not None else type(value).__name__


def general(text: str) -> str:
    """A form without its sizes, as a release promises it: bfloat16[2d]."""
    return re.sub(r"\[((?:\d+(?:, )?)*)\]", lambda m: f"[{len(m[1].split(',')) if m[1] else 0}d]", text)


def kind(text: str) -> str:
    """Of a form: `list`, `tuple`, `dict`, `none`, `value` for a tensor, else the class."""
    head, bracket, _ = text.partition("[")
    return head if not bracket or head in ("list", "tuple", "dict") else "value"
