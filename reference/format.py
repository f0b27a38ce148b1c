"""What a number format is: an element grid, who shares a scale, and the rule that picks the codes.

A format is logical. Where the bytes lie (swizzles, nibble packing) is a layout's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.grid import MAX_TABLE_BITS, Element

WHOLE = 0  # in Scaling.group: the scale spans this whole axis


@dataclass(frozen=True)
class Scaling:
    """Block scales: `group` = (rows, columns) sharing one scale, WHOLE for the full axis; `element` is the scale's grid.

    `global_scale` says that one more float32 divides everything (the *encode* sense: 448 * 6 / amax in NVFP4).
    """

    element: Element
    group: tuple[int, int]
    global_scale: bool = False

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Logical [rows, columns] of the scale tensor of a [rows, columns] matrix; ragged last blocks count."""
        return tuple(1 if g == WHOLE else -(-n // g) for n, g in zip((rows, columns), self.group, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Golden:
    """One worked example: encoding `values` (one row) gives exactly `codes` and `scales`."""

    values: tuple[float, ...]
    codes: tuple[int, ...]
    scales: tuple[int | float, ...]
    global_scale: float | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix.

    `codes` [rows, columns]: one unpacked code per element (the value itself in a plain format); `scales`, shaped by
    `Scaling.scale_shape`: codes of the scale grid, or float32 values; `global_scale`: float32 [] in the encode sense.
    """

    format: Format
    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [rows, columns]."""
        rows, columns = self.codes.shape
        return rows, columns


@dataclass(frozen=True)
class Format:
    """A number format, complete: `encode(x, global_scale)` picks codes, `decode` gives them back.

    `ties` names the rounding of halves, `saturates` whether overflow clips; `goldens` are worked examples of the source.
    `torch_dtype` is set for plain formats only (codes are then the values themselves).
    """

    name: str
    element: Element
    scaling: Scaling | None
    ties: str
    saturates: bool
    source: str
    encoder: Callable[[Format, Tensor, Tensor | None], Quantized]
    goldens: tuple[Golden, ...] = ()
    torch_dtype: torch.dtype | None = None

    def encode(self, x: Tensor, global_scale: Tensor | None = None) -> Quantized:
        """Quantise x [rows, columns] (any float dtype). `global_scale`: float32 [], required iff the format has one."""
        wants = self.scaling is not None and self.scaling.global_scale
        if wants != (global_scale is not None):
            raise ValueError(f"{self.name}: global_scale must {'' if wants else 'not '}be given (encode sense, float32 [])")
        if x.dim() != 2:
            raise ValueError(f"{self.name}: encode wants [rows, columns], got shape {tuple(x.shape)}")
        return self.encoder(self, x, global_scale)

    def decode(self, q: Quantized, dtype: torch.dtype = torch.float64) -> Tensor:
        """[rows, columns]: code * block scale / global scale. Exact in float64; other dtypes round once per product."""
        if self.scaling is None:
            return q.codes.to(dtype)
        narrow = self.element.bits <= MAX_TABLE_BITS and dtype == torch.float64
        value = self.element.decode(q.codes, torch.float32 if narrow else dtype).to(dtype)  # exact, and half the traffic
        scale = self.scale_values(q, dtype)
        if q.global_scale is not None:
            scale = scale / q.global_scale.to(dtype)
        return _times_blocks(value, scale, self.scaling.group)

    def scale_values(self, q: Quantized, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block scales as numbers, global scale not applied."""
        assert self.scaling is not None
        assert q.scales is not None
        return q.scales.to(dtype) if q.scales.is_floating_point() else self.scaling.element.decode(q.scales, dtype)


def _times_blocks(value: Tensor, scale: Tensor, group: tuple[int, int]) -> Tensor:
    rows, columns = value.shape
    _, block = group
    if block not in (WHOLE, 1) and columns % block == 0 and scale.shape[0] == rows:
        return value.view(rows, -1, block).mul_(scale.unsqueeze(-1)).view(rows, columns)
    return value * expand_blocks(scale, (rows, columns), group)


def expand_blocks(scale: Tensor, shape: tuple[int, int], group: tuple[int, int]) -> Tensor:
    """Repeat each block scale over the block it covers: [blocks, blocks] -> `shape`."""
    for axis, (size, block) in enumerate(zip(shape, group, strict=True)):
        if block == WHOLE:
            scale = scale.expand(*(size if i == axis else n for i, n in enumerate(scale.shape)))
        elif block != 1:
            scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
    return scale


def block_amax(x: Tensor, group: tuple[int, int]) -> Tensor:
    """float32 max |x| of every block of x [rows, columns], NaN ignored; shape as `Scaling.scale_shape`."""
    magnitude = x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
    for axis, block in enumerate(group):
        size = magnitude.shape[axis]
        if block == WHOLE:
            magnitude = magnitude.amax(dim=axis, keepdim=True) if size else magnitude.new_zeros(_one(magnitude, axis))
        elif block != 1:
            magnitude = _pad(magnitude, axis, -size % block).unflatten(axis, (-1, block)).amax(dim=axis + 1)
    return magnitude


def _one(x: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(1 if i == axis else n for i, n in enumerate(x.shape))


def _pad(x: Tensor, axis: int, amount: int) -> Tensor:
    padding = [0, 0, 0, amount] if axis == 0 else [0, amount]
    return torch.nn.functional.pad(x, padding)
