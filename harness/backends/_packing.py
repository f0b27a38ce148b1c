"""Weights of all experts of a rank, stacked as kernel libraries want them: nibble pairs, block scales, one factor a matrix.

Rows stay in logical order; a library's own order (interleaves, swizzles, shuffles) is applied by its backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.case import Case
from harness.inputs import Inputs
from reference.format import WHOLE, Format, Quantized
from reference.formats import get
from reference.layouts.linear import pack_nibbles

TOGETHER = 1 << 24  # codes of the matrices that are stored at once: what a GPU does in one launch


@dataclass(frozen=True)
class Stack:
    """One projection of a rank's experts: `data` [experts, rows, columns (/ 2 for 4-bit codes, low nibble first)]; `scales`
    [experts, row blocks, column blocks], codes or float32 as the format has them; `zeros` likewise; float32 `factors`
    [experts, parts], `parts` matrices lying one above the other: 1 / global scale, or the one scale of a per-tensor format."""

    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factors: Tensor | None

    @classmethod
    def empty(cls, like: Quantized, experts: int, parts: int) -> Stack:
        """Room for `parts` matrices such as `like` of each expert, filled by `put`: no second copy of all weights is held."""
        (rows, columns), fmt, device = like.shape, like.format, like.codes.device
        columns = columns * fmt.element.bits // 8 if fmt.element.bits == 4 else columns
        data = torch.empty((experts, parts * rows, columns), dtype=like.codes.dtype, device=device)
        scales = zeros = factors = None
        if like.scales is not None and not whole(fmt):
            blocks = (experts, parts * like.scales.shape[0], like.scales.shape[1])
            scales = torch.empty(blocks, dtype=like.scales.dtype, device=device)
            zeros = None if like.zeros is None else torch.empty(blocks, dtype=like.zeros.dtype, device=device)
        if whole(fmt) or like.global_scale is not None:
            factors = torch.empty((experts, parts), dtype=torch.float32, device=device)
        return cls(data, scales, zeros, factors)

    def put(self, first: int, part: int, matrices: Sequence[Quantized]) -> None:
        """Store one matrix each as part `part` of the rank's experts number `first` and following."""
        like, experts = matrices[0], slice(first, first + len(matrices))
        codes = torch.stack([q.codes for q in matrices])
        rows = slice(part * like.shape[0], (part + 1) * like.shape[0])
        self.data[experts, rows] = pack_nibbles(codes) if like.format.element.bits == 4 else codes
        for room, name in ((self.scales, "scales"), (self.zeros, "zeros")):
            if room is not None:
                blocks = torch.stack([getattr(q, name) for q in matrices])
                room[experts, part * blocks.shape[1] : (part + 1) * blocks.shape[1]] = blocks
        if self.factors is not None:
            self.factors[experts, part] = factors(matrices)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The tensors by name: w13, w13_scales, w13_zeros, w13_factors."""
        named = {name: self.data, f"{name}_scales": self.scales, f"{name}_zeros": self.zeros, f"{name}_factors": self.factors}
        return {key: tensor for key, tensor in named.items() if tensor is not None}


def whole(fmt: Format) -> bool:
    """Has the format one scale for a whole matrix?"""
    return fmt.scaling is not None and fmt.scaling.group == (WHOLE, WHOLE)


def factor(q: Quantized) -> Tensor:
    """float32 []: what a whole matrix is multiplied by, 1 / global scale (encode sense) or its one scale."""
    return factors([q])[0]


def factors(matrices: Sequence[Quantized]) -> Tensor:
    """`factor` of each, [n]."""
    if matrices[0].global_scale is not None:
        return 1 / torch.stack([q.global_scale.reshape(()) for q in matrices if q.global_scale is not None]).float()
    return torch.stack([q.scales.reshape(()) for q in matrices if q.scales is not None]).float()


def pack(case: Case, inputs: Inputs, up_first: bool = False, one_factor: bool = False) -> tuple[Stack, Stack]:
    """(w13, w2) of the rank's experts: gate rows above up rows, or below with `up_first`; `one_factor`: both halves brought
    to one factor (`joint`), kept in every column of `factors`."""
    gate, up, down = inputs.stored(inputs.local.start)
    w13 = Stack.empty(gate, len(inputs.local), 1 if up is None else 2)
    w2 = Stack.empty(down, len(inputs.local), 1)
    together = max(1, TOGETHER // gate.codes.numel())
    for start in range(0, len(inputs.local), together):
        found = [inputs.stored(expert) for expert in inputs.local[start : start + together]]
        halves = [[q for q in matrices[:2] if q is not None] for matrices in found]
        halves = [joint(own) for own in halves] if one_factor else halves
        for part, own in enumerate(zip(*(own[::-1] if up_first else own for own in halves), strict=True)):
            w13.put(start, part, own)
        w2.put(start, 0, [matrices[2] for matrices in found])
    return w13, w2


def biases(inputs: Inputs, dtype: torch.dtype, up_first: bool = False) -> dict[str, Tensor]:
    """w13_bias [experts, rows of w13] and w2_bias [experts, hidden] of the rank's experts, in the order of `pack`; nothing
    where there are none. 16-bit types hold them as they are."""
    if inputs.case.bias == "nobias":
        return {}
    halves = [[b for b in inputs.gate_up_bias(expert) if b is not None] for expert in inputs.local]
    first = torch.stack([torch.cat(parts[::-1] if up_first else parts) for parts in halves])
    second = torch.stack([b for expert in inputs.local if (b := inputs.down_bias(expert)) is not None])
    return {"w13_bias": first.to(dtype), "w2_bias": second.to(dtype)}


def joint(halves: Sequence[Quantized]) -> list[Quantized]:
    """The same values with one factor for all: what a checkpoint's loader does for a kernel that takes one per expert. The
    factors differ by powers of two (harness/fills.py), so scales or codes are shifted without rounding; ValueError if not."""
    if halves[0].global_scale is None and not whole(halves[0].format):
        return list(halves)
    for target in sorted({float(factor(q)) for q in halves}):
        shifted = [_shifted(q, target) for q in halves]
        if all(torch.equal(q.format.decode(q), p.format.decode(p)) for q, p in zip(halves, shifted, strict=True)):
            return shifted
    raise ValueError(f"{halves[0].format.name}: the halves' factors {[float(factor(q)) for q in halves]} have no common form")


def _shifted(q: Quantized, target: float) -> Quantized:
    """`q` with the factor `target`: its block scales, or its codes where it has one scale, carry the difference."""
    fmt, ratio = q.format, float(factor(q)) / target
    assert fmt.scaling is not None
    if whole(fmt):
        codes = fmt.element.encode(fmt.element.decode(q.codes) * ratio).to(q.codes.dtype)
        return replace(q, codes=codes, scales=torch.full_like(q.scales, target))  # type: ignore[arg-type]
    assert q.global_scale is not None
    scales = fmt.scaling.element.encode(fmt.scale_values(q) * ratio).to(torch.uint8)
    return replace(q, scales=scales, global_scale=q.global_scale * ratio)


def group_of(case: Case) -> int:
    """Columns that share a block scale of the weights: 1 where the format has none along a row."""
    scaling = get(case.recipe.weights).scaling
    return 1 if scaling is None else scaling.group[1] or 1
