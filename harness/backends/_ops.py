"""What a library's quantiser or router returned, laid side by side as one matrix without changing a byte.

The bytes are moved only, so that memory which the kernel did not write stays recognisable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.case import Case, Limit
from harness.inputs import Inputs
from reference import layouts


def some_tokens(source: str) -> Limit:
    """For a kernel of a block a token: CUDA refuses a grid of none, and the error is the next launch's (docs/findings.md)."""

    def problem(case: Case) -> str | None:
        return None if case.shape.tokens else f"it launches a block a token, and CUDA refuses a grid of none ({source})"

    return Limit(("tokens",), problem)


def matrix(codes: Tensor, scales: Tensor) -> Tensor:
    """uint8 [tokens, bytes]: the bytes of codes [tokens, n] of any one-byte type, then those of scales [tokens or 1, groups]
    in logical order."""
    rows = len(codes)
    dense = scales.clone(memory_format=torch.contiguous_format).flatten()  # an empty tensor's strides may be anything
    raw = dense.view(torch.uint8).view(len(scales), scales.shape[1] * scales.element_size())
    return torch.cat((codes.view(torch.uint8), raw.expand(rows, -1)), 1)


def unswizzled(scales: Tensor, layout: str, shape: tuple[int, int]) -> Tensor:
    """One-byte scales [tokens, groups] = `shape` out of the storage of a layout of `reference.layouts`; padding is dropped."""
    return layouts.get(layout).unpack(scales.view(torch.uint8).reshape(-1), shape)


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    """int32 [tokens, 2 * top_k]: the ids, then the bits of float32 weights; int64 ids keep their low words, int32 ids and
    weights every bit."""
    return torch.cat((ids.to(torch.int32), weights.contiguous().view(torch.int32)), 1)


def global_scale(inputs: Inputs) -> Tensor:
    """float32 [1]: the scale of a static format, encode sense."""
    return torch.tensor([inputs.x_scale], dtype=torch.float32, device=inputs.x.device)
