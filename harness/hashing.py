"""A counter-based random function: any element of any tensor from (seed, tensor name, index) alone, on any device.

Integer operations of torch wrap identically on CPU, CUDA and ROCm, so the bytes are the same everywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# lowbias32 of Chris Wellons, "Prospecting for Hash Functions" (nullprogram.com, 2018): multipliers and shifts
_M1, _M2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
_BLOCK = 1 << 18  # words per pass: an int32 block stays in a core's L2 cache
_WORD_BITS = 32


@dataclass(frozen=True)
class Stream:
    """The random words of one named tensor under one seed."""

    seed: int
    name: str
    device: str = "cpu"

    def child(self, name: str) -> Stream:
        """An independent stream below this one."""
        return Stream(self.seed, f"{self.name}/{name}", self.device)

    def words(self, start: int, count: int) -> Tensor:
        """int32 [count]: words start .. start + count of this stream."""
        keys = key(self.seed, self.name)
        out = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
        for block in out.split(_BLOCK) if self.device == "cpu" else (out,):
            _mix(block, keys[0], keys[1])
        return out

    def raw(self, rows: int, columns: int, bits: int) -> Tensor:
        """[rows, columns] of `bits`-bit fields in the narrowest torch type (uint8, int16, int32); a row starts on a word
        of its own, so any row can be drawn alone."""
        return cut(self.words(0, rows * width(columns, bits)), rows, columns, bits)

    def fields(self, rows: int, columns: int, bits: int) -> Tensor:
        """`raw` as non-negative int64."""
        return self.raw(rows, columns, bits).to(torch.int64) & ((1 << bits) - 1)


@dataclass(frozen=True)
class Streams:
    """Several streams of one seed and device, drawn at once: what one stream gives, with a leading axis of `names`."""

    seed: int
    names: tuple[str, ...]
    device: str = "cpu"

    def child(self, name: str) -> Streams:
        """An independent stream below each of these."""
        return Streams(self.seed, tuple(f"{own}/{name}" for own in self.names), self.device)

    def raw(self, rows: int, columns: int, bits: int) -> Tensor:
        """[names, rows, columns], see `Stream.raw`."""
        keys = torch.tensor([key(self.seed, name) for name in self.names], dtype=torch.int32, device=self.device)
        count = rows * width(columns, bits)
        words = torch.arange(count, dtype=torch.int32, device=self.device).repeat(len(self.names), 1)
        _mix(words, keys[:, :1], keys[:, 1:])
        return cut(words, rows, columns, bits)

    def fields(self, rows: int, columns: int, bits: int) -> Tensor:
        """`raw` as non-negative int64."""
        return self.raw(rows, columns, bits).to(torch.int64) & ((1 << bits) - 1)


def key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit keys of a stream."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    return first, second


def width(columns: int, bits: int) -> int:
    """Words of a row of `bits`-bit fields."""
    return -(-columns * bits // _WORD_BITS)


def cut(words: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """Fields [..., rows, columns] of words [..., rows * width]."""
    parts = words.view(_NARROW[bits])
    if bits == 4:
        parts = torch.stack((parts & 0xF, parts >> 4), dim=-1)
    return parts.view(*words.shape[:-1], rows, _WORD_BITS // bits * width(columns, bits))[..., :columns]


_NARROW = {4: torch.uint8, 8: torch.uint8, 16: torch.int16, 32: torch.int32}


def _mix(x: Tensor, key0: int | Tensor, key1: int | Tensor) -> None:
    """In place; `>>` on int32 is arithmetic, so the shifted-in sign bits are masked off."""
    x ^= key0
    x ^= (x >> 16) & 0xFFFF
    x *= _M1
    x ^= key1
    x ^= (x >> 15) & 0x1FFFF
    x *= _M2
    x ^= (x >> 16) & 0xFFFF
