"""The bare call again and again: a race, or a counter that goes wrong once in a hundred calls, shows in no two of them."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from harness.subject import Subject, equal_bits, guarded, malformed, same
from harness.verdict import Finding

REPEATS_S = 0.5  # a hundred calls of 5 ms: an interpreted kernel, at 0.2 s a call, is not to take twenty seconds a case
BURST = 8  # calls that are launched before the first of them is waited for and read, as the layers of a model are


def unrepeatable(subject: Subject, calls: int) -> Finding | None:
    """`calls` bare calls, in bursts that nobody waits for: each time the bits of the first are due, where the backend
    declares itself deterministic."""
    if not subject.backend.deterministic or not subject.case.shape.tokens:
        return None
    first, done = subject.result.to(subject.output.device), 0
    end = time.perf_counter() + REPEATS_S
    while done < calls and time.perf_counter() < end:
        count = min(done or 1, BURST, calls - done)  # grows: a slow kernel is not asked for eight
        outputs = guarded(partial(_burst, subject, count))
        alike = _alike(first, outputs)
        for number, output in enumerate(outputs, done + 1):
            if alike[number - done - 1]:
                continue
            if finding := malformed(subject.case, output, subject.device):
                return Finding("repeat", f"repeated call {number}: {finding.text}", {"call": number, "calls": calls})
            elements = int((first != output).sum())
            text = f"{elements} of {first.numel()} elements of repeated call {number} on the same input differ from the first's"
            return Finding("repeat", text, {"call": number, "calls": calls, "elements": elements})
        done += count
    return None


def _alike(first: Tensor, outputs: list[Tensor]) -> list[bool]:
    """Which outputs have the first one's bits."""
    if any(
        not isinstance(o, Tensor) or (o.shape, o.dtype, o.device) != (first.shape, first.dtype, first.device) for o in outputs
    ):
        return [same(first, output) for output in outputs]
    return equal_bits([(first, output) for output in outputs])


def _burst(subject: Subject, count: int) -> list[Tensor]:
    outputs = [subject.launch.call() for _ in range(count)]
    if subject.device.kind == "cuda":
        torch.cuda.synchronize()
    return outputs
