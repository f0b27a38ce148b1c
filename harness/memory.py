"""Memory guards: poison for whatever nobody wrote, red zones around every buffer a kernel is handed.

Two poisons, one byte repeated each: 0xFF is NaN in every float type (-1 as an integer), 0x7B is huge and finite in fp32 and
bf16, 61280 in fp16, 352 in E4M3. An output that differs between the two has read memory that nobody wrote.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from harness.backends.base import Device

NAN, HUGE = 0xFF, 0x7B
M_PERTURB = -6  # malloc.h: fill allocated memory with a byte; the value's low byte complemented, 0 switches it off
# glibc's per-thread cache hands small blocks out without filling them (malloc.c, tcache): it is emptied first. What it
# restocks meanwhile escapes: one in 700 blocks of up to 1 KiB, none above.
TCACHE_COUNT, TCACHE_SIZES = 7, range(24, 1033, 16)
RED_ZONE = 4096  # bytes: a page, and a multiple of every alignment a kernel may want (TMA: 128)


_HELD_BACK = [size for size in TCACHE_SIZES for _ in range(TCACHE_COUNT)]


@cache
def _libc() -> ctypes.PyDLL:
    """glibc, called with the interpreter's lock held: the 900 calls of one poisoning are too short to give it away."""
    libc = ctypes.PyDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    return libc


@contextmanager
def poisoned(byte: int, device: Device) -> Iterator[None]:
    """Within, memory that is allocated and not written holds `byte`: glibc's and, on CUDA, the caching allocator's free
    blocks and the tails of its blocks in use."""
    libc = _libc()
    if device.kind == "cuda":
        _poison_cuda(byte)
    held_back = list(map(libc.malloc, _HELD_BACK))
    libc.mallopt(M_PERTURB, 0x100 | (byte ^ 0xFF))
    try:
        yield
    finally:
        libc.mallopt(M_PERTURB, 0)
        for address in held_back:
            libc.free(address)


def _poison_cuda(byte: int) -> None:
    """Fill every free byte that torch's allocator holds; the driver call wants torch's context, current in this thread."""
    torch.cuda.synchronize()
    driver = ctypes.CDLL("libcuda.so.1")
    for start, size in _free_ranges(torch.cuda.memory_snapshot()):
        code = driver.cuMemsetD8_v2(ctypes.c_uint64(start), ctypes.c_ubyte(byte), ctypes.c_size_t(size))
        if code:
            raise RuntimeError(f"cuMemsetD8 of {size} free bytes failed with CUDA error {code}")
    torch.cuda.synchronize()


def _free_ranges(segments: Iterable[dict[str, object]]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the free blocks and of the unrequested tails of the others, from torch.cuda.memory_snapshot."""
    for segment in segments:
        address: int = segment["address"]  # type: ignore[assignment]
        for block in segment["blocks"]:  # type: ignore[attr-defined]
            size, state = block["size"], block["state"]
            used = 0 if state == "inactive" else block.get("requested_size", size) if state == "active_allocated" else size
            if size > used:
                yield address + used, size - used
            address += size


@dataclass
class RedZones:
    """Storages moved between two red zones. `fill` poisons the zones, `broken` names the buffers whose zones were written."""

    _arenas: dict[str, Tensor] = field(default_factory=dict)
    _moved: list[Tensor] = field(default_factory=list)  # the old storages stay alive: a descriptor may hold their address
    _byte: int = NAN

    def move(self, buffers: dict[str, Tensor]) -> None:
        """Re-home every tensor in place: same object, same values and strides, new storage of exact size. Views of one
        storage stay views of one storage."""
        homes: dict[int, Tensor] = {}
        for name, tensor in buffers.items():
            if not tensor.numel() or tensor.requires_grad:
                continue
            old = tensor.untyped_storage()
            if old.data_ptr() not in homes:
                homes[old.data_ptr()] = self._arenas[name] = _arena(old, tensor.device, self._byte)
            offset = RED_ZONE // tensor.element_size() + tensor.storage_offset()
            self._moved.append(tensor.detach())
            tensor.set_(homes[old.data_ptr()].untyped_storage(), offset, tensor.shape, tensor.stride())

    def fill(self, byte: int) -> None:
        """Write `byte` to every red zone."""
        self._byte = byte
        for arena in self._arenas.values():
            arena[:RED_ZONE] = byte
            arena[-RED_ZONE:] = byte

    def broken(self) -> dict[str, str]:
        """Buffer name -> which side was written and how far, for every red zone that does not hold its poison."""
        found: dict[str, str] = {}
        if not self._arenas or not self._any_broken():
            return found
        for name, arena in self._arenas.items():
            before = (arena[:RED_ZONE] != self._byte).nonzero().flatten()
            after = (arena[-RED_ZONE:] != self._byte).nonzero().flatten()
            sides = []
            if len(before):
                sides.append(f"{len(before)} bytes from {RED_ZONE - int(before[0])} bytes before it on")
            if len(after):
                sides.append(f"{len(after)} bytes up to {int(after[-1]) + 1} bytes behind it")
            if sides:
                found[name] = " and ".join(sides)
        return found

    def _any_broken(self) -> bool:
        """One question to the device about all zones: most calls break none."""
        zones = [zone for arena in self._arenas.values() for zone in (arena[:RED_ZONE], arena[-RED_ZONE:])]
        homes = {zone.device for zone in zones}
        return any(bool((torch.cat([z for z in zones if z.device == home]) != self._byte).any()) for home in homes)


def _arena(old: torch.UntypedStorage, device: torch.device, byte: int) -> Tensor:
    """[red zone | a copy of `old` | red zone], uint8."""
    size = old.nbytes()
    arena = torch.full((size + 2 * RED_ZONE,), byte, dtype=torch.uint8, device=device)
    arena[RED_ZONE : RED_ZONE + size] = torch.empty(0, dtype=torch.uint8, device=device).set_(old)
    return arena


def held(output: Tensor, byte: int) -> Tensor:
    """Mask of the elements of `output` all of whose bytes are `byte`: what an element nobody wrote looks like."""
    raw = output.contiguous().view(-1).view(torch.uint8).view(*output.shape, output.element_size())
    return (raw == byte).all(-1)
