"""In the worker's child: the tensors of one case as a backend gets them, and what a right kernel makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness import fills
from harness.backends.base import Backend, Device, Launch
from harness.bundle.manifest import EXPECTED, INPUTS, MAX_EXPECTED, MAX_TENSORS
from harness.bundle.standalone import STORED, drawn
from harness.case import Case
from harness.compare import mean_z2_limit, z_limit
from harness.inputs import GATE_STD, MIDDLE_RMS, UP_STD, X_RMS, make_inputs
from harness.op_answers import promised
from harness.oracle import expect
from harness.subject import SubjectError, guarded
from reference.activation import ACTIVATIONS
from reference.formats import get
from reference.grid import ElementType

FLOAT64_BYTES = 8


def collect(case: Case, backend: Backend, device: Device, folder: Path) -> dict[str, Any]:
    """Write inputs.safetensors and expected.safetensors into `folder`. Returns plain data for repro.py: tensors (name ->
    dtype, shape, stride, source), draw (what `standalone.drawn` needs, or None), expected, and problem: why there are no
    tensors, "" if there are."""
    inputs = make_inputs(case, device.kind)
    found: dict[str, Any] = {
        "tensors": {},
        "draw": None,
        "expected": _expectation(case, backend, device, folder),
        "problem": "",
    }
    try:
        launch = guarded(lambda: backend.prepare(case, inputs))
    except SubjectError as caught:
        return {**found, "problem": f"prepare() raised {type(caught.error).__name__}: {caught.error!s:.300}"}
    if not isinstance(launch, Launch) or not launch.buffers:
        return {**found, "problem": f"backend {backend.name} does not show the tensors it hands to its kernel (Launch.buffers)"}
    draw = drawing(case)
    again = {name for name, tensor in launch.buffers.items() if draw is not None and _is_drawn(name, tensor, draw)}
    stored = {name: tensor for name, tensor in launch.buffers.items() if name not in again}
    size = sum(_span(tensor) * tensor.element_size() for tensor in stored.values())
    if size > MAX_TENSORS:
        return {**found, "problem": f"the inputs have {size} bytes, a bundle holds {MAX_TENSORS}"}
    save_file({name: _flat(tensor) for name, tensor in stored.items()}, folder / INPUTS)
    tensors = {name: {**_spec(t), "source": "hash" if name in again else "file"} for name, t in launch.buffers.items()}
    return {**found, "tensors": tensors, "draw": draw if again else None}


def _expectation(case: Case, backend: Backend, device: Device, folder: Path) -> dict[str, Any]:
    """The float64 layer and its sigma where they are small; the limits in any case that has them."""
    shape, dtype = promised(case)
    facts = {"shape": list(shape), "dtype": _name(dtype), "file": "", "exact": False}
    rounding = backend.rounding(case)
    if rounding is None or case.op == "route" or 2 * math.prod(shape) * FLOAT64_BYTES > MAX_EXPECTED:
        return facts  # without declared roundings tiles are compared with an emulation, and ids are no numbers: no z for them
    expected = expect(case, make_inputs(case, device.kind), rounding, guard=False)
    tensors = {"value": expected.value, "sigma": expected.sigma, "ambiguous": expected.ambiguous}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / EXPECTED)
    judged = int((~expected.ambiguous).sum()) * shape[1]
    limit = 0.0 if expected.exact else z_limit(judged)
    mean = mean_z2_limit(float(expected.independent.sum()))
    return {**facts, "file": EXPECTED, "exact": expected.exact, "limit": limit, "mean_limit": mean}


def drawing(case: Case) -> dict[str, Any] | None:
    """What `standalone.drawn` needs to draw x, w13 and w2 of this case again; None unless they are dense values of one plain
    type."""
    fmt, element, shape = get(case.recipe.weights), get(case.recipe.weights).element, case.shape
    if case.op != "moe" or case.fill != "real" or fmt.torch_dtype is None or case.recipe.acts != case.recipe.weights:
        return None
    assert isinstance(element, ElementType)
    rms = {"x": X_RMS, "gate": GATE_STD / math.sqrt(shape.hidden) / X_RMS, "up": UP_STD / math.sqrt(shape.hidden) / X_RMS}
    rms["down"] = math.sqrt(shape.top_k / shape.inter) / MIDDLE_RMS
    if not ACTIVATIONS[case.activation].gated:
        del rms["up"]
    return {
        "seed": case.seed,
        **{name: getattr(shape, name) for name in ("tokens", "hidden", "inter", "experts")},
        "dtype": _name(fmt.torch_dtype),
        "bits": element.bits,
        "mantissa_bits": element.mantissa_bits,
        "top_exponent": element.bias + min(0, element.max_exponent),
        "binades": fills.BINADES,
        "factors": {name: 2.0 ** round(math.log2(r / fills.window_rms(element))) for name, r in rms.items()},
    }


def _is_drawn(name: str, tensor: Tensor, draw: dict[str, Any]) -> bool:
    """Would repro.py draw the very bits that this buffer holds?"""
    if name not in ("x", "w13", "w2") or not tensor.is_contiguous() or str(tensor.dtype) != f"torch.{draw['dtype']}":
        return False
    if name == "x":
        return torch.equal(drawn(name, draw, range(0)), tensor.cpu())
    if tensor.dim() != 3 or tensor.shape[0] != draw["experts"]:
        return False
    # one expert after another: all of a large layer would need its memory twice
    return all(torch.equal(drawn(name, draw, range(e, e + 1))[0], tensor[e].cpu()) for e in range(draw["experts"]))


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _flat(tensor: Tensor) -> Tensor:
    """[span]: those elements on the CPU; types that safetensors' other readers lack as uint8."""
    flat = tensor.detach().as_strided((_span(tensor),), (1,), tensor.storage_offset()).cpu().clone()
    return flat if flat.dtype in STORED.values() else flat.view(torch.uint8)


def _spec(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": _name(tensor.dtype), "shape": list(tensor.shape), "stride": list(tensor.stride())}


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
