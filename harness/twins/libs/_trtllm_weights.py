"""Numbers out of trtllm-gen's physical layouts: one expert's matrices, rows unshuffled, K blocks joined, block scales
unswizzled; and what GEMM 1 reads of x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference.grid import E2M1, E4M3, E8M0, INT4_FULL, Element
from reference.layouts import gated_reorder
from reference.layouts.block_major_k import block_major_k
from reference.layouts.linear import unpack_nibbles
from reference.layouts.trtllm_row_shuffle import block_rows, row_shuffle
from reference.layouts.trtllm_scale_shuffle import scale_shuffle

TILE, DEEPSEEK_TILE = 128, 64  # epilogueTileM, trtllm_fused_moe_runner.cu getOptions
GATED = gated_reorder.LAYOUTS[0]
BLOCK_BYTES = 128

Matrix = Callable[[int], Tensor]


@dataclass(frozen=True)
class Weights:
    """first(e), second(e): float32 [2 * inter or inter, hidden], rows [up; gate], and [hidden, inter] of a rank's expert e;
    biases: what is added to their sums, float32 of as many rows, or None."""

    first: Matrix
    second: Matrix
    biases: tuple[Matrix | None, Matrix | None] = (None, None)

    def with_biases(self, first: Tensor | None, second: Tensor | None, gated: bool) -> Weights:
        """The same with float32 biases [experts, rows] that lie as the rows of the weights do."""

        def matrix(stored: Tensor | None, reorder: bool) -> Matrix | None:
            return None if stored is None else lambda e: _ordered(stored[e].unsqueeze(-1), reorder).squeeze(-1)

        return replace(self, biases=(matrix(first, gated), matrix(second, False)))


def _ordered(stored: Tensor, gated: bool) -> Tensor:
    """The logical rows of a shuffled matrix [rows, columns], any dtype."""
    shape = tuple(stored.shape)
    rows = row_shuffle(block_rows(TILE)).unpack(stored, shape)
    return GATED.unpack(rows, shape) if gated else rows


def _scales(stored: Tensor, shape: tuple[int, int], gated: bool) -> Tensor:
    """The logical scales [rows, blocks] of a shuffled and 128x4-interleaved buffer."""
    rows = scale_shuffle(block_rows(TILE)).unpack(stored.reshape(-1), shape)
    return GATED.unpack(rows, shape) if gated else rows


def _bytes(blocks: Tensor) -> Tensor:
    """uint8 [rows, K bytes] of BlockMajorK [K blocks, rows, block] of any dtype."""
    raw = blocks.contiguous().view(torch.uint8)
    count, rows, width = raw.shape
    return block_major_k(width).unpack(raw, (rows, count * width))


def _times(values: Tensor, scales: Tensor) -> Tensor:
    """Every scale of a row times its block of columns."""
    rows, columns = values.shape
    return (values.view(rows, scales.shape[1], -1) * scales.unsqueeze(-1)).view(rows, columns)


def activations(x: Tensor, scales: Tensor | None = None) -> Tensor:
    """float32 [tokens, hidden] of x: plain numbers; E4M3 whose scale the epilogue applies; E4M3 with float32 or E8M0 scales;
    packed E2M1 with E4M3 scales. Scales are linear, of any shape with tokens first."""
    if x.element_size() > 1:
        return x.float()
    packed = x.dtype == torch.uint8
    values = E2M1.decode(unpack_nibbles(x), torch.float32) if packed else E4M3.decode(x.view(torch.uint8), torch.float32)
    if scales is None or not len(values):
        return values
    if scales.element_size() == 1:
        scales = (E4M3 if packed else E8M0).decode(scales.view(torch.uint8), torch.float32)
    return _times(values, scales.reshape(len(values), -1))


def bf16(first: Tensor, second: Tensor, gated: bool) -> Weights:
    """bf16 [experts, K / 64, rows, 64], BlockMajorK, shuffled."""

    def matrix(stored: Tensor, reorder: bool) -> Matrix:
        return lambda e: _ordered(_bytes(stored[e]).view(torch.bfloat16), reorder).float()

    return Weights(matrix(first, gated), matrix(second, False))


def fp8(first: Tensor, second: Tensor, gated: bool) -> Weights:
    """E4M3 [experts, rows, K], shuffled; the scale per expert is the epilogue's."""

    def matrix(stored: Tensor, reorder: bool) -> Matrix:
        return lambda e: E4M3.decode(_ordered(stored[e].view(torch.uint8), reorder), torch.float32)

    return Weights(matrix(first, gated), matrix(second, False))


def block_scaled(data: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], gated: bool, kind: str) -> Weights:
    """Shuffled codes [experts, rows, bytes], or BlockMajorK [experts, blocks, rows, 128], with a scale per `kind`'s block.

    kind: nvfp4 (E4M3 scales per 16), mxfp4, mxfp8 (E8M0 per 32), mxint4 (bf16 per 32).
    """
    block = 16 if kind == "nvfp4" else 32
    elements: dict[str, Element] = {"nvfp4": E2M1, "mxfp4": E2M1, "mxint4": INT4_FULL}

    def matrix(index: int, reorder: bool) -> Matrix:
        def one(e: int) -> Tensor:
            stored = data[index][e]
            raw = _bytes(stored) if stored.dim() == 3 else stored.view(torch.uint8)
            codes = _ordered(raw, reorder)
            values = E4M3.decode(codes, torch.float32) if kind == "mxfp8" else _pairs(codes, elements[kind])
            logical = _scales(_scale_codes(scales[index][e]), (values.shape[0], values.shape[1] // block), reorder)
            return _times(values, logical.float() if kind == "mxint4" else _decoded(logical, kind))

        return one

    return Weights(matrix(0, gated), matrix(1, False))


def _pairs(packed: Tensor, element: Element) -> Tensor:
    """float32 [rows, 2 * bytes]: the values of both nibbles of each byte, looked up at once."""
    table = element.decode(unpack_nibbles(torch.arange(256, dtype=torch.uint8)[:, None]), torch.float32)
    return table.index_select(0, packed.flatten().int()).view(packed.shape[0], -1)


def _scale_codes(scales: Tensor) -> Tensor:
    return scales if scales.dtype == torch.bfloat16 else scales.view(torch.uint8)


def _decoded(codes: Tensor, kind: str) -> Tensor:
    return (E4M3 if kind == "nvfp4" else E8M0).decode(codes, torch.float32)


def deepseek(data: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], shuffled: bool) -> Weights:
    """E4M3 [experts, rows, K] or BlockMajorK [experts, K / 128, rows, 128] with float32 scales per 128 x 128 block; rows are
    never reordered for the gate, and shuffled for an epilogue tile of 64."""

    def matrix(index: int) -> Matrix:
        def one(e: int) -> Tensor:
            stored = data[index][e]
            raw = _bytes(stored) if stored.dim() == 3 else stored.view(torch.uint8)
            if shuffled:
                raw = row_shuffle(block_rows(DEEPSEEK_TILE)).unpack(raw, tuple(raw.shape))
            return _times(E4M3.decode(raw, torch.float32), scales[index][e].repeat_interleave(BLOCK_BYTES, dim=0))

        return one

    return Weights(matrix(0), matrix(1))
