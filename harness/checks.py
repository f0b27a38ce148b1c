"""Checks beside the values: is the output what was promised, are the inputs untouched, would an impostor have passed."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.backends.base import Device, Launch
from harness.case import Case
from harness.impostors import passing
from harness.inputs import Inputs
from harness.oracle import Expected
from harness.verdict import Finding
from reference.formats import get

Snapshot = dict[str, Tensor]


def malformed(case: Case, output: object, device: Device) -> Finding | None:
    """The output must be a tensor [tokens, hidden] of the recipe's out dtype on the case's device."""
    if not isinstance(output, Tensor):
        return Finding("output_type", f"returned {type(output).__name__}, wanted a tensor")
    wanted = get(case.recipe.out).torch_dtype
    shape = (case.shape.tokens, case.shape.hidden)
    if tuple(output.shape) != shape:
        return Finding("output_shape", f"returned shape {tuple(output.shape)}, wanted {shape}")
    if output.dtype != wanted:
        return Finding("output_dtype", f"returned {output.dtype}, wanted {wanted}")
    if output.device.type != device.kind and case.shape.tokens != 0:
        return Finding("output_device", f"returned a tensor on {output.device}, wanted {device.kind}")
    return None


def snapshot(inputs: Inputs, launch: Launch) -> Snapshot:
    """Copies of everything the kernel may read and must not change."""
    return {name: tensor.clone() for name, tensor in _watched(inputs, launch).items()}


def mutated(before: Snapshot, inputs: Inputs, launch: Launch) -> Finding | None:
    """Names the inputs that differ, bit for bit, from their copies."""
    changed = [n for n, t in _watched(inputs, launch).items() if not torch.equal(_bits(t), _bits(before[n]))]
    if not changed:
        return None
    return Finding("input_mutated", f"the call changed its input {', '.join(changed)}", {"tensors": changed})


def _watched(inputs: Inputs, launch: Launch) -> dict[str, Tensor]:
    watched = {"x": inputs.x, "logits": inputs.logits, **launch.buffers}
    return {name: tensor for name, tensor in watched.items() if tensor.numel()}


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def unstable(first: Tensor, second: object) -> Finding | None:
    """The same call on the same input must give the same bits, where the backend declares itself deterministic."""
    if not isinstance(second, Tensor) or second.shape != first.shape or second.dtype != first.dtype:
        return Finding("repeat", "the second call returned something of another type, shape or dtype")
    again = second.detach().cpu()
    differing = int((_bits(again) != _bits(first)).view(first.numel(), -1).any(-1).sum()) if first.numel() else 0
    if not differing:
        return None
    return Finding("repeat", f"{differing} of {first.numel()} elements differ between two calls on the same input")


def untrusted(case: Case, expected: Expected) -> str | None:
    """Why this case could not tell a right kernel from a wrong one, or None. A case without tokens only asks for a shape."""
    if case.shape.tokens == 0:
        return None
    if not bool(expected.value.isfinite().all()):
        return "the expected output is not finite"
    if bool(expected.ambiguous.all()):
        return "every token's routing is a near tie"
    if case.fill == "exact" and not expected.exact:
        return f"the exact fill is not exact here: {expected.reason}"
    out = get(case.recipe.out).torch_dtype
    assert out is not None  # a plain format, as every out is
    wrong = passing(expected, out)
    return f"impostors pass: {', '.join(wrong)}" if wrong else None
