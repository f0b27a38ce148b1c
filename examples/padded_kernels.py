"""Two right kernels that do more work than they must: what the latency lane should see, and the judge should not.

    moecheck latency compare CASE --a triton_moe --b examples/padded_kernels.py --b triton_moe_padded

EXTRA is the share of tiles (Triton) or tokens (torch) that is computed twice. How much slower that makes a call depends on
the case and the card, so a copy with another EXTRA is fitted where 5 % are to be planted.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.backends import torch_grouped_mm, triton_moe
from harness.backends.base import Launch
from harness.case import Case
from harness.inputs import Inputs

EXTRA = 0.05


def padded(routed: Any, kernels: Any) -> Any:
    """The first blocks once more at the end of the grid: they write the same values again."""
    more = round(EXTRA * len(routed.block_expert))
    slots = torch.cat([routed.slots, routed.slots[: more * routed.block_m]])
    experts = torch.cat([routed.block_expert, routed.block_expert[:more]])
    return kernels.Routed(slots, experts, routed.total, routed.block_m)


def moe(kernels: Any, x: Tensor, w13: Any, w2: Any, topk: tuple[Tensor, Tensor], activation: str) -> Tensor:
    """`_triton_kernels.moe` over the padded grid."""
    ids, weights = topk[0].to(torch.int32), topk[1]
    experts = w13.shape()[0]
    routed = padded(kernels.align(ids, experts, kernels.Tiles().m), kernels)
    rows = kernels.grouped_gemm(x, w13, routed, ids.shape[1])
    middle = kernels.activate(rows, ids, experts, activation)
    return kernels.finalize(kernels.grouped_gemm(middle, w2, routed, 1), weights, ids, experts)


def prepare_triton(case: Case, inputs: Inputs) -> Launch:
    """The launch of triton_moe with the layer above in place of its own."""
    kernels = importlib.import_module("harness.backends._triton_kernels")

    def layer(*arguments: Any) -> Tensor:
        return moe(kernels, *arguments)

    return triton_moe.prepare(case, inputs, SimpleNamespace(Weights=kernels.Weights, moe=layer))  # type: ignore[arg-type]


def prepare_torch(case: Case, inputs: Inputs) -> Launch:
    """torch_grouped_mm on a batch whose first tokens come twice."""
    launch = torch_grouped_mm.prepare(case, inputs)
    tokens, more = case.shape.tokens, round(EXTRA * case.shape.tokens)
    gated = case.activation in torch_grouped_mm.GATED

    def call() -> Tensor:
        longer = {name: torch.cat([t, t[:more]]) for name, t in launch.buffers.items() if name in ("x", "ids", "topk_weights")}
        return torch_grouped_mm.layer({**launch.buffers, **longer}, case.activation, gated)[:tokens]

    return replace(launch, call=call)


ON_OUTPUT = ("onoutput",)
(TRITON,), (TORCH,) = triton_moe.BACKENDS, torch_grouped_mm.BACKENDS
BACKENDS = (
    replace(
        TRITON,
        name="triton_moe_padded",
        weightings=ON_OUTPUT,
        prepare=prepare_triton,
        summary="triton_moe with tiles computed twice",
    ),
    replace(
        TORCH,
        name="torch_grouped_mm_padded",
        weightings=ON_OUTPUT,
        prepare=prepare_torch,
        script=None,
        summary="with tokens computed twice",
    ),
)
