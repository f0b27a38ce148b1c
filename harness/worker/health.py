"""In the child: is this process still fit to judge, after a subject failed in it?"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from contextlib import suppress
from dataclasses import dataclass

import torch

from harness.backends.base import Device
from harness.worker.vitals import descriptors, resident

GROWTH = 512 << 20  # bytes: three times what the largest import in a case, inductor's, was measured to add (158 MiB)
MORE_DESCRIPTORS = 64  # a library opens a few; a leak of them in one case ends in EMFILE soon
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK, resource.RLIMIT_NOFILE)
SIDE = 16


@dataclass(frozen=True)
class State:
    """What a case must leave as it found it."""

    resident: int
    descriptors: int
    limits: tuple[tuple[int, int], ...]
    folder: str
    torch: tuple[object, ...]


def look() -> State:
    """This process now."""
    limits = tuple(resource.getrlimit(limit) for limit in LIMITS)
    modes = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    return State(resident(os.getpid()), descriptors(), limits, os.readlink("/proc/self/cwd"), modes)


def problem(before: State, device: Device) -> str | None:
    """Why this process should judge no further case, or None."""
    if sticky(device):
        return "every call on the device fails"
    try:
        right = small_result_is_right(device)
    except Exception as error:
        return f"a small matmul raises {type(error).__name__}"
    if not right:
        return "a small matmul gives a wrong result"
    now = look()
    if now.resident - before.resident > GROWTH:
        gc.collect()
        with suppress(AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        now = look()
    if now.resident - before.resident > GROWTH:
        return f"{(now.resident - before.resident) >> 20} MiB more are resident than before the case"
    if now.descriptors - before.descriptors > MORE_DESCRIPTORS or now.descriptors < before.descriptors:
        return f"{before.descriptors} descriptors were open before the case, {now.descriptors} are after it"
    for name in ("limits", "folder", "torch"):
        if getattr(now, name) != getattr(before, name):
            return f"the case changed the process's {name}: {getattr(before, name)} to {getattr(now, name)}"
    return None


def small_result_is_right(device: Device) -> bool:
    """A matmul of small integers, whose every partial sum is exact in fp32, against Python's integers."""
    a = [[(3 * i + 5 * j) % 7 - 3 for j in range(SIDE)] for i in range(SIDE)]
    x = torch.tensor(a, dtype=torch.float32, device=device.kind)
    wanted = [[sum(a[i][k] * a[k][j] for k in range(SIDE)) for j in range(SIDE)] for i in range(SIDE)]
    return bool((x @ x).cpu().tolist() == wanted)


def sticky(device: Device) -> bool:
    """A CUDA context that has seen an illegal access answers every call with that error until its process is gone."""
    if device.kind != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
