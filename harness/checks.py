"""Checks beside the values: is the output what was promised, are the inputs untouched, would an impostor have passed."""

from __future__ import annotations

from torch import Tensor

from harness.backends.base import Launch
from harness.case import Case
from harness.impostors import passing
from harness.inputs import Inputs
from harness.memory import HUGE, NAN, RedZones, held
from harness.op_answers import promised
from harness.oracle import Expected
from harness.relations import CHECKS
from harness.subject import Subject, equal_bits, malformed, same
from harness.verdict import Finding, Status

Snapshot = dict[str, Tensor]
# What a finding means; the relations add theirs (harness/relations.py).
STATUS = {
    "input_mutated": Status.CORRUPTING,
    "red_zone": Status.CORRUPTING,
    "out_overrun": Status.CORRUPTING,
    "aliasing": Status.CORRUPTING,
    "never_written": Status.WRONG,
    "other_tokens": Status.WRONG,
    "repeat": Status.UNSTABLE,
    "poison": Status.UNSTABLE,
    **{check.name: check.status for check in CHECKS},
}


def snapshot(inputs: Inputs, launch: Launch) -> Snapshot:
    """Copies of everything the kernel may read and must not change."""
    return {name: tensor.clone() for name, tensor in _watched(inputs, launch).items()}


def mutated(before: Snapshot, inputs: Inputs, launch: Launch) -> Finding | None:
    """Names the inputs that differ, bit for bit, from their copies."""
    watched = _watched(inputs, launch)
    same_bits = equal_bits([(tensor, before[name]) for name, tensor in watched.items()])
    changed = [name for name, unchanged in zip(watched, same_bits, strict=True) if not unchanged]
    if not changed:
        return None
    return Finding("input_mutated", f"the call changed its input {', '.join(changed)}", {"tensors": changed})


def _watched(inputs: Inputs, launch: Launch) -> dict[str, Tensor]:
    watched = {"x": inputs.x, "logits": inputs.logits, **launch.buffers}
    return {name: tensor for name, tensor in watched.items() if tensor.numel()}


def repeated(subject: Subject, zones: RedZones) -> Finding | None:
    """The same call with another poison in whatever nobody wrote: the same bits are due where the backend declares itself
    deterministic. Two more calls, with the first and the second poison, tell a read of unwritten memory from a race."""
    output = _call(subject, zones, HUGE)
    if same(subject.result, output):
        return None
    if finding := malformed(subject.case, output, subject.device):
        return Finding("repeat", f"the second call: {finding.text}")
    assert isinstance(output, Tensor)
    second = output.detach().cpu().clone()
    unwritten = int((held(subject.result, NAN) & held(second, HUGE)).sum())
    total = subject.result.numel()
    if unwritten:
        text = f"{unwritten} of {total} output elements hold what memory held before: never written, or copied from there"
        return Finding("never_written", text, {"elements": unwritten})
    differing = int((subject.result != second).sum())
    if same(subject.result, _call(subject, zones, NAN)) and same(second, _call(subject, zones, HUGE)):
        text = f"{differing} of {total} elements depend on memory that nobody wrote: they change with its content"
        return Finding("poison", text, {"elements": differing})
    text = f"{differing} of {total} elements differ between two calls on the same input"
    return Finding("repeat", text, {"elements": differing})


def _call(subject: Subject, zones: RedZones, byte: int) -> object:
    zones.fill(byte)
    return subject.run(subject.launch.call, byte)


def overrun(zones: RedZones) -> Finding | None:
    """Names the buffers beside which the call wrote."""
    broken = zones.broken()
    if not broken:
        return None
    text = "; ".join(f"{name}: {where}" for name, where in broken.items())
    return Finding("red_zone", f"the call wrote outside a buffer: {text}", {"buffers": sorted(broken)})


def untrusted(case: Case, expected: Expected) -> str | None:
    """Why this case could not tell a right kernel from a wrong one, or None. A case without tokens only asks for a shape."""
    if case.shape.tokens == 0:
        return None
    if not bool(expected.value.isfinite().all()):
        return "the expected output is not finite"
    if bool(expected.ambiguous.all()):
        return "every token's routing is a near tie"
    if case.exact and not expected.exact:
        return f"the exact fill is not exact here: {expected.reason}"
    wrong = passing(expected, promised(case)[1], tiles=case.op == "moe")
    return f"impostors pass: {', '.join(wrong)}" if wrong else None
