"""What a number format is: an element grid, who shares a scale, and the rule that picks the codes.

A format is logical. Where the bytes lie (swizzles, nibble packing) is a layout's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.grid import MAX_TABLE_BITS, Element, ElementType

WHOLE = 0  # in Scaling.group: the scale spans this whole axis


@dataclass(frozen=True)
class Scaling:
    """Block scales: `group` = (rows, columns) sharing one scale, WHOLE for the full axis; `element` is the scale's grid.

    `global_scale` says that one more float32 divides everything (the *encode* sense: 448 * 6 / amax in NVFP4);
    `global_group` says who shares it ((1, WHOLE): every row has its own) and `global_range` what it maps amax to.
    `zero_points`: each block also has an integer, in code units, that stands for 0. `stored`: the narrower float grid
    that scales are rounded to, *after* quantising, where they are kept as float32 values (bf16 scales).
    """

    element: Element
    group: tuple[int, int]
    global_scale: bool = False
    global_group: tuple[int, int] = (WHOLE, WHOLE)
    global_range: float = 1.0
    zero_points: bool = False
    stored: ElementType | None = None

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Logical [rows, columns] of the scale tensor of a [rows, columns] matrix; ragged last blocks count."""
        return tuple(1 if g == WHOLE else -(-n // g) for n, g in zip((rows, columns), self.group, strict=True))  # type: ignore[return-value]

    def global_scales(self, rows: int) -> int:
        """How many global scales a matrix of so many rows has: 1, or one a row."""
        return 1 if self.global_group[0] == WHOLE else rows

    @property
    def static(self) -> bool:
        """One number serves the whole tensor, so a library is handed it instead of deriving it: a global scale, or a scale
        per tensor."""
        return self.global_group[0] == WHOLE if self.global_scale else self.group == (WHOLE, WHOLE)

    def store(self, scales: Tensor) -> Tensor:
        """float32 scales as they are kept, rounded to `stored`; codes are picked with the unrounded ones. inf stays inf."""
        return scales if self.stored is None else torch.where(scales.isinf(), scales, self.stored.round(scales).float())


@dataclass(frozen=True)
class Golden:
    """One worked example: encoding `values` (one row) gives exactly `codes` and `scales`."""

    values: tuple[float, ...]
    codes: tuple[int, ...]
    scales: tuple[int | float, ...]
    global_scale: float | None = None
    zeros: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix.

    `codes` [rows, columns]: one unpacked code per element (the value itself in a plain format); `scales`, shaped by
    `Scaling.scale_shape`: codes of the scale grid, or float32 values; `global_scale`: float32 [] or [1], or [rows] where
    every row has its own, in the encode sense; `zeros`, shaped as `scales`: codes of the zero points, None where all are 0.
    """

    format: Format
    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [rows, columns]."""
        rows, columns = self.codes.shape
        return rows, columns


@dataclass(frozen=True)
class Format:
    """A number format, complete: `encode(x, global_scale)` picks codes, `decode` gives them back.

    `ties` names the rounding of halves, `saturates` whether overflow clips; `goldens` are worked examples of the source.
    `torch_dtype` is set for plain formats only (codes are then the values themselves). `variants`: the other rules by
    which libraries pick codes and scales of this same format, each a Format named `<format>:<rule>`.
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
    variants: tuple[Format, ...] = ()

    def using(self, rule: str) -> Format:
        """The variant whose name ends in `:rule`; KeyError with the known ones otherwise."""
        known = {v.name.split(":")[1]: v for v in self.variants}
        if rule not in known:
            raise KeyError(f"format {self.name!r} has no rule {rule!r}; known: {', '.join(known) or 'none'}")
        return known[rule]

    def rules(self) -> Iterator[Format]:
        """This format with its default rule, then its variants."""
        yield self
        yield from self.variants

    def encode(self, x: Tensor, global_scale: Tensor | None = None) -> Quantized:
        """Quantise x [rows, columns] (any float dtype, read as float32). `global_scale`: float32, encode sense, required
        iff the format has one: [] or [1], or [rows] where `Scaling.global_group` says that every row has its own."""
        if x.dim() != 2:
            raise ValueError(f"{self.name}: encode wants [rows, columns], got shape {tuple(x.shape)}")
        wants = self.scaling is not None and self.scaling.global_scale
        if wants != (global_scale is not None):
            raise ValueError(f"{self.name}: global_scale must {'' if wants else 'not '}be given (encode sense, float32)")
        if global_scale is not None and global_scale.numel() != self.scaling.global_scales(x.shape[0]):  # type: ignore[union-attr]
            raise ValueError(
                f"{self.name}: global_scale has shape {tuple(global_scale.shape)}, wanted"
                f" {self.scaling.global_scales(x.shape[0])} of them for {x.shape[0]} rows;"  # type: ignore[union-attr]
                " scales per expert belong to one matrix each: encode expert by expert"
            )
        return self.encoder(self, x, None if global_scale is None else global_scale.float())

    def fit_global_scale(self, x: Tensor) -> Tensor | None:
        """The encode-sense global scale that maps x's largest magnitude to the end of the range, `global_range` / amax in
        float32, FLT_MAX where amax is 0 (FlashInfer's helpers): [] or [rows]; None where the format has none."""
        if self.scaling is None or not self.scaling.global_scale:
            return None
        amax = block_amax(x, self.scaling.global_group).flatten()
        scale = torch.where(amax == 0, torch.finfo(torch.float32).max, torch.full_like(amax, self.scaling.global_range) / amax)
        return scale if self.scaling.global_group[0] != WHOLE else scale[0]

    def decode(self, q: Quantized, dtype: torch.dtype = torch.float64) -> Tensor:
        """[rows, columns]: (code - zero point) * block scale / global scale. Exact products in float64; other dtypes round
        once per operation."""
        if self.scaling is None:
            return q.codes.to(dtype)
        narrow = self.element.bits <= MAX_TABLE_BITS and dtype == torch.float64
        value = self.element.decode(q.codes, torch.float32 if narrow else dtype).to(dtype)  # exact, and half the traffic
        if q.zeros is not None:
            value = value - expand_blocks(self.element.decode(q.zeros, dtype), q.shape, self.scaling.group)
        scale = self.scale_values(q, dtype)
        if q.global_scale is not None:
            scale = scale / q.global_scale.to(dtype).reshape(-1, 1)
        return _times_blocks(value, scale, self.scaling.group)

    def decode_all(self, matrices: Sequence[Quantized]) -> Tensor:
        """`decode` of matrices of one shape, [n, rows, columns] float64: where blocks end with a matrix, of one tall one."""
        rows = matrices[0].shape[0]
        if self.scaling is None:
            return torch.stack([q.codes for q in matrices]).double()
        block = self.scaling.group[0]
        if block == WHOLE or rows % block or (block != 1 and self.scaling.global_scale):
            return torch.stack([self.decode(q) for q in matrices])
        codes, scales, zeros = (_tall([getattr(q, name) for q in matrices]) for name in ("codes", "scales", "zeros"))
        factors = [None if q.global_scale is None else q.global_scale.reshape(-1).expand(rows) for q in matrices]
        assert codes is not None
        return self.decode(Quantized(self, codes, scales, _tall(factors), zeros)).view(len(matrices), rows, -1)

    def scale_values(self, q: Quantized, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block scales as numbers, global scale not applied."""
        assert self.scaling is not None
        assert q.scales is not None
        return q.scales.to(dtype) if q.scales.is_floating_point() else self.scaling.element.decode(q.scales, dtype)


def _tall(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _times_blocks(value: Tensor, scale: Tensor, group: tuple[int, int]) -> Tensor:
    rows, columns = value.shape
    _, block = group
    if block not in (WHOLE, 1) and columns % block == 0 and scale.shape[0] == rows:
        return value.view(rows, columns // block, block).mul_(scale.unsqueeze(-1)).view(rows, columns)
    return value * expand_blocks(scale, (rows, columns), group)


def expand_blocks(scale: Tensor, shape: tuple[int, int], group: tuple[int, int]) -> Tensor:
    """Repeat each block scale over the block it covers: [blocks, blocks] -> `shape`."""
    for axis, (size, block) in enumerate(zip(shape, group, strict=True)):
        if block == WHOLE:
            scale = scale.expand(*(size if i == axis else n for i, n in enumerate(scale.shape)))
        elif block != 1:
            scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
    return scale


def to_blocks(x: Tensor, group: tuple[int, int], fill: float = 0.0) -> Tensor:
    """x [rows, columns] as [row blocks, block rows, column blocks, block columns], ragged ends padded with `fill`.

    A view where nothing needs padding. WHOLE makes one block of the axis, which has at least one row or column.
    """
    sizes = [max(n, 1) if g == WHOLE else g for n, g in zip(x.shape, group, strict=True)]
    counts = [1 if g == WHOLE else -(-n // g) for n, g in zip(x.shape, group, strict=True)]
    down, right = (size * count - n for size, count, n in zip(sizes, counts, x.shape, strict=True))
    if down or right:
        x = torch.nn.functional.pad(x, [0, right, 0, down], value=fill)
    return x.reshape(counts[0], sizes[0], counts[1], sizes[1])


def from_blocks(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_blocks`: [rows, columns] = `shape`, the padding cut off."""
    down, rows, right, columns = blocks.shape
    return blocks.reshape(down * rows, right * columns)[: shape[0], : shape[1]]


def block_amax(x: Tensor, group: tuple[int, int]) -> Tensor:
    """float32 max |x| of every block of x [rows, columns], NaN ignored; shape as `Scaling.scale_shape`."""
    return amax_of(to_blocks(x.float(), group)).flatten(2).squeeze(1)


def amax_of(blocks: Tensor, keep_nan: bool = False) -> Tensor:
    """max |x| of `to_blocks`' [a, b, c, d] as [a, 1, c, 1]; NaN ignored, or makes its block's maximum NaN if `keep_nan`."""
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True) if blocks.numel() else blocks.new_zeros(_one_each(blocks))
    if keep_nan or not amax.isnan().any():
        return amax
    return blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=(1, 3), keepdim=True)


def _one_each(blocks: Tensor) -> tuple[int, int, int, int]:
    return blocks.shape[0], 1, blocks.shape[2], 1
