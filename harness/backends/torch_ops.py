"""torch's own functions as quantisers, activations and routers: subjects for the ops on any machine.

The quantisers are what serving code writes in three lines: scale = amax / 448, codes = (x / scale) as float8_e4m3fn, with
the floors of vLLM's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from harness.backends._ops import matrix, packed
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.inputs import Inputs
from reference.rounding import Rounding

LARGEST = 448.0  # of float8_e4m3fn
GROUPS = {"fp8_token": 0, "fp8_group": 128}  # columns that share a scale, 0 for all
TOKEN_FLOOR, GROUP_FLOOR = 1 / (448 * 512), 1e-10  # vLLM: least scale of a token, least amax of a group
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": partial(functional.gelu, approximate="tanh"),
}


def _quantize(case: Case, inputs: Inputs) -> Launch:
    x, width = inputs.x, GROUPS[case.recipe.weights]

    def call() -> Tensor:
        blocks = x.float().unflatten(1, (-1, width or x.shape[1]))
        amax = blocks.abs().amax(2, keepdim=True)
        largest = torch.full_like(amax, LARGEST)  # by a number CUDA divides through its reciprocal, an ulp away
        scales = amax.clamp(min=GROUP_FLOOR) / largest if width else (amax / largest).clamp(min=TOKEN_FLOOR)
        codes = (blocks / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return matrix(codes.flatten(1), scales.squeeze(2))

    return Launch(call, {"x": x})


def _activate(case: Case, inputs: Inputs) -> Launch:
    x, act = inputs.x, ACTIVATIONS[case.activation]

    def call() -> Tensor:
        gate, up = x.chunk(2, 1)
        return act(gate) * up

    return Launch(call, {"x": x})


def _route(case: Case, inputs: Inputs) -> Launch:
    logits, top_k, before = inputs.logits, case.shape.top_k, case.routing == "default"

    def call() -> Tensor:
        if before:
            weights, ids = torch.softmax(logits.float(), -1).topk(top_k)
            return packed(ids, weights)
        chosen, ids = logits.float().topk(top_k)
        return packed(ids, torch.softmax(chosen, -1))

    return Launch(call, {"logits": logits})


BACKENDS = (
    Backend(
        name="torch_quantize",
        op="quantize",
        library="torch",
        deterministic=True,
        recipes=tuple(f"{name}{x}" for name in GROUPS for x in ("", "-fp16", "-fp32")),
        activations=(),
        rounding=lambda case: Rounding(x=f"{case.recipe.weights}:vllm"),
        prepare=_quantize,
        summary="x / (amax / 448) as float8_e4m3fn, a scale per token or per 128 columns",
    ),
    Backend(
        name="torch_activate",
        op="activate",
        library="torch",
        deterministic=True,
        recipes=("bf16", "fp16"),
        activations=tuple(ACTIVATIONS),
        rounding=lambda case: Rounding(activated=case.recipe.out, out=case.recipe.out),
        prepare=_activate,
        summary="act(gate) * up, rounded after the activation and after the product",
    ),
    Backend(
        name="torch_route",
        op="route",
        library="torch",
        deterministic=True,
        recipes=("fp32", "bf16"),
        activations=(),
        routings=("default", "renormalize"),
        rounding=lambda case: Rounding(),
        prepare=_route,
        summary="softmax and topk, in either order",
    ),
)
