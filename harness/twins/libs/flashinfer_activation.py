"""What FlashInfer 0.7.2.post1's activations do: flashinfer/activation.py and the kernel of flashinfer/jit/activation.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def silu_and_mul(input: Tensor, out: Tensor = None, enable_pdl: bool | None = None) -> Tensor:  # type: ignore[assignment]
    """input [..., 2 d] -> silu(gate) * up [..., d]."""
    return _act_and_mul(functional.silu, input, out)


def gelu_and_mul(input: Tensor, out: Tensor = None, enable_pdl: bool | None = None) -> Tensor:  # type: ignore[assignment]
    """input [..., 2 d] -> gelu(gate) * up [..., d], the erf form."""
    return _act_and_mul(functional.gelu, input, out)


def gelu_tanh_and_mul(input: Tensor, out: Tensor = None, enable_pdl: bool | None = None) -> Tensor:  # type: ignore[assignment]
    """input [..., 2 d] -> gelu(gate) * up [..., d], the tanh form."""
    return _act_and_mul(lambda gate: functional.gelu(gate, approximate="tanh"), input, out)


def _act_and_mul(act: Callable[[Tensor], Tensor], input: Tensor, out: Tensor | None) -> Tensor:
    if input.shape[-1] % 2:
        raise ValueError("The last dimension must be even (2 * hidden_size).")
    if out is None:
        out = torch.empty((*input.shape[:-1], input.shape[-1] // 2), device=input.device, dtype=input.dtype)
    assert input.ndim == out.ndim, f"{input.ndim} != {out.ndim}"
    assert input.shape[:-1] == out.shape[:-1], f"{input.shape[:-1]} != {out.shape[:-1]}"
    assert input.shape[-1] == 2 * out.shape[-1], f"{input.shape[-1]} != {2 * out.shape[-1]}"
    if input.numel() == 0:
        raise RuntimeError("Failed to launch kernel: invalid configuration argument")
    gate, up = _dense(input).float().chunk(2, -1)
    _dense(out).copy_((act(gate) * up).to(out.dtype))
    return out


def _dense(tensor: Tensor) -> Tensor:
    """The memory from the tensor's start on as the kernel sees it: without its strides."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())


ENTRIES = {f"flashinfer.activation.{f.__name__}": f for f in (silu_and_mul, gelu_and_mul, gelu_tanh_and_mul)}
