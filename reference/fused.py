"""The layer for few rows an expert, in one pass over the codes: decode, scale, multiply and sum without writing weights.

With 33 tokens and 384 experts every weight is used once or twice, so the time is that of reading it. Eager torch writes a
decoded weight, eight bytes or more for a code of one; compiled as one reduction, only codes and scales are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reference.activation import Activation
from reference.format import WHOLE, Format, Quantized
from reference.grid import MAX_TABLE_BITS
from reference.moe import finalize
from reference.routing import Routing


@dataclass(frozen=True)
class Stacked:
    """One weight matrix of all experts: codes [experts, rows, columns]; table: the float64 value of each code; scales
    [experts, row blocks, column blocks]; scale_table: of each scale code, None where scales are float32 values;
    divisor [experts] float64: the global scales, ones where there are none; block: columns sharing a scale."""

    codes: Tensor
    table: Tensor
    scales: Tensor
    scale_table: Tensor | None
    divisor: Tensor
    block: int


def stack(matrices: Sequence[Quantized]) -> Stacked:
    """Matrices of one format, shape and device, one an expert; ValueError for a format this cannot read in one pass."""
    fmt, first = matrices[0].format, matrices[0]
    if problem := refuses(fmt, first.shape):
        raise ValueError(f"{fmt.name}: {problem}")
    assert fmt.scaling is not None
    scales = torch.stack([q.scales for q in matrices if q.scales is not None])
    every = torch.arange(2**fmt.element.bits, device=first.codes.device)
    coded = None if scales.is_floating_point() else fmt.scaling.element.decode(torch.arange(256, device=scales.device))
    ones = torch.ones(len(matrices), dtype=torch.float64, device=first.codes.device)
    globals_ = [q.global_scale.double().reshape(()) for q in matrices if q.global_scale is not None]
    block = first.shape[1] // scales.shape[2]
    codes = torch.stack([q.codes for q in matrices])
    return Stacked(codes, fmt.element.decode(every), scales, coded, torch.stack(globals_) if globals_ else ones, block)


def refuses(fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why `stack` does not take such matrices, or None."""
    if fmt.scaling is None or fmt.element.bits > MAX_TABLE_BITS or fmt.scaling.zero_points:
        return "wanted codes of a byte at most, with scales and without zero points"
    rows, columns = fmt.scaling.group
    if rows not in (1, WHOLE) or (columns != WHOLE and shape[1] % columns):
        return f"wanted whole blocks of one row or of all rows, got {fmt.scaling.group} of {shape}"
    if fmt.scaling.global_group[0] != WHOLE and fmt.scaling.global_scale:
        return "wanted one global scale a matrix"
    return None


def matvec(w: Stacked, expert: Tensor, x: Tensor, compiled: bool = True) -> Tensor:
    """[slots, rows] float64: the weight of expert[s] times x[s], for expert [slots] int64 and x [slots, columns].

    Compiled (inductor: C++ on a CPU, Triton on a GPU) nothing of the weights' size is written; eagerly all of it is.
    """
    codes, scales = w.codes.unflatten(2, (-1, w.block)), w.scales.expand(-1, w.codes.shape[1], -1)
    product = _compiled(x.device.type) if compiled else _product
    return product(codes, w.table, scales, w.scale_table, expert, x.unflatten(1, (-1, w.block))) / w.divisor[expert, None]


def _product(codes: Tensor, table: Tensor, scales: Tensor, scale_table: Tensor | None, expert: Tensor, x: Tensor) -> Tensor:
    value = table[codes[expert].int()]
    scale = scales[expert].double() if scale_table is None else scale_table[scales[expert].int()]
    return (value * x.double().unsqueeze(1) * scale.unsqueeze(-1)).sum((2, 3))


@cache
def _compiled(device: str) -> Callable[..., Tensor]:
    """On a GPU instructions are what it waits for: no checks of indices that are codes, block sizes tried out, sizes known."""
    cuda = device == "cuda"
    options: dict[str, str | int | bool | Callable[..., object]] | None
    options = {"coordinate_descent_tuning": True, "assert_indirect_indexing": False} if cuda else None
    return torch.compile(_product, dynamic=not cuda, fullgraph=True, options=options)


def moe(x: Tensor, routing: Routing, weights: tuple[Stacked, ...], activation: Activation, compiled: bool = True) -> Tensor:
    """The layer [tokens, hidden] float64, as `reference.moe.moe` to 1e-12. x [tokens, hidden]; weights: (gate, up, down),
    or (gate, down) where the activation is not gated."""
    expert, top_k = routing.ids.flatten(), routing.ids.shape[1]
    rows = (x if x.is_cuda else x.double()).repeat_interleave(top_k, dim=0)  # a GPU converts faster than it reads
    first = [matvec(w, expert, rows, compiled) for w in weights[:-1]]
    middle = activation.combine(first[0], first[1] if len(first) > 1 else None)
    done = matvec(weights[-1], expert, middle, compiled)
    return finalize(done.view(*routing.ids.shape, done.shape[1]), routing.weights)
