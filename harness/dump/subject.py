"""A recorded call as a subject: the library's function (its twin on a CPU) on the recorded buffers, and its one case."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.backends._flashinfer import ACTIVATION_TYPE
from harness.backends.base import YES, Backend, Launch
from harness.case import Case
from harness.dump.layer import Layer, inputs_of, layer_of
from harness.dump.read import Dump, Member, read
from harness.entry import needs, resolve
from harness.guard import Argument
from harness.inputs import Inputs
from harness.relations import CHECKS

ENTRIES = {"cutlass_fused_moe": "flashinfer.fused_moe.cutlass_fused_moe"}
OUT = "output"  # the parameter of cutlass_fused_moe for the caller's buffer
CONTRACTS = {
    "cutlass_fused_moe": (
        Argument("input", shape=("tokens", "row"), contiguous=True),
        Argument("token_selected_experts", torch.int32, ("tokens", "top_k"), contiguous=True),
        Argument("token_final_scales", torch.float32, ("tokens", "top_k"), contiguous=True),
        Argument("fc1_expert_weights", shape=("experts", "rows", "columns"), contiguous=True, align=16),
        Argument("fc2_expert_weights", shape=("experts", "hidden", "inter"), contiguous=True, align=16),
    )
}
RECORDED = "a recorded call has one set of arguments"


@cache
def opened(folder: str) -> tuple[Dump, Layer]:
    """The dump and what it computes; DumpError."""
    dump = read(Path(folder))
    return dump, layer_of(dump)


def case_of(folder: str) -> Case:
    """The recorded call's case: its id has the shape and the activation, nothing can be drawn from it."""
    return opened(folder)[1].case


def subject_of(folder: str, name: str) -> Backend:
    """The recorded call in `folder`, under `name`."""
    dump, layer = opened(folder)
    case = layer.case
    return Backend(
        name=name,
        library="flashinfer-python",
        deterministic=layer.deterministic,
        recipes=(str(case.recipe),),
        activations=(case.activation,),
        prepare=partial(_prepare, folder),
        rounding=lambda case: layer.rounding,
        probe=lambda device: YES if device.kind == "cpu" else needs(ENTRIES[dump.function])(device),
        summary=f"a recorded call of {dump.function}, {dump.folder.name}",
        exempt={check.name: RECORDED for check in CHECKS},
        recorded=partial(inputs_of, layer),
        entries=(ENTRIES[dump.function],),
    )


def _prepare(folder: str, case: Case, inputs: Inputs) -> Launch:
    dump, _ = opened(folder)
    given = {name: _placed(value, inputs.device) for name, value in dump.arguments.items() if name != OUT}
    function = resolve(ENTRIES[dump.function], inputs.device)
    like = dump.arguments.get(OUT)

    def call(output: Tensor | None = None) -> Tensor:
        if output is None and isinstance(like, Tensor):
            output = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=inputs.device)
        result = function(**given, **({} if output is None else {OUT: output}))
        return _output(result)

    out: Callable[[Tensor], object] | None = call if isinstance(like, Tensor) else None
    return Launch(call, _buffers(given), out=out, contract=CONTRACTS[dump.function])


def _placed(value: Any, device: str) -> Any:
    """A recorded value where the call wants it; members of enums as the installed release numbers them."""
    if isinstance(value, Tensor):
        if value.is_contiguous() or 0 in value.stride():
            return value.to(device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, Member):
        return getattr(resolve(ACTIVATION_TYPE, device), value.name)
    return [_placed(item, device) for item in value] if isinstance(value, list) else value


def _buffers(given: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by parameter name, those of a list numbered; what is empty has no address."""
    flat = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        flat |= {f"{name}_{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {}
    return {name: tensor for name, tensor in flat.items() if tensor.numel()}


def _output(result: object) -> Tensor:
    """A tensor, or the first of a list of them."""
    first = result[0] if isinstance(result, list | tuple) and result else result
    if not isinstance(first, Tensor):
        raise TypeError(f"returned {type(result).__name__}, wanted a tensor or a list that begins with one")
    return first
