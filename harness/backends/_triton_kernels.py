# ruff: noqa: PLR0913 - a kernel's arguments are its pointers and sizes
"""A small Mixture-of-Experts layer in Triton: align, grouped GEMM, activation, finalize.

Values are rounded to the dtype of x at four points only: output of GEMM 1, output of the activation, output of GEMM 2,
output of the layer. All else is float32. Dequantised weights must be values of that dtype: E4M3 codes and E2M1 codes times
E4M3 scales always are; E2M1 times an E8M0 byte is one of fp16 for bytes 104..140. Runs natively and interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("plain", "fp8", "nvfp4", "mxfp4")
GATED = ("swiglu", "swiglu_oai", "geglu")
ACTIVATIONS = (*GATED, "silu", "relu", "gelu", "gelu_tanh", "identity")
SCALE_GROUP = {"mxfp4": 32, "nvfp4": 16}
CHUNK = 64  # ids one program of the alignment looks at; it compares each with each


@dataclass(frozen=True)
class Weights:
    """Expert weights [experts, N, K]: `data` (two codes a byte in the 4-bit kinds), block `scales` [experts, N, K / group]
    as bytes, float32 `factors` [experts, 1] or [experts, 2], one for each half of the rows."""

    kind: str
    data: Tensor
    scales: Tensor | None = None
    factors: Tensor | None = None

    def shape(self) -> tuple[int, int, int]:
        """Logical (experts, N, K), packed nibbles counted one by one."""
        experts, n, k = self.data.shape
        return experts, n, k * 2 if self.kind in SCALE_GROUP else k


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the grouped GEMM. None: 64 on a GPU, up to 512 interpreted, where an operation costs more than its size."""

    m: int = 16
    n: int | None = None
    k: int | None = None
    warps: int = 4


@dataclass(frozen=True)
class Routed:
    """Slots token * top_k + j sorted by expert, each expert padded to `block_m` entries with the sentinel `total`;
    `block_expert` names the expert of each block. ids outside [0, experts) are left out."""

    slots: Tensor
    block_expert: Tensor
    total: int
    block_m: int


@triton.jit
def _rank_kernel(ids_ptr, ranks_ptr, counts_ptr, total, experts, CHUNK: tl.constexpr):
    """One program per chunk of ids: the rank of each among its equals in the chunk, counts[chunk, expert] of them."""
    chunk = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    at = chunk * CHUNK + lane
    ids = tl.load(ids_ptr + at, mask=at < total, other=-1)
    same = (ids[:, None] == ids[None, :]).to(tl.int32)
    rank = tl.sum(tl.where(lane[None, :] < lane[:, None], same, 0), axis=1)
    count = tl.sum(same, axis=1)
    live = (ids >= 0) & (ids < experts)
    tl.store(ranks_ptr + at, rank, mask=live)
    tl.store(counts_ptr + chunk * experts + ids, count, mask=live & (rank == count - 1))


@triton.jit
def _place_kernel(ids_ptr, ranks_ptr, starts_ptr, slots_ptr, total, experts, CHUNK: tl.constexpr):
    """slots[starts[chunk, id] + rank] = its own index, for every id that names an expert."""
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + at, mask=at < total, other=-1)
    live = (ids >= 0) & (ids < experts)
    rank = tl.load(ranks_ptr + at, mask=live, other=0)
    start = tl.load(starts_ptr + chunk * experts + ids, mask=live, other=0)
    tl.store(slots_ptr + start + rank, at, mask=live)


@triton.jit
def _e2m1(code):
    """Low nibble of int32 `code` as float32: 0, .5, 1, 1.5, 2, 3, 4, 6, bit 3 the sign."""
    mag = code & 7
    bits = tl.where(mag > 1, (mag + 252) << 22, (mag & 1) * 0x3F000000)
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(code):
    """An int32 byte as E4M3FN: subnormals are multiples of 2**-9, 0x7F and 0xFF are NaN."""
    mag = code & 127
    tiny = (mag.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(mag > 7, (mag + 960) << 20, tiny)
    bits = tl.where(mag == 127, 0x7FC00000, bits)
    return (bits | ((code & 128) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _e8m0(code):
    """An int32 byte b as 2**(b - 127): byte 0 is the float32 subnormal 2**-127, byte 255 NaN."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weight_tile(w_ptr, s_ptr, expert, n, k, N, K, KIND: tl.constexpr):
    """W[expert, n, k] transposed, dequantised but for its factor: a [k, n] tile, zero out of bounds."""
    mask = (k[:, None] < K) & (n[None, :] < N)
    row = (expert * N + n)[None, :]
    if KIND == "plain":
        tile = tl.load(w_ptr + row * K + k[:, None], mask=mask, other=0.0)
    elif KIND == "fp8":
        tile = _e4m3(tl.load(w_ptr + row * K + k[:, None], mask=mask, other=0).to(tl.int32))
    else:
        byte = tl.load(w_ptr + row * (K // 2) + (k // 2)[:, None], mask=mask, other=0)
        tile = _e2m1(byte.to(tl.int32) >> ((k & 1) * 4)[:, None])
        if KIND == "mxfp4":
            scale = tl.load(s_ptr + row * (K // 32) + (k // 32)[:, None], mask=mask, other=0)
            tile = tile * _e8m0(scale.to(tl.int32))
        else:
            scale = tl.load(s_ptr + row * (K // 16) + (k // 16)[:, None], mask=mask, other=0)
            tile = tile * _e4m3(scale.to(tl.int32))
    return tile


@triton.jit
def _gemm_kernel(
    a_ptr,
    w_ptr,
    s_ptr,
    f_ptr,
    c_ptr,
    slots_ptr,
    experts_ptr,
    t_ptr,
    N,
    K,
    padded,
    total,
    divisor,
    half,
    FACTORS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """C[slot, n] = factor[e, n >= half] * sum over k of A[slot // divisor, k] * W[e, n, k], e the expert of the block;
    times t[slot] unless t_ptr is None, which is no argument at all of what is compiled."""
    block = tl.program_id(0)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots_ptr + m, mask=m < padded, other=total)
    live = slot < total
    a_row = (slot // divisor).to(tl.int64) * K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + a_row[:, None] + k[None, :], mask=live[:, None] & (k[None, :] < K), other=0.0)
        w = _weight_tile(w_ptr, s_ptr, expert, n, k, N, K, KIND).to(a_ptr.dtype.element_ty)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    if FACTORS > 0:
        column = tl.where(n < half, 0, FACTORS - 1)
        acc = acc * tl.load(f_ptr + expert * FACTORS + column, mask=n < N, other=0.0)[None, :]
    if t_ptr is not None:
        acc = acc * tl.load(t_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    out = c_ptr + slot.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(c_ptr.dtype.element_ty), mask=live[:, None] & (n[None, :] < N))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _gelu(x):
    """x * Phi(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activation_kernel(
    in_ptr,
    out_ptr,
    ids_ptr,
    total,
    width,
    experts,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[r, c] = act(in[r, c]) [* linear(in[r, width + c]) if gated]; rows of no expert stay untouched."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ids = tl.load(ids_ptr + r, mask=r < total, other=-1)
    mask = ((ids >= 0) & (ids < experts))[:, None] & (c[None, :] < width)
    row = r.to(tl.int64)[:, None] * width
    if GATE:
        source = in_ptr + row * 2 + c[None, :]
        up = tl.load(source + width, mask=mask, other=0.0).to(tl.float32)
    else:
        source = in_ptr + row + c[None, :]
    g = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if KIND == "swiglu":
        y = g * _sigmoid(g) * up
    elif KIND == "swiglu_oai":
        g = tl.where(g > 7.0, 7.0, g)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = g * _sigmoid(1.702 * g) * (up + 1.0)
    elif KIND == "geglu":
        y = _gelu(g) * up
    elif KIND == "silu":
        y = g * _sigmoid(g)
    elif KIND == "relu":
        y = tl.where(g < 0.0, 0.0, g)
    elif KIND == "gelu":
        y = _gelu(g)
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z), without the cancellation
        y = g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(KIND == "identity")
        y = g
    tl.store(out_ptr + row + c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finalize_kernel(
    rows_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    tokens,
    hidden,
    top_k,
    experts,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t, h] = sum over j of weights[t, j] * rows[t * top_k + j, h], in slot order, over slots with an expert."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.full((BLOCK_T, BLOCK_H), 0.0, dtype=tl.float32)
    for j in range(0, top_k):
        slot = t.to(tl.int64) * top_k + j
        ids = tl.load(ids_ptr + slot, mask=t < tokens, other=-1)
        live = (ids >= 0) & (ids < experts)
        weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
        mask = live[:, None] & (h[None, :] < hidden)
        row = tl.load(rows_ptr + slot[:, None] * hidden + h[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * row.to(tl.float32)
    out = out_ptr + t.to(tl.int64)[:, None] * hidden + h[None, :]
    mask = (t < tokens)[:, None] & (h[None, :] < hidden)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def align(ids: Tensor, experts: int, block_m: int) -> Routed:
    """Sort the slots of ids [tokens, top_k] (int32) by expert, stably: every id is read twice, whatever the expert count."""
    flat = ids.reshape(-1).contiguous()
    total, device = flat.numel(), flat.device
    chunks = triton.cdiv(total, CHUNK)
    counts = torch.zeros((chunks, experts), dtype=torch.int32, device=device)
    if total == 0 or experts == 0:
        return Routed(flat[:0], flat[:0], total, block_m)
    ranks = torch.zeros_like(flat)
    _rank_kernel[(chunks,)](flat, ranks, counts, total, experts, CHUNK=CHUNK)
    blocks = (counts.sum(0) + (block_m - 1)) // block_m
    ends = torch.cumsum(blocks, 0) * block_m
    starts = (ends - blocks * block_m) + torch.cumsum(counts, 0) - counts
    padded = int(ends[-1].item())
    slots = torch.full((padded,), total, dtype=torch.int32, device=device)
    _place_kernel[(chunks,)](flat, ranks, starts.to(torch.int32), slots, total, experts, CHUNK=CHUNK)
    names = torch.arange(experts, dtype=torch.int32, device=device)
    return Routed(slots, torch.repeat_interleave(names, blocks, output_size=padded // block_m), total, block_m)


def _tile(size: int, given: int | None, on_gpu: bool) -> int:
    return given or (64 if on_gpu else max(16, min(512, triton.next_power_of_2(size))))


def _raw(tensor: Tensor) -> Tensor:
    """Contiguous, one-byte floats seen as uint8."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def grouped_gemm(
    a: Tensor, weights: Weights, routed: Routed, divisor: int, tiles: Tiles | None = None, times: Tensor | None = None
) -> Tensor:
    """C [slots, N] in the dtype of a: row s is a[s // divisor] times its expert's weights, and times `times` [slots] where
    given, before it is rounded; rows of no expert are undefined."""
    tiles = tiles or Tiles(routed.block_m)
    _, n, k = weights.shape()
    c = torch.empty((routed.total, n), dtype=a.dtype, device=a.device)
    padded = routed.slots.numel()
    if padded == 0 or n == 0:
        return c
    data = _raw(weights.data)
    scales = data if weights.scales is None else _raw(weights.scales)
    factors, columns = data, 0
    if weights.factors is not None:
        factors, columns = weights.factors.contiguous().to(torch.float32), weights.factors.shape[1]
    width = _tile(n, tiles.n, a.is_cuda)
    _gemm_kernel[(padded // routed.block_m, triton.cdiv(n, width))](
        a.contiguous(), data, scales, factors, c, routed.slots, routed.block_expert,
        None if times is None else times.contiguous(),
        n, k, padded, routed.total, divisor, n // 2 if columns == 2 else n,
        FACTORS=columns, KIND=weights.kind,
        BLOCK_M=routed.block_m, BLOCK_N=width, BLOCK_K=_tile(k, tiles.k, a.is_cuda),
        num_warps=tiles.warps,
    )  # fmt: skip
    return c


def activate(rows: Tensor, ids: Tensor, experts: int, activation: str) -> Tensor:
    """Apply `activation` to rows [slots, 2 * width] (gated) or [slots, width] of slots with an expert."""
    total, columns = rows.shape
    gated = activation in GATED
    width = columns // 2 if gated else columns
    out = torch.empty((total, width), dtype=rows.dtype, device=rows.device)
    tall, wide = (4, 256) if rows.is_cuda else (128, _tile(width, None, False))
    _activation_kernel[(triton.cdiv(total, tall), triton.cdiv(width, wide))](
        rows, out, ids, total, width, experts, KIND=activation, GATE=gated, BLOCK_R=tall, BLOCK_C=wide
    )
    return out


def finalize(rows: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """Weighted sum over each token's slots of rows [tokens * top_k, hidden]: [tokens, hidden]."""
    (tokens, top_k), hidden = ids.shape, rows.shape[1]
    out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)
    tall, wide = (4, 256) if rows.is_cuda else (64, _tile(hidden, None, False))
    _finalize_kernel[(triton.cdiv(tokens, tall), triton.cdiv(hidden, wide))](
        rows, weights.contiguous(), ids, out, tokens, hidden, top_k, experts, BLOCK_T=tall, BLOCK_H=wide
    )
    return out


def _check(x: Tensor, w13: Weights, w2: Weights, ids: Tensor, activation: str) -> None:
    """ValueError for shapes and kinds that the kernels would read out of bounds or misread."""
    if activation not in ACTIVATIONS or w13.kind not in KINDS or w2.kind not in KINDS:
        raise ValueError(f"unknown activation or kind: {activation}, {w13.kind}, {w2.kind}")
    experts, n, k = w13.shape()
    inner = n // 2 if activation in GATED else n
    if k != x.shape[1] or w2.shape() != (experts, x.shape[1], inner) or ids.shape[0] != len(x):
        raise ValueError(f"shapes disagree: {tuple(x.shape)}, {w13.shape()}, {w2.shape()}")
    for w in (w13, w2):
        (_, rows, columns), group = w.shape(), SCALE_GROUP.get(w.kind)
        if group and columns % group:
            raise ValueError(f"{w.kind} needs K to be a multiple of {group}")
        if group and (w.scales is None or w.scales.shape != (experts, rows, columns // group)):
            raise ValueError(f"{w.kind} needs scales [experts, N, K / {group}]")
        if w.factors is not None and w.factors.shape not in ((experts, 1), (experts, 2)):
            raise ValueError("factors must be [experts, 1] or [experts, 2]")


def moe(
    x: Tensor,
    w13: Weights,
    w2: Weights,
    topk: tuple[Tensor, Tensor],
    activation: str,
    tiles: Tiles | None = None,
    on_input: bool = False,
) -> Tensor:
    """The layer: x [tokens, hidden], topk = (ids, weights) [tokens, top_k] -> [tokens, hidden] in the dtype of x.

    A slot of no expert adds nothing. on_input: the weights multiply GEMM 1's sums, not the experts' rows.
    """
    tiles = tiles or Tiles()
    ids, weights = topk
    _check(x, w13, w2, ids, activation)
    experts = w13.shape()[0]
    ids = torch.where((ids >= 0) & (ids < experts), ids, -1).to(torch.int32)
    routed = align(ids, experts, tiles.m)
    if routed.slots.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x)
    times, weights = (weights.flatten(), torch.ones_like(weights)) if on_input else (None, weights)
    rows = grouped_gemm(x, w13, routed, ids.shape[1], tiles, times)
    middle = activate(rows, ids, experts, activation)
    return finalize(grouped_gemm(middle, w2, routed, 1, tiles), weights, ids, experts)
