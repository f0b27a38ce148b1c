"""What FlashInfer's CuTe-DSL kernels do with their operands: packed codes, scales in the MMA view, activations, quantisers."""

from __future__ import annotations

from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from reference.format import Format
from reference.formats import get
from reference.grid import E2M1
from reference.layouts.mma_view import unview

SWIGLU, RELU2, GEGLU_TANH = 3, 6, 8  # flashinfer/tllm_enums.py ActivationType, 0.7.2.post1
NVFP4, MXFP4, MXFP8 = get("nvfp4"), get("mxfp4"), get("mxfp8")
GELU_CUBIC = 0.044715  # Hendrycks and Gimpel 2016


@cache
def _pairs() -> Tensor:
    """float32 [256, 2]: the two E2M1 values of a byte, the low nibble's first."""
    byte = torch.arange(256)
    return torch.stack([E2M1.decode(byte & 0xF, torch.float32), E2M1.decode(byte >> 4, torch.float32)], -1)


def fp4_values(packed: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """float32 [rows, columns]: code times block scale, no global scale. packed uint8 [rows, columns / 2]; scales: bytes
    [rows, columns / block]."""
    codes = _pairs()[packed.long()].flatten(-2)
    return scaled(codes, scales, fmt)


def scaled(codes: Tensor, scales: Tensor, fmt: Format) -> Tensor:
    """float32 [rows, columns] of code values times their block's scale, given as bytes [rows, blocks]."""
    assert fmt.scaling is not None
    factors = fmt.scaling.element.decode(scales.view(torch.uint8), torch.float32)
    blocks: Tensor = codes.unflatten(-1, (factors.shape[-1], -1))
    return (blocks * factors.unsqueeze(-1)).flatten(-2)


def mma_scales(stored: Tensor, rows: int, blocks: int) -> Tensor:
    """uint8 [groups, rows, blocks] out of the strided (32, 4, row tiles, 4, block tiles, groups) view; ValueError if it has
    no room for them: the kernels take an address and read on."""
    wanted = (32, 4, -(-rows // 128), 4, -(-blocks // 4))
    if tuple(stored.shape[:-1]) != wanted:
        raise ValueError(
            f"scale factors {tuple(stored.shape)} are not the MMA layout of {rows} rows, {blocks} blocks: {wanted}"
        )
    return unview(stored.view(torch.uint8), (stored.shape[-1], rows, blocks))


def requantized(rows: Tensor, fmt: Format, global_scale: Tensor | None) -> Tensor:
    """float32 rows [n, columns] through the quantiser: code times block scale, the global scale (encode sense) left in."""
    if not len(rows):
        return rows
    q = fmt.encode(rows, global_scale)
    assert q.scales is not None
    return scaled(fmt.element.decode(q.codes, torch.float32), q.scales, fmt)


def activated(first: Tensor, up: Tensor | None, kind: int, swiglu: tuple[float, float, float]) -> Tensor:
    """The epilogue of GEMM 1 on the gate (or the only) half and the up half; swiglu: alpha, beta, limit."""
    if up is None:
        return torch.relu(first).square()
    if kind == GEGLU_TANH:
        inner = (2 / torch.pi) ** 0.5 * (first + GELU_CUBIC * first**3)
        return first * torch.sigmoid(2 * inner) * up
    alpha, beta, limit = swiglu
    gate = first.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)


def situ(gate: Tensor, up: Tensor, beta: float, linear_beta: float | None) -> Tensor:
    """beta tanh(g / beta) sigmoid(g) times up, which goes through a tanh of its own where `linear_beta` is given."""
    linear = up if linear_beta is None else linear_beta * torch.tanh(up / linear_beta)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * linear


def unsupported(what: str, given: object, wanted: object) -> NoReturn:
    """ValueError in the words of an entry point that checks its own arguments."""
    raise ValueError(f"{what}={given!r} is not what this twin does; it does {wanted!r}")
