"""Eleven broken MoE kernels, one defect each: what a verdict looks like when something is wrong.

    moecheck run --plugin examples/broken_backends.py --backend 'broken_*' --limit 10

Each backend is planned for a single case; the run ends with exit code 1 and eleven failures.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

Buffers = dict[str, Tensor]


def good(b: Buffers) -> Tensor:
    """A correct layer in eager torch: one expert after another, fp32 inside, bf16 out. ids [tokens, top_k]."""
    out = torch.zeros_like(b["x"], dtype=torch.float32)
    for expert in b["ids"].unique().tolist():
        weight = torch.where(b["ids"] == expert, b["topk_weights"], 0.0).sum(-1, keepdim=True)
        pre = b["x"].float() @ b["w13"][expert].float().T
        gate, up = pre.chunk(2, dim=-1)
        out += weight * ((torch.nn.functional.silu(gate) * up) @ b["w2"][expert].float().T)
    return out.to(b["x"].dtype)


def gate_up_swapped(b: Buffers) -> Tensor:
    """Reads [up, gate] where [gate, up] was promised."""
    return good({**b, "w13": torch.cat(b["w13"].chunk(2, dim=1)[::-1], dim=1)})


def zeros(b: Buffers) -> Tensor:
    """A kernel whose grid is empty."""
    return torch.zeros_like(b["x"])


def expert_dropped(b: Buffers) -> Tensor:
    """A loop over experts that ends one too early."""
    last = int(b["ids"].max())
    return good({**b, "topk_weights": torch.where(b["ids"] == last, 0.0, b["topk_weights"])})


def rows_permuted(b: Buffers) -> Tensor:
    """Results scattered to the next token's row."""
    return good(b).roll(1, dims=0)


def nan_in_tile(b: Buffers) -> Tensor:
    """Uninitialised padding leaks into one tile."""
    out = good(b)
    out[16:32, 64:128] = torch.nan
    return out


def wrong_dtype(b: Buffers) -> Tensor:
    """Forgets the cast of the output."""
    return good(b).float()


def input_mutated(b: Buffers) -> Tensor:
    """Uses its input as scratch space."""
    out = good(b)
    b["x"].mul_(2)
    return out


def segfault(b: Buffers) -> Tensor:
    """Reads address 0."""
    ctypes.string_at(0)
    return good(b)


def abort(b: Buffers) -> Tensor:
    """A failed assertion in C++."""
    os.abort()


def hang(b: Buffers) -> Tensor:
    """Waits for a flag nobody sets."""
    while True:
        time.sleep(1)


def exception_after_yes(b: Buffers) -> Tensor:
    """Said it supports the case."""
    raise RuntimeError("CUTLASS: Error Internal at gemm_grouped.cu:42")


DEFECTS = (gate_up_swapped, zeros, expert_dropped, rows_permuted, nan_in_tile, wrong_dtype)
DEFECTS += (input_mutated, segfault, abort, hang, exception_after_yes)
ONLY = {"tokens": 33, "hidden": 256, "inter": 128, "experts": 5, "top_k": 2, "fill": "real", "skew": "uniform"}


def broken(defect: Callable[[Buffers], Tensor]) -> Backend:
    """A backend around one defective layer."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        w13, w2 = inputs.stacked()
        buffers = {"x": inputs.x, "w13": w13, "w2": w2, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
        return Launch(lambda: defect(buffers), buffers)

    return Backend(
        name=f"broken_{defect.__name__}",
        library="torch",
        deterministic=True,
        recipes=("bf16",),
        activations=("swiglu",),
        routings=("renormalize",),
        rounding=lambda case: Rounding(out="bf16"),
        limits=tuple(Limit.only(axis, value) for axis, value in ONLY.items()),
        prepare=prepare,
        summary=(defect.__doc__ or "").strip(),
    )


BACKENDS = tuple(broken(defect) for defect in DEFECTS)
