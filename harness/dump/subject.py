"""A recorded call as a subject: the library's function (its twin on a CPU) on the recorded buffers, and its one case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.backends.base import CPU, YES, Backend, Launch
from harness.case import Case
from harness.compare import compare
from harness.diagnose import diagnose
from harness.dump.layer import Call
from harness.dump.read import Dump, Member, read
from harness.dump.readers import REFUSALS, call_of, reader_of
from harness.entry import needs, resolve
from harness.inputs import Inputs
from harness.named import named
from harness.op_symptoms import describe
from harness.oracle import expect
from harness.relations import CHECKS
from harness.subject import malformed
from harness.verdict import Comparison, Diagnosis

RECORDED = "a recorded call has one set of arguments"


@cache
def opened(folder: str) -> tuple[Dump, Call]:
    """The dump and what it computes; DumpError."""
    dump = read(Path(folder))
    return dump, call_of(dump)


def case_of(folder: str) -> Case:
    """The recorded call's case: its id has the shape and the activation, nothing can be drawn from it."""
    return opened(folder)[1].case


def subject_of(folder: str, name: str) -> Backend:
    """The recorded call in `folder`, under `name`."""
    dump, call = opened(folder)
    case, reader = call.case, reader_of(dump)
    return Backend(
        name=name,
        op=case.op,
        library="flashinfer-python",
        deterministic=call.deterministic,
        recipes=(str(case.recipe),),
        activations=(case.activation,),
        archs=(*reader.archs, CPU.arch) if reader.archs else (),
        prepare=partial(_prepare, folder),
        rounding=lambda case: call.rounding,
        probe=lambda device: YES if device.kind == "cpu" else needs(reader.entry)(device),
        summary=f"a recorded call of {dump.function}, {dump.folder.name}",
        exempt={check.name: RECORDED for check in CHECKS},
        recorded=call.inputs,
        entries=(reader.entry,),
        biases=(case.bias,),
        weightings=(case.weighting,),
    )


def _prepare(folder: str, case: Case, inputs: Inputs) -> Launch:
    dump, _ = opened(folder)
    reader = reader_of(dump)
    given = {name: _placed(value, inputs.device) for name, value in dump.arguments.items() if name not in reader.written}
    like = {name: t for name in reader.written if isinstance(t := dump.arguments.get(name), Tensor)}
    function = resolve(reader.entry, inputs.device)

    def call(output: Tensor | None = None) -> Tensor:
        written = {n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=inputs.device) for n, t in like.items()}
        if output is not None:
            written[reader.written[0]] = output
        return reader.outcome(dump.arguments, written, returned(function(**given, **written)))

    buffers = _buffers(given)
    out: Callable[[Tensor], object] | None = call if case.op == "moe" and reader.written and reader.written[0] in like else None
    return Launch(call, buffers, out=out, contract=tuple(a for a in reader.contract if a.name in buffers))


def judge_recorded(folder: str) -> tuple[str, Comparison | None, Diagnosis | None]:
    """(what is to be said, numbers, what it looks like) of what the call returned when it was recorded, on the CPU. Nothing
    but a sentence where the recorder kept no output that could be judged."""
    dump, call = opened(folder)
    if dump.result is None:
        return "it never returned", None, None
    reader, case = reader_of(dump), call.case
    if not dump.result and reader.written:
        return "it returned no tensor, and the recorder keeps no buffer that a call writes to", None, None
    try:
        got = reader.outcome(dump.arguments, {}, dump.result)
    except REFUSALS as error:
        return f"what it returned then does not fit the call: {error}", None, None
    if finding := malformed(case, got, CPU):
        return f"what it returned then is MALFORMED: {finding.text}", None, None
    expected = expect(case, call.inputs("cpu"), call.rounding)
    found = compare(expected, got)
    share = f"{found.beyond} of {found.total} elements beyond the bound, worst z {found.worst:.3g}, rel-L2 {found.rel_l2:.2e}"
    if found.agrees:
        return f"what it returned then agrees: {share}", found, None
    looks = describe(case, expected, got, found) if case.op != "moe" else named(diagnose(expected, got, found), expected, got)
    return f"what it returned then is WRONG: {share}; looks like {looks.kind}: {looks.text}", found, looks


def returned(result: object) -> tuple[Tensor, ...]:
    """The tensors that a call returned, none where it returned None; TypeError for anything else."""
    found = () if result is None else tuple(result) if isinstance(result, list | tuple) else (result,)
    if not all(isinstance(t, Tensor) for t in found):
        raise TypeError(f"returned {type(result).__name__}, wanted tensors")
    return found


def _placed(value: Any, device: str) -> Any:
    """A recorded value where the call wants it; members of enums as the installed release numbers them."""
    if isinstance(value, Tensor):
        if value.is_contiguous() or 0 in value.stride():
            return value.to(device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, Member):
        return resolve(f"flashinfer.tllm_enums.{value.enum}", device)[value.name]  # type: ignore[index]
    return type(value)(_placed(item, device) for item in value) if isinstance(value, list | tuple) else value


def _buffers(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by parameter name, those of a list numbered; what is empty has no address."""
    flat = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        numbered = enumerate(value) if isinstance(value, list | tuple) else ()
        flat |= {f"{name}_{i}": item for i, item in numbered if isinstance(item, Tensor)}
    return {name: tensor for name, tensor in flat.items() if tensor.numel()}
