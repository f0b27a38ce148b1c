"""What a physical layout is: where the bytes of a logical tensor lie, as a bijection with its inverse and padding rule.

Every layout here is a tiling: split the axes into factors, reorder the pieces, merge them. A few then move single bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
REST = -1  # in Tiling.split: whatever is left of this axis


@dataclass(frozen=True)
class Tiling:
    """A permutation of pieces.

    `split[a]`: the factors of logical axis a, outermost first, REST at most once. `order`: the pieces (numbered through
    all axes) as memory holds them, slowest first. `merge`: how many consecutive pieces make each axis of the storage.
    """

    split: tuple[Shape, ...]
    order: Shape
    merge: Shape

    def pieces(self, shape: Shape) -> Shape:
        """The factors of every axis of `shape`, in logical order."""
        found: list[int] = []
        for size, factors in zip(shape, self.split, strict=True):
            known = math.prod(f for f in factors if f != REST)
            if size % known or (REST not in factors and size != known):
                raise ValueError(f"an axis of {size} does not split into {factors}")
            found += [size // known if f == REST else f for f in factors]
        return tuple(found)

    def store(self, x: Tensor) -> Tensor:
        """Logical tensor -> storage, in memory order."""
        moved = x.reshape(self.pieces(tuple(x.shape))).permute(self.order)
        sizes, merged = iter(moved.shape), []
        for count in self.merge:
            merged.append(math.prod(next(sizes) for _ in range(count)))
        return moved.reshape(merged)

    def load(self, stored: Tensor, shape: Shape) -> Tensor:
        """Inverse of `store`."""
        pieces = self.pieces(shape)
        home = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.reshape([pieces[i] for i in self.order]).permute(home).reshape(shape)


@dataclass(frozen=True)
class Layout:
    """A physical layout. Storage axes are in memory order (slowest first) unless the file says that it is a strided view.

    `packer(x)` and `unpacker(stored, shape)` do the work; `padding(shape)` is the logical shape the storage has room for:
    the rest is 0. `multiple`: what each logical axis must be a multiple of (nothing is padded there). `bitwise`: the bits of
    one byte are spread over several, so the tensor must be uint8; all other layouts move elements of any dtype.
    """

    name: str
    packer: Callable[[Tensor], Tensor]
    unpacker: Callable[[Tensor, Shape], Tensor]
    padding: Callable[[Shape], Shape]
    source: str
    multiple: Shape = (1, 1)
    bitwise: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """Logical tensor -> storage."""
        self._check(tuple(x.shape), x.dtype)
        return self.packer(x)

    def unpack(self, stored: Tensor, shape: Shape) -> Tensor:
        """Storage -> the logical tensor of `shape`; padding is dropped."""
        self._check(shape, stored.dtype)
        wanted = math.prod(self.padding(shape))
        if stored.numel() != wanted:
            raise ValueError(f"{self.name}: {list(shape)} is stored in {wanted} elements, got {stored.numel()}")
        return self.unpacker(stored, shape)

    def padded_shape(self, shape: Shape) -> Shape:
        """`shape` rounded up to what the storage has room for."""
        self._check(shape)
        return self.padding(shape)

    def _check(self, shape: Shape, dtype: torch.dtype = torch.uint8) -> None:
        if len(shape) != len(self.multiple) or any(n % m for n, m in zip(shape, self.multiple, strict=True)):
            raise ValueError(f"{self.name}: axes must be multiples of {list(self.multiple)}, got shape {list(shape)}")
        if self.bitwise and dtype != torch.uint8:
            raise ValueError(f"{self.name} moves bits: got {dtype}, want torch.uint8")


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def rounded(*multiples: int) -> Callable[[Shape], Shape]:
    """The padding rule that rounds each axis up to its own multiple."""
    return lambda shape: tuple(round_up(n, m) for n, m in zip(shape, multiples, strict=True))


def pad_to(x: Tensor, shape: Shape) -> Tensor:
    """x with zeros appended to every axis, up to `shape`."""
    missing = [n for size, wanted in zip(reversed(x.shape), reversed(shape), strict=True) for n in (0, wanted - size)]
    return torch.nn.functional.pad(x, missing)


def crop(x: Tensor, shape: Shape) -> Tensor:
    """The first `shape` elements of every axis of x."""
    return x[tuple(slice(n) for n in shape)]


def tiled(name: str, tiling: Tiling, source: str, pad: Shape | None = None, multiple: Shape = (1, 1)) -> Layout:
    """The layout of one tiling; axes are zero-padded to multiples of `pad`, or must be multiples of `multiple`."""
    padding = rounded(*(pad or (1,) * len(multiple)))
    return Layout(
        name=name,
        packer=lambda x: tiling.store(pad_to(x, padding(tuple(x.shape)))),
        unpacker=lambda stored, shape: crop(tiling.load(stored, padding(shape)), shape),
        padding=padding,
        source=source,
        multiple=multiple,
    )


def per_expert(layout: Layout) -> Layout:
    """[experts, ...]: `layout` for each expert by itself, experts outermost."""
    return Layout(
        name=f"{layout.name}_per_expert",
        packer=lambda x: torch.stack([layout.pack(one) for one in x]),
        unpacker=lambda stored, shape: torch.stack([layout.unpack(one, shape[1:]) for one in stored]),
        padding=lambda shape: (shape[0], *layout.padding(shape[1:])),
        source=layout.source,
        multiple=(1, *layout.multiple),
        bitwise=layout.bitwise,
    )


def twiddled(layout: Layout, name: str, bits: Shape) -> Layout:
    """`layout`, then bit b of every little-endian 32-bit word of the last storage axis moves to bit `bits[b]`."""
    back = tuple(sorted(range(len(bits)), key=bits.__getitem__))
    return Layout(
        name=name,
        packer=lambda x: move_bits(layout.packer(x), bits),
        unpacker=lambda stored, shape: layout.unpacker(move_bits(stored, back), shape),
        padding=layout.padding,
        source=layout.source,
        multiple=layout.multiple,
        bitwise=True,
    )


def move_bits(stored: Tensor, bits: Shape) -> Tensor:
    """uint8 [..., 4 n] -> the same shape, bit b of every little-endian 32-bit word moved to bit `bits[b]`."""
    device = stored.device
    set_bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    targets = torch.tensor(bits, device=device).view(4, 8)
    tables = (set_bits << targets[:, None, :]).sum(-1).to(torch.int32)  # [4, 256]: what one byte adds to its word
    words = stored.reshape(-1, 4).int()
    moved = tables[0][words[:, 0]]
    for byte in range(1, 4):
        moved |= tables[byte][words[:, byte]]
    return moved.view(torch.uint8).reshape(stored.shape)
