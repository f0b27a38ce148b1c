"""The inputs of the ops beside the whole layer: matrices to quantise, gates and ups to activate, logits to route. Pure.

real: dense random values whose neighbouring groups differ in magnitude. edges: a row each of what rules treat specially.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness import fills
from harness.case import Case
from harness.hashing import Stream
from reference.activation import ACTIVATIONS, SATURATED
from reference.format import Format
from reference.formats import get
from reference.grid import ElementType, IntegerType

GATE_STD, UP_STD = 2.0, 1.5  # as in harness/inputs.py: gates of both signs, where activations bend
ROOM = 0.9  # of the range that a static scale leaves unused: a calibrated scale is no power of two
WIDE = 16  # columns of a group where the format's scale spans the row
KINDS = 8  # rows of the edges fill before they repeat
INTEGERS = 7  # largest up of the exact activate fill: SATURATED * 2 * 7 is short in fp16 and bf16
BLOCK_SCALE = 64.0  # of the ties below a global scale: a power of two inside E4M3, with room for its double
FAR = 60.0  # logits whose softmax and sigmoid leave float32's normal numbers


def x(case: Case, stream: Stream) -> tuple[Tensor, float | None]:
    """(x, static scale): to quantise [tokens, hidden], to activate [tokens, 2 * inter] (gate columns first; [tokens, inter]
    where the activation is not gated), to route [tokens, 1] of zeros; in the type of the recipe's acts. The scale, in the
    encode sense, is what a format whose scaling is `static` is handed, else None."""
    if case.op == "quantize":
        values = _edges(case, stream) if case.fill == "edges" else _dense(case, stream)
        return values.to(get(case.recipe.acts).torch_dtype), static_scale(case)
    if case.op == "activate":
        return (_saturated if case.exact else _gates)(case, stream).to(get(case.recipe.acts).torch_dtype), None
    return torch.zeros(case.shape.tokens, 1, device=stream.device), None


def static_scale(case: Case) -> float | None:
    """Of a quantise case: for a global scale a float32 in the real fill, else a power of two; the same for every draw."""
    fmt, carrier = get(case.recipe.weights), get(case.recipe.acts)
    assert fmt.scaling is not None
    if not fmt.scaling.static:
        return None
    most = (fmt.scaling.global_range if fmt.scaling.global_scale else fills.peak(fmt)) / _largest(carrier)
    if fmt.scaling.global_scale and case.fill == "real":
        return float(torch.tensor(most * ROOM))
    return 2.0 ** math.floor(math.log2(most))


def _largest(carrier: Format) -> float:
    """No magnitude of the real fill of root mean square 1 reaches it (`fills.window` stays below 2)."""
    assert isinstance(carrier.element, ElementType)
    return 2.0 * 2.0 ** round(math.log2(1 / fills.window_rms(carrier.element)))


def _group(fmt: Format) -> int:
    assert fmt.scaling is not None
    return fmt.scaling.group[1] or WIDE


def _dense(case: Case, stream: Stream) -> Tensor:
    """Random values, each group a power of two (0 to -2) smaller than their range, neighbours never alike."""
    rows, columns = case.shape.tokens, case.shape.hidden
    values = fills.real(get(case.recipe.acts), (rows, columns), stream, 1.0).codes.float()
    group = _group(get(case.recipe.weights))
    count = -(-columns // group)
    along = torch.tensor([fills.turn(i, count) for i in range(count)], device=stream.device)
    power = (stream.child("rows").fields(rows, 1, 16) + along) % 3
    return values * torch.exp2(-power.float()).repeat_interleave(group, 1)[:, :columns]


def _edges(case: Case, stream: Stream) -> Tensor:
    """Row r is of kind (r + 1) % KINDS, so that the first is of ties: zeros, ties between codes, subnormals, the largest
    numbers, a lone value among -0, any bits, every second group zero, tiny values."""
    rows, columns = case.shape.tokens, case.shape.hidden
    fmt, carrier = get(case.recipe.weights), get(case.recipe.acts)
    assert isinstance(carrier.element, ElementType)
    dense, group, dtype = _dense(case, stream), _group(fmt), carrier.torch_dtype
    assert dtype is not None
    assert fmt.scaling is not None
    scaled = fmt.scaling.global_scale
    info, words = torch.finfo(dtype), stream.child("edges").fields(rows, columns, 16)
    column = torch.arange(columns, device=stream.device)
    sign = 1.0 - 2.0 * (words & 1)
    bits = carrier.element.decode(words.int() if carrier.element.bits == 16 else words << 16, torch.float32)
    kinds = (
        torch.zeros_like(dense),
        _ties(fmt, words, column, group) / (static_scale(case) or 1.0) * (BLOCK_SCALE if scaled else 1.0),
        sign * (words >> 8) * info.smallest_normal * info.eps,
        sign * info.max / (1 + (words >> 1 & 1)),
        torch.where(column % group == (words[:, :1] >> 1) % group, dense, -0.0),
        torch.where(bits.isfinite(), bits, info.max),
        dense * (column // group % 2),
        dense * info.smallest_normal**0.5,
    )
    kind = (torch.arange(rows, device=stream.device) + 1) % KINDS
    chosen = torch.zeros_like(dense)
    for number, values in enumerate(kinds):
        chosen = torch.where((kind == number)[:, None], values, chosen)
    return chosen


def _ties(fmt: Format, words: Tensor, column: Tensor, group: int) -> Tensor:
    """Midpoints of neighbouring codes times a power of two a group, the group's first value at the largest code: where the
    scale becomes that power of two, every midpoint is a tie."""
    element = fmt.element
    assert isinstance(element, ElementType | IntegerType)
    values = element.decode(torch.arange(2 ** (element.bits - 1), dtype=torch.uint8), torch.float32)
    values = values[values.isfinite()].sort().values.to(words.device)
    middles = (values[1:] + values[:-1]) / 2
    value = torch.where(column % group == 0, float(values[-1]), middles[(words >> 1) % len(middles)])
    return value * (1.0 - 2.0 * (words & 1)) * torch.exp2(-(column // group % 2).float())


def _gates(case: Case, stream: Stream) -> Tensor:
    fmt, shape = get(case.recipe.acts), (case.shape.tokens, case.shape.inter)
    halves = [fills.real(fmt, shape, stream.child("gate"), GATE_STD).codes]
    if ACTIVATIONS[case.activation].gated:
        halves.append(fills.real(fmt, shape, stream.child("up"), UP_STD).codes)
    return torch.cat(halves, 1)


def _saturated(case: Case, stream: Stream) -> Tensor:
    """Gates 0, SATURATED or twice that, ups small integers: the activation is the identity there, products are exact."""
    shape = (case.shape.tokens, case.shape.inter)
    halves = [SATURATED * (stream.child("gate").fields(*shape, 16) % 3).float()]
    if ACTIVATIONS[case.activation].gated:
        halves.append((stream.child("up").fields(*shape, 16) % (2 * INTEGERS + 1)).float() - INTEGERS)
    return torch.cat(halves, 1)


def logits(case: Case, plain: Tensor) -> Tensor:
    """The layer's logits [tokens, experts] in the type of the recipe's acts; in the edges fill rows in turn with pairs of
    equal logits, all equal, one far above all others, and as they are."""
    if case.fill == "edges":
        row = (torch.arange(case.shape.tokens, device=plain.device)[:, None] + 2) % 4  # a lone token: one far above
        pairs = plain[:, torch.arange(case.shape.experts, device=plain.device) // 2]
        plain = torch.where(row == 0, pairs, plain)
        plain = torch.where(row == 1, plain[:, :1], plain)
        plain = torch.where(row == 2, torch.where(plain == plain.amax(-1, keepdim=True), FAR, -FAR), plain)
    return plain.to(get(case.recipe.acts).torch_dtype)
