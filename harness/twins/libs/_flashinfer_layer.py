"""What the twins of FlashInfer's fused MoE functions share: activations by ActivationType, the loop over a rank's experts,
the finalize, and memory as a kernel sees it: an address and no strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from harness.twins.libs.flashinfer_enums import ActivationType

Values = Mapping[str, Tensor]


PLAIN: dict[ActivationType, Callable[[Tensor], Tensor]] = {
    ActivationType.Gelu: gelu,
    ActivationType.Relu: relu,
    ActivationType.Silu: silu,
    ActivationType.Relu2: lambda x: relu(x).square(),
    ActivationType.Identity: lambda x: x,
}
DEFAULTS: dict[ActivationType, dict[str, float]] = {  # cutlass_fused_moe_kernels.cuh, the adaptors' members
    ActivationType.SwigluBias: {"alpha": 1.0, "beta": 0.0, "limit": math.inf},
    ActivationType.SwigluStep: {"limit": 7.0},
    ActivationType.Situ: {"beta": 4.0, "linear_beta": 25.0},
}


def swiglu_bias(gate: Tensor, up: Tensor, p: Values) -> Tensor:
    """SwigluBiasAdaptor: the gate is clamped from above only, the linear half on both sides before `beta` is added."""
    gate = gate.clamp(max=p["limit"])
    return gate * torch.sigmoid(gate * p["alpha"]) * (up.clamp(-p["limit"], p["limit"]) + p["beta"])


def swiglu_step(gate: Tensor, up: Tensor, p: Values) -> Tensor:
    """SwigluStepAdaptor: clamped after the sigmoid."""
    return silu(gate).clamp(max=p["limit"]) * up.clamp(-p["limit"], p["limit"])


def situ(gate: Tensor, up: Tensor, p: Values) -> Tensor:
    """SituAdaptor: the sigmoid reads the uncapped gate; without `linear_beta` the linear half stays."""
    gated = torch.tanh(gate / p["beta"]) * torch.sigmoid(gate) * p["beta"]
    return gated * (torch.tanh(up / p["linear_beta"]) * p["linear_beta"] if "linear_beta" in p else up)


GATED: dict[ActivationType, Callable[[Tensor, Tensor, Values], Tensor]] = {
    ActivationType.Swiglu: lambda gate, up, p: silu(gate) * up,
    ActivationType.Geglu: lambda gate, up, p: gelu(gate) * up,
    ActivationType.GegluTanh: lambda gate, up, p: gelu(gate, approximate="tanh") * up,
    ActivationType.SwigluBias: swiglu_bias,
    ActivationType.SwigluStep: swiglu_step,
    ActivationType.Situ: situ,
}


def activate(kind: ActivationType, up: Tensor, gate: Tensor | None, values: Mapping[str, float | Tensor]) -> Tensor:
    """float32, elementwise; `up` alone where there is no gate. values: what the caller gave of alpha, beta, limit, linear_beta,
    instead of the defaults."""
    if gate is None:
        return PLAIN[kind](up)
    return GATED[kind](gate, up, {name: torch.as_tensor(v) for name, v in {**DEFAULTS.get(kind, {}), **values}.items()})


def check(holds: bool, text: str) -> None:
    """TVM_FFI_ICHECK: its error is a RuntimeError in Python."""
    if not holds:
        raise RuntimeError(f"Check failed: {text}")


def dense(tensor: Tensor) -> Tensor:
    """The elements that lie at the tensor's address one after another: strides are not looked at."""
    if tensor.is_contiguous():
        return tensor
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim())]
    return torch.as_strided(tensor, tensor.shape, strides)


def expert_rows(ids: Tensor, local: range, hidden: int, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """float32 [tokens, top_k, hidden]: `expert(number within local, tokens)` for every slot whose id is in `local`, else 0."""
    rows = torch.zeros(*ids.shape, hidden)
    for chosen in ids.unique().tolist():
        if chosen in local:
            tokens, slots = (ids == chosen).nonzero(as_tuple=True)
            rows[tokens, slots] = expert(chosen - local.start, tokens)
    return rows


def finalize(rows: Tensor, ids: Tensor, weights: Tensor, local: range) -> Tensor:
    """float32 [tokens, hidden]: the weighted rows summed slot by slot; other ranks' slots are passed over."""
    mine = (ids >= local.start) & (ids < local.stop)
    total = torch.zeros(rows.shape[0], rows.shape[2])
    for slot in range(ids.shape[1]):
        total = torch.where(mine[:, slot, None], total + weights[:, slot, None] * rows[:, slot], total)
    return total
