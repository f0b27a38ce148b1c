"""A projection's weights as a library keeps them: packed codes, block scales in their layout, one factor a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.twins.memory import load
from reference.format import WHOLE, Format, Quantized, expand_blocks
from reference.grid import FLOATS
from reference.layouts.linear import pack_nibbles
from reference.layouts.swizzle_128x4 import COLUMNS, ROWS, padded_shape, swizzle


@dataclass
class Stack:
    """All experts' matrices of one projection: `codes` [experts, rows, columns (/ 2 for 4-bit codes)]; `scales` flat, or None
    for plain and per-row formats; `factors` float32 [experts, rows]: 1 / global scale, or the scale of the row."""

    fmt: Format
    experts: int
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor | None
    factors: Tensor
    swizzled: bool

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.fmt.scaling.group[1] if self.fmt.scaling is not None and self.scales is not None else self.columns

    @property
    def blocks(self) -> int:
        """Scale columns of a matrix."""
        return -(-self.columns // self.group)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The tensors by name: w13, w13_scales, w13_factors."""
        found = {name: self.codes, f"{name}_scales": self.scales, f"{name}_factors": self.factors}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def tile(self, expert: int, n: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """float32 [len(n), len(k)]: rows `n` and columns `k` of one expert's matrix, 0 where `mask` [len(n), len(k)] is off."""
        values = self.element(self.code_offsets(expert, n, k), k, mask)
        return values * self.scale(expert, n, k, mask) * self.factor(expert, n)[:, None]

    def code_offsets(self, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """Where the codes of [n, k] lie, counted in codes."""
        return ((expert * self.rows + n) * self.columns)[:, None] + k

    def element(self, offsets: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """The unscaled values of the codes at `offsets`."""
        if self.fmt.torch_dtype is not None:
            return load(self.codes, offsets, mask).float()
        codes = load(self.codes, offsets, mask) if self.fmt.element.bits == 8 else self._nibbles(offsets, mask)
        return torch.where(mask, _table(self.fmt.element)[codes.long()], 0.0)

    def _nibbles(self, offsets: Tensor, mask: Tensor) -> Tensor:
        pairs = load(self.codes, offsets // 2, mask)
        return torch.where(offsets % 2 == 0, pairs & 0xF, pairs >> 4)

    def scale(self, expert: int, n: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """float32 [len(n), len(k)]: the block scales; 1 where the format has none."""
        if self.scales is None or self.fmt.scaling is None:
            return torch.ones(())
        raw = load(self.scales, self.scale_offsets(expert, n, k // self.group), mask)
        if self.fmt.scaling.element is FLOATS["fp32"]:
            return raw
        return torch.where(mask, _table(self.fmt.scaling.element)[raw.long()], 0.0)

    def scale_offsets(self, expert: int, n: Tensor, block: Tensor) -> Tensor:
        """Where the scales of rows n and scale columns `block` lie: row-major, or in 128x4 tiles per expert."""
        if not self.swizzled:
            return ((expert * self.rows + n) * self.blocks)[:, None] + block
        rows, columns = padded_shape(self.rows, self.blocks)
        tile = (n // ROWS)[:, None] * (columns // COLUMNS) + block // COLUMNS
        inside = ((n % 32) * 16 + (n % ROWS) // 32 * 4)[:, None] + block % COLUMNS
        return expert * rows * columns + tile * (ROWS * COLUMNS) + inside

    def factor(self, expert: int, n: Tensor) -> Tensor:
        """float32 [len(n)]."""
        return load(self.factors, expert * self.rows + n, n < self.rows)


_TABLES: dict[object, Tensor] = {}


def _table(element: object) -> Tensor:
    """float32 [2 ** bits]: the value of every code; nothing of an element is on its table's path but its decoder."""
    if element not in _TABLES:
        codes = torch.arange(1 << element.bits, dtype=torch.int32).to(torch.uint8)  # type: ignore[attr-defined]
        _TABLES[element] = element.decode(codes).float()  # type: ignore[attr-defined]
    return _TABLES[element]


def build(experts: Sequence[Sequence[Quantized]], order: Callable[[Tensor], Tensor], swizzled: bool) -> Stack:
    """Stack the parts (gate, up or up, gate; or one) of every expert and put their rows into `order` (a function of the
    stacked rows [rows, ...] that gives the physical rows)."""
    fmt = experts[0][0].format
    codes = torch.stack([order(torch.cat([q.codes for q in parts])) for parts in experts])
    rows, columns = codes.shape[1:]
    factors = torch.stack([order(torch.cat([_factors(q) for q in parts])) for parts in experts])
    scales = None
    if fmt.scaling is not None and fmt.scaling.group[1] != WHOLE:
        logical = [order(torch.cat([_row_scales(q) for q in parts])) for parts in experts]
        scales = torch.cat([swizzle(s) for s in logical]) if swizzled else torch.stack(logical)
    if fmt.torch_dtype is None and fmt.element.bits == 4:
        codes = pack_nibbles(codes)
    return Stack(fmt, len(experts), rows, columns, codes.contiguous(), scales, factors, swizzled)


def _row_scales(q: Quantized) -> Tensor:
    """[rows, column blocks]: a scale of several rows is repeated for each."""
    assert q.scales is not None
    assert q.format.scaling is not None
    return expand_blocks(q.scales, (q.shape[0], q.scales.shape[1]), (q.format.scaling.group[0], 1))


def _factors(q: Quantized) -> Tensor:
    """float32 [rows]."""
    rows = q.shape[0]
    if q.global_scale is not None:
        return (1 / q.global_scale.float()).expand(rows)
    if q.scales is not None and q.format.scaling is not None and q.format.scaling.group[1] == WHOLE:
        scales = q.scales if q.format.scaling.element is FLOATS["fp32"] else q.format.scaling.element.decode(q.scales)
        return scales.float().expand(rows, 1)[:, 0]
    return torch.ones(rows)
