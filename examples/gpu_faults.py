"""Seven ways to go wrong on a GPU: what a verdict says of each, with and without compute-sanitizer.

    moecheck run --plugin examples/gpu_faults.py --backend 'gpu_*' --limit 20
    moecheck repro CASE --backend gpu_writes_beyond --plugin examples/gpu_faults.py --sanitizer memcheck

| backend | alone | under a sanitizer |
|---|---|---|
| gpu_illegal_address, gpu_misaligned | CRASHED, the kernel named from the coredump | CORRUPTING (memcheck) |
| gpu_device_assert | CRASHED, the assertion and its kernel named | CRASHED |
| gpu_endless_loop | HUNG, the kernel named | no report within the limit: exit code 3 |
| gpu_out_of_memory | OUT_OF_MEMORY | OUT_OF_MEMORY |
| gpu_writes_beyond | PASSED, as a rule: the block behind is nobody's | CORRUPTING (memcheck) |
| gpu_reads_unwritten | PASSED: nothing comes of what it reads | UNSTABLE (initcheck) |

Without a GPU they are UNAVAILABLE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

try:
    import triton
    import triton.language as tl
except ImportError:  # the probe says so
    triton = None

jit: Any = (lambda kernel: kernel) if triton is None else triton.jit
Buffers = dict[str, Tensor]
FAR = 1 << 40  # elements: far outside of any allocation
BLOCK = 256


def layer(b: Buffers) -> Tensor:
    """A correct layer in eager torch: one expert after another, fp32 inside, bf16 out. ids [tokens, top_k]."""
    out = torch.zeros_like(b["x"], dtype=torch.float32)
    for expert in range(len(b["w13"])):
        weight = torch.where(b["ids"] == expert, b["topk_weights"], 0.0).sum(-1, keepdim=True)
        gate, up = (b["x"].float() @ b["w13"][expert].float().T).chunk(2, dim=-1)
        out += weight * ((torch.nn.functional.silu(gate) * up) @ b["w2"][expert].float().T)
    return out.to(b["x"].dtype)


@jit
def copy_kernel(source, target, count, shift, BLOCK: tl.constexpr):
    """target[i + shift] = source[i] for i < count."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at + shift, tl.load(source + at, mask=at < count), mask=at < count)


@jit
def misaligned_kernel(target):
    """Four bytes at an odd address."""
    odd = (target.to(tl.int64) + 1).to(tl.pointer_type(tl.int32))
    tl.store(odd, 7)


@jit
def endless_kernel(flag):
    """Waits for a flag that nobody sets."""
    seen = tl.load(flag, volatile=True)
    while seen == 0:
        seen = tl.load(flag, volatile=True)


@jit
def unwritten_kernel(source, workspace, target, count, BLOCK: tl.constexpr):
    """Copies, and looks at a workspace that nobody has written; a value of 12345 there would show."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < count).to(tl.float32)
    seen = tl.load(workspace + at, mask=at < count)
    tl.store(target + at, tl.where(seen == 12345.0, value + 1.0, value).to(target.dtype.element_ty), mask=at < count)


def copied(source: Tensor, count: int | None = None, shift: int = 0) -> Tensor:
    """A copy by our kernel; `count` elements of it, `shift` elements too far."""
    target, count = torch.empty_like(source), count or source.numel()
    copy_kernel[(triton.cdiv(count, BLOCK),)](source, target, count, shift, BLOCK=BLOCK)
    return target


def illegal_address(b: Buffers) -> Tensor:
    """A 64-bit offset that is not what it should be: the store goes to memory that is not mapped."""
    return copied(layer(b), shift=FAR)


def misaligned(b: Buffers) -> Tensor:
    """Stores four bytes at an odd address."""
    out = layer(b)
    misaligned_kernel[(1,)](out)
    return out


def device_assert(b: Buffers) -> Tensor:
    """Gathers a row that does not exist: torch asserts it on the device."""
    return layer(b)[torch.arange(len(b["x"]), device=b["x"].device) + len(b["x"])]


def endless_loop(b: Buffers) -> Tensor:
    """A block waits for ever for another one's flag."""
    endless_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=b["x"].device))
    return layer(b)


def out_of_memory(b: Buffers) -> Tensor:
    """A workspace of a pebibyte."""
    torch.empty(1 << 50, dtype=torch.uint8, device=b["x"].device)
    return layer(b)


def writes_beyond(b: Buffers) -> Tensor:
    """The grid's bound is one too large: one element behind the output is written, with what lies behind the source."""
    source = layer(b)
    return copied(torch.cat([source.flatten(), source.flatten()[:1]])[: source.numel()], count=source.numel() + 1).view_as(
        source
    )


def reads_unwritten(b: Buffers) -> Tensor:
    """Reads a workspace before anybody writes it; the result does not show it."""
    source = layer(b)
    target, workspace = torch.empty_like(source), torch.empty(source.shape, device=source.device)
    unwritten_kernel[(triton.cdiv(source.numel(), BLOCK),)](source, workspace, target, source.numel(), BLOCK=BLOCK)
    return target


FAULTY = (illegal_address, misaligned, device_assert, endless_loop, out_of_memory, writes_beyond, reads_unwritten)
ONLY = {"tokens": 33, "hidden": 512, "inter": 256, "experts": 5, "top_k": 2, "fill": "real", "skew": "uniform"}


def probe(device: Device) -> Support:
    """A CUDA device, and Triton."""
    if device.kind != "cuda":
        return Support.no("arch", f"plants faults on a GPU; this is {device.arch}")
    return YES if triton is not None else Support.no("library", "wants triton")


def faulty(fault: Callable[[Buffers], Tensor]) -> Backend:
    """A backend around one faulty layer."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        w13, w2 = inputs.stacked()
        buffers = {"x": inputs.x, "w13": w13, "w2": w2, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
        return Launch(lambda: fault(buffers), buffers)

    return Backend(
        name=f"gpu_{fault.__name__}",
        library="triton",
        deterministic=True,
        recipes=("bf16",),
        activations=("swiglu",),
        routings=("renormalize",),
        rounding=lambda case: Rounding(out="bf16"),
        probe=probe,
        limits=tuple(Limit.only(axis, value) for axis, value in ONLY.items()),
        prepare=prepare,
        summary=(fault.__doc__ or "").strip(),
        exempt={"graph": "an example of faults, not of capture"},
    )


BACKENDS = tuple(faulty(fault) for fault in FAULTY)
