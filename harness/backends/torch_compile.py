"""torch.compile (inductor): the layer as dense batched GEMMs over all experts, compiled with dynamic shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case
from harness.guard import Argument
from harness.inputs import Inputs
from reference.formats import get
from reference.rounding import Rounding

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "silu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "relu": torch.relu,
}


def probe(device: Device) -> Support:
    """inductor compiles C++ on the CPU and Triton on a GPU."""
    if device.kind == "cpu":
        from torch._inductor import config

        compilers = [name for name in config.cpp.cxx if name] + ["g++"]
        if not any(shutil.which(name) for name in compilers):
            return Support.no("library", "inductor needs a C++ compiler on the CPU; none found")
    return YES


def dense_layer(activation: str, gated: bool) -> Callable[..., Tensor]:
    """The layer over x, w13, w2, ids, weights: every expert sees every token, the routing weight of the rest is 0."""
    function = FUNCTIONS[activation]

    def layer(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts = w13.shape[0]
        per_expert = torch.zeros(x.shape[0], experts, device=x.device).scatter_add(1, ids, weights)
        pre = torch.bmm(x.expand(experts, -1, -1), w13.transpose(1, 2)).float()
        middle = function(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1] if gated else function(pre)
        rows = torch.bmm(middle.to(x.dtype), w2.transpose(1, 2)).float()
        return (rows * per_expert.T.unsqueeze(-1)).sum(0).to(x.dtype)

    return layer


@cache
def compiled(activation: str, gated: bool) -> Callable[..., Tensor]:
    """One compiled function per activation; sizes are dynamic, so a new shape rarely compiles again."""
    torch._dynamo.config.cache_size_limit = 64  # dtypes, and the sizes 0 and 1 that dynamo always specialises
    return torch.compile(dense_layer(activation, gated), dynamic=True)


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden] (gate rows first) and w2 [experts, hidden, inter] in the recipe's dtype."""
    w13, w2 = inputs.stacked()
    buffers = {"x": inputs.x, "w13": w13, "w2": w2, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
    function = compiled(case.activation, w13.shape[1] > w2.shape[2])
    tokens, hidden, dtype = case.shape.tokens, case.shape.hidden, get(case.recipe.acts).torch_dtype
    contract = (
        Argument("x", dtype, (tokens, hidden)),
        Argument("w13", dtype, (case.shape.experts, "rows", hidden)),
        Argument("w2", dtype, (case.shape.experts, hidden, case.shape.inter)),
        Argument("ids", torch.int64, (tokens, case.shape.top_k)),
        Argument("topk_weights", torch.float32, (tokens, case.shape.top_k)),
    )
    return Launch(lambda: function(*buffers.values()), buffers, contract=contract)


def rounding(case: Case) -> Rounding:
    """Rounds where tensors of the recipe's dtype are materialised: after each GEMM, the activation, and the sum."""
    name = None if get(case.recipe.acts).torch_dtype == torch.float32 else case.recipe.acts
    return Rounding(gate_up=name, middle=name, row=name, out=name)


BACKENDS = (
    Backend(
        name="torch_compile",
        library="torch",
        deterministic=True,
        recipes=("fp32", "bf16"),
        activations=tuple(FUNCTIONS),
        rounding=rounding,
        probe=probe,
        prepare=prepare,
        summary="inductor: dense batched GEMMs over all experts, activation and sum fused",
    ),
)
