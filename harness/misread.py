"""What a kernel computes that reads right weights or scales in the wrong way: another layout's, block's or expert's.

These are the dear hypotheses: asked only where nothing cheaper explains an error, at few tokens first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from harness.case import Case
from harness.mistakes import next_expert, scale_roll, scaled_along_k
from harness.whatif import Loader, Mistake, Turn
from reference.activation import ACTIVATIONS, join_halves, split_halves
from reference.format import WHOLE, Format, Quantized, expand_blocks
from reference.formats import get
from reference.layout import REST, Layout, Tiling, tiled
from reference.layouts import all_layouts
from reference.layouts.swizzle_128x4 import COLUMNS, ROWS, padded_shape, swizzle, unswizzle

Read = Callable[[Tensor], Tensor]
MATRICES = ("both", "w13", "w2")
STEPS = (2, 4)  # groups that a K step of twice or four times the group's size spans
SHARDS = (2, 4, 8)  # tensor-parallel ranks
# The weight layouts that move whole values within one matrix of any type; nibble and bit twiddles are formats of their own.
ORDERS = ("trtllm_row_shuffle_16", "trtllm_row_shuffle_32", "block_major_k_64", "block_major_k_128", "gated_reorder")


def aiter_shuffle(vector: int) -> Layout:
    """Tiles of 16 rows x 4 vectors of `vector` elements (16 bytes), vector by vector. Source: AITER shuffle_weight (16, 16)."""
    tiling = Tiling(split=((REST, 16), (REST, 4, vector)), order=(0, 2, 3, 1, 4), merge=(2, 3))
    return tiled(f"aiter_shuffle_{vector}", tiling, "AITER shuffle_weight, layout (16, 16)", multiple=(16, 4 * vector))


def misreadings(case: Case) -> Iterator[Mistake]:
    """Every misreading that could change a case like this one."""
    fmt, shape = get(case.recipe.weights), case.shape
    if fmt.scaling is not None:
        yield from _of_scales(case)
    if len(scaled_along_k(case)) == 2:
        yield from (scale_roll("both", blocks) for blocks in (1, -1))
    for matrix in MATRICES:
        yield from _of_order(matrix)
    if shape.experts > 1:
        yield from (next_expert(shift, matrix) for shift in (1, -1) for matrix in ("w13", "w2"))
        if fmt.scaling is None and ACTIVATIONS[case.activation].gated:
            yield half_stride()


# -- block scales and global scales


def _of_scales(case: Case) -> Iterator[Mistake]:
    fmt, several = get(case.recipe.weights), case.shape.experts > 1
    scaling, scales = fmt.scaling, Scales(fmt)
    assert scaling is not None
    orders = ("gate_up", "interleaved") if ACTIVATIONS[case.activation].gated else ("gate_up",)
    if scaling.global_scale and several:
        yield from _of_global_scales(orders, scales)
    if several:
        yield from (
            rescaled("the scales of expert 0 are taken for every expert", _first_expert, m, "gate_up", scales) for m in MATRICES
        )
    if scaling.group != (WHOLE, WHOLE):
        yield from (
            rescaled("one scale, the first, is taken for a whole expert", _first_scale, m, "gate_up", scales) for m in MATRICES
        )
    for matrix in MATRICES:
        for name, read in READS.items():
            for order in orders if name in BY_ROW else orders[:1]:
                yield rescaled(name, read, matrix, order, scales)
    if "w2" in scaled_along_k(case):
        for shards in SHARDS:
            name = f"each of {shards} shards of inter counts its blocks from the one that its first column lies in"
            yield rescaled(name, _sharded(shards, case.shape.inter, scaling.group[1]), "w2", "gate_up", scales)


def _of_global_scales(orders: tuple[str, ...], scales: Scales) -> Iterator[Mistake]:
    for matrix in MATRICES:
        text = "the global scale of expert 0 is taken for every expert"
        yield rescaled(text, _first_expert, matrix, "gate_up", scales, whole=True)
        for order in orders:
            yield rescaled("row n takes the global scale of expert n", _expert_of_row, matrix, order, scales, whole=True)


def _first_expert(s: Tensor) -> Tensor:
    return s[:1].expand_as(s)


def _first_scale(s: Tensor) -> Tensor:
    return s[:, :1, :1].expand_as(s)


def _expert_of_row(s: Tensor) -> Tensor:
    return s[torch.arange(s.shape[1]) % len(s), 0][None].expand_as(s)


def _group_spans(steps: int) -> Read:
    return lambda s: s[:, :, torch.arange(s.shape[2]) // steps]


def _moved_rows(rows: int) -> Read:
    return lambda s: s.roll(rows, 1)


def _first_of(steps: int) -> Read:
    return lambda s: s[:, :, torch.arange(s.shape[2]) // steps * steps]


def _sharded(shards: int, columns: int, group: int) -> Read:
    k = torch.arange(columns)
    first = k // -(-columns // shards) * -(-columns // shards)
    return lambda s: s[:, :, first // group + (k - first) // group]


def _columns_as_rows(s: Tensor) -> Tensor:
    return s.flatten(1).view(len(s), s.shape[2], s.shape[1]).mT


def _rows_as_columns(s: Tensor) -> Tensor:
    return s.mT.reshape(s.shape)


def _swizzled_as_linear(s: Tensor) -> Tensor:
    return torch.cat([swizzle(one) for one in s])[: s.numel()].view_as(s)


def _linear_as_swizzled(s: Tensor) -> Tensor:
    rows, columns = s.shape[1:]
    room = padded_shape(rows, columns)
    flat = torch.nn.functional.pad(s.flatten(), (0, room[0] * room[1]))
    starts = range(0, s.numel(), rows * columns)
    return torch.stack([unswizzle(flat[i : i + room[0] * room[1]], rows, columns) for i in starts])


def _unpadded_strides(s: Tensor) -> Tensor:
    """Swizzled and padded in memory; addressed as if there were no padding."""
    flat = torch.cat([swizzle(one) for one in s])
    rows, columns = s.shape[1:]
    n, block = torch.arange(rows)[:, None], torch.arange(columns)
    tile = n // ROWS * (columns // COLUMNS) + block // COLUMNS
    inside = n % 32 * 16 + n % ROWS // 32 * 4 + block % COLUMNS
    at = torch.arange(len(s))[:, None, None] * rows * columns + tile * ROWS * COLUMNS + inside
    return flat[at.clamp(max=len(flat) - 1)]


BY_ROW: dict[str, Read] = {
    "scales lie swizzled in 128x4 tiles and are read row by row": _swizzled_as_linear,
    "scales lie row by row and are read as swizzled in 128x4 tiles": _linear_as_swizzled,
    "swizzled scales are addressed without their padding": _unpadded_strides,
    "scales lie row by row and are read column by column": _columns_as_rows,
    "scales lie column by column and are read row by row": _rows_as_columns,
}
READS: dict[str, Read] = {
    **BY_ROW,
    **{f"a scale is read as that of {n} times as many columns": _group_spans(n) for n in STEPS},
    **{f"row n takes the scales of row n {-rows:+d}": _moved_rows(rows) for rows in (1, -1)},
    **{f"{n} neighbouring blocks take the scale of the first": _first_of(n) for n in STEPS},
}


class Scales:
    """The scales of all experts as numbers, drawn once for all hypotheses."""

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self._kept: dict[tuple[Loader, str, str, bool], Tensor] = {}

    def stacked(self, loader: Loader, matrix: str, order: str, whole: bool) -> Tensor:
        """float64 [experts, rows, blocks]: block scales as a scale a row holds them, the rows of w13 lying in `order`;
        whole: [experts, rows, 1], what the global scale multiplies by."""
        key = (loader, matrix, order, whole)
        if key not in self._kept:
            number = self._whole if whole else self._blocks
            found = []
            for expert in range(loader.inputs.case.shape.experts):
                packed = loader.packed(expert)
                gate, up = (packed.gate, packed.up) if matrix == "w13" else (packed.down, None)
                found.append(number(gate) if up is None else join_halves(number(gate), number(up), order))
            self._kept[key] = torch.stack(found)
        return self._kept[key]

    def _blocks(self, q: Quantized) -> Tensor:
        assert self.fmt.scaling is not None
        values = self.fmt.scale_values(q)
        return expand_blocks(values, (q.shape[0], values.shape[1]), (self.fmt.scaling.group[0], 1))

    def _whole(self, q: Quantized) -> Tensor:
        assert q.global_scale is not None
        return (1 / q.global_scale.double()).reshape(-1, 1).expand(q.shape[0], 1)


def rescaled(text: str, read: Read, matrix: str, order: str, scales: Scales, whole: bool = False) -> Mistake:
    """Codes under what `read` makes of the stacked scales of all experts; whole: of the global scales."""

    @cache
    def wrong(loader: Loader, name: str) -> Tensor:
        return read(scales.stacked(loader, name, order, whole))

    def factor(turn: Turn, name: str, columns: int) -> Tensor:
        """[rows, columns]: wrong over right scale."""
        group = scales.fmt.scaling.group[1] if scales.fmt.scaling is not None and not whole else WHOLE
        right, used = scales.stacked(turn.loader, name, order, whole)[turn.expert], wrong(turn.loader, name)[turn.expert]

        def spread(s: Tensor) -> Tensor:
            return s if s.shape[1] == columns else expand_blocks(s, (len(s), columns), (1, group))

        return torch.where(spread(right) == 0, 1.0, spread(used) / spread(right))

    def rows(turn: Turn) -> Tensor:
        w, gate, up, down = turn.weights, turn.weights.gate, turn.weights.up, turn.weights.down
        if matrix != "w2" and up is None:
            gate = gate * factor(turn, "w13", gate.shape[1])
        elif matrix != "w2" and up is not None:
            first, second = split_halves(factor(turn, "w13", gate.shape[1]), order, dim=0)
            gate, up = gate * first, up * second
        if matrix != "w13":
            down = w.down * factor(turn, "w2", down.shape[1])
        return turn.through(replace(w, gate=gate, up=up, down=down))

    where = "w13 and w2" if matrix == "both" else matrix
    return Mistake("wrong_scales", f"{where}: {text}", rows, {"matrix": matrix, "order": order}, dear=True)


# -- the order of weights


def _of_order(matrix: str) -> Iterator[Mistake]:
    names = [all_layouts()[name] for name in ORDERS] + [aiter_shuffle(vector) for vector in (8, 16)]
    for layout in names:
        yield reordered(f"it lies in the layout {layout.name} and is read row by row", _stored(layout), matrix)
        yield reordered(f"it lies row by row and is read in the layout {layout.name}", _taken_for(layout), matrix)
    yield reordered("every row is row 0: an index of zeros", lambda w: w[:1].expand_as(w), matrix)


def _stored(layout: Layout) -> Read:
    return lambda w: layout.pack(w).reshape(w.shape)


def _taken_for(layout: Layout) -> Read:
    return lambda w: layout.unpack(w.contiguous(), (w.shape[0], w.shape[1]))


def _fits(w: Tensor, read: Read) -> Tensor:
    """read(w), or w itself where the layout does not take its shape."""
    try:
        return read(w)
    except ValueError:
        return w


def reordered(text: str, read: Read, matrix: str) -> Mistake:
    """w13 [2 * inter, hidden], w2 or both as `read` finds them; rows and columns move with their scales."""

    def rows(turn: Turn) -> Tensor:
        gate, up, down = turn.weights.gate, turn.weights.up, turn.weights.down
        if matrix != "w2" and up is None:
            gate = _fits(gate, read)
        elif matrix != "w2" and up is not None:
            gate, up = split_halves(_fits(torch.cat((gate, up)), read), "gate_up", dim=0)
        if matrix != "w13":
            down = _fits(down, read)
        return turn.through(replace(turn.weights, gate=gate, up=up, down=down))

    where = "w13 and w2" if matrix == "both" else matrix
    return Mistake("weight_order", f"{where}: {text}", rows, {"matrix": matrix}, dear=True)


def half_stride() -> Mistake:
    """w13 addressed as if an expert had `inter` rows: expert e starts in the middle of expert e // 2, or at e / 2."""

    def rows(turn: Turn) -> Tensor:
        halves = [turn.loader.weights((turn.expert + i) // 2) for i in (0, 1)]
        parts = [w.up if (turn.expert + i) % 2 else w.gate for i, w in enumerate(halves)]
        assert parts[0] is not None
        return turn.through(replace(turn.weights, gate=parts[0], up=parts[1]))

    text = "w13 is read with half the stride of an expert: experts are taken to be inter rows apart"
    return Mistake("wrong_expert", text, rows, {"stride": "inter"}, dear=True)
