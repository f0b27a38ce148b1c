"""Subjects of test_seeds: the layer of torch_grouped_mm, handed an output buffer. On a CPU the other device is `meta`."""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.backends.base import Launch
from harness.backends.torch_grouped_mm import BACKENDS as CLEAN
from harness.case import Case
from harness.inputs import Inputs


def handed(device: str, case: Case, inputs: Inputs) -> Launch:
    """The launch with `out` made as vLLM's test made it: torch.empty(shape, dtype), on whatever device that gives."""
    launch = CLEAN[0].prepare(case, inputs)
    out = torch.empty_like(inputs.x, device=device)
    return replace(launch, buffers={**launch.buffers, "out": out})


BACKENDS = tuple(
    replace(CLEAN[0], name=name, prepare=lambda case, inputs, device=device: handed(device, case, inputs))
    for name, device in (("out_on_another_device", "meta"), ("out_on_its_device", "cpu"))
)
