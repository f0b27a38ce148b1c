"""The mistakes a kernel is known to make inside an expert, as functions of one expert's turn. Each is a real bug's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.whatif import Mistake, Turn
from reference.activation import ACTIVATIONS, Activation, join_halves, split_halves, swiglu_bias
from reference.experts import linear
from reference.format import Quantized
from reference.formats import get

K_TAIL = 16  # the smallest K step of a tensor core instruction (mma.m16n8k16): what a loop that ends one early loses
K_STEPS = (16, 32, 64, 128)  # K steps of grouped GEMM main loops
BLOCKS = (8, 32, 64)  # rows of one half between rows of the other: reference.activation.LIBRARY_ORDERS
PRE_FACTORS = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)  # a scale of GEMM 1 twice or not at all, in powers of two


def stale() -> Mistake:
    """The previous call's activations under this call's routing."""
    text = "the output is that of the previous call's activations"
    return Mistake("stale", text, lambda t: t.through(t.weights, t.stale))


def gate_up_swap() -> Mistake:
    """Gate and up exchanged; gated activations only."""

    def rows(turn: Turn) -> Tensor:
        assert turn.done.up is not None
        return turn.activated(turn.done.up, turn.done.gate)

    return Mistake("gate_up_swap", "the output is that of gate and up exchanged: half order of w13", rows)


def gate_up_interleave(stored: str, read: str, block: int = 1) -> Mistake:
    """w13 stored in one order of its halves and read in another; `block` rows stay together."""

    def rows(turn: Turn) -> Tensor:
        assert turn.done.up is not None
        both = (turn.done.gate, turn.done.up)
        gate, up = (half.unflatten(-1, (-1, block)) for half in both)
        joined = join_halves(gate, up, stored, dim=1)
        return turn.activated(*(half.flatten(1) for half in split_halves(joined, read, dim=1)))

    text = f"w13 is stored as {stored} and read as {read}" + (f", in blocks of {block} rows" if block > 1 else "")
    return Mistake("gate_up_interleave", text, rows, {"stored": stored, "read": read, "block": block})


def dropped_hidden_tail(size: int) -> Mistake:
    """GEMM 1 stops before the last `size` columns of hidden."""

    def rows(turn: Turn) -> Tensor:
        tail, weights = turn.done.x[..., -size:], turn.weights
        up = None if weights.up is None or turn.done.up is None else turn.done.up - tail @ weights.up[..., -size:].mT
        return turn.activated(turn.done.gate - tail @ weights.gate[..., -size:].mT, up)

    text = f"the last {size} columns of hidden are missing from GEMM 1"
    return Mistake("dropped_k_tail", text, rows, {"gemm": 1, "size": size})


def dropped_inter_tail(size: int) -> Mistake:
    """GEMM 2 stops before the last `size` neurons of inter."""

    def rows(turn: Turn) -> Tensor:
        return turn.done.row - turn.done.middle[..., -size:] @ turn.weights.down[..., -size:].mT

    text = f"the last {size} neurons of inter are missing from GEMM 2"
    return Mistake("dropped_k_tail", text, rows, {"gemm": 2, "size": size})


def next_expert(shift: int, matrix: str = "both") -> Mistake:
    """Every expert's rows computed with the weights of the expert `shift` further. matrix: "w13", "w2" or "both"."""

    def rows(turn: Turn) -> Tensor:
        own, other = turn.weights, turn.loader.weights(turn.neighbour(shift))
        if matrix != "both":
            first, second = (other, own) if matrix == "w13" else (own, other)
            other = replace(first, down=second.down, down_bias=second.down_bias)
        return turn.through(other)

    what = "the weights" if matrix == "both" else f"the {matrix}"
    text = f"every expert's rows are computed with {what} of expert e {shift:+d}"
    kind = "expert_permutation" if matrix == "both" else "wrong_expert"
    return Mistake(kind, text, rows, {"shift": shift, "matrix": matrix}, dear=True)


def rolled(q: Quantized, blocks: int) -> Quantized:
    """The same codes under block scales moved along K."""
    assert q.scales is not None
    return replace(q, scales=q.scales.roll(blocks, dims=1))


def scale_roll(matrix: str, blocks: int) -> Mistake:
    """Block scales of "w13", "w2" or "both" moved by `blocks` blocks along K."""

    def rows(turn: Turn) -> Tensor:
        own, x = turn.loader.packed(turn.expert), turn.done.x
        if matrix == "w2":
            return linear(turn.done.middle, _decoded(rolled(own.down, blocks)), own.biases[2])
        up = None if own.up is None else rolled(own.up, blocks)
        if matrix == "both":
            return turn.through(replace(own, gate=rolled(own.gate, blocks), up=up, down=rolled(own.down, blocks)).decode())
        gate = linear(x, _decoded(rolled(own.gate, blocks)), own.biases[0])
        return turn.activated(gate, None if up is None else linear(x, _decoded(up), own.biases[1]))

    where = "w13 and w2" if matrix == "both" else matrix
    text = f"the block scales of {where} are moved by {blocks:+d} block along K"
    return Mistake("scale_roll", text, rows, {"matrix": matrix, "blocks": blocks}, dear=True)


def _decoded(q: Quantized) -> Tensor:
    return q.format.decode(q)


def next_scales(shift: int, matrix: str = "both") -> Mistake:
    """Scales, block and global, of the expert `shift` further, under the right codes. matrix: "w13", "w2" or "both"."""

    def rows(turn: Turn) -> Tensor:
        own, other = turn.loader.packed(turn.expert), turn.loader.packed(turn.neighbour(shift))
        gate, up, down = _borrowed(own.gate, other.gate), _borrowed(own.up, other.up), _borrowed(own.down, other.down)
        if matrix == "w2":
            gate, up = own.gate, own.up
        if matrix == "w13":
            down = own.down
        assert gate is not None
        assert down is not None
        return turn.through(replace(own, gate=gate, up=up, down=down).decode())

    where = "w13 and w2" if matrix == "both" else matrix
    text = f"the scales of {where} are those of expert e {shift:+d}"
    return Mistake("next_expert_scales", text, rows, {"matrix": matrix, "shift": shift}, dear=True)


def _borrowed(q: Quantized | None, other: Quantized | None) -> Quantized | None:
    return None if q is None or other is None else replace(q, scales=other.scales, global_scale=other.global_scale)


def transposed(matrix: str) -> Mistake:
    """The memory of "w13" or "w2" taken as that of its transpose."""

    def flipped(w: Tensor) -> Tensor:
        return w.T.contiguous().view_as(w)

    def rows(turn: Turn) -> Tensor:
        w = turn.weights
        if matrix == "w2":
            return turn.through(replace(w, down=flipped(w.down)))
        return turn.through(replace(w, gate=flipped(w.gate), up=None if w.up is None else flipped(w.up)))

    return Mistake("transposed", f"{matrix} is read transposed", rows, {"matrix": matrix})


def other_activation(activation: Activation) -> Mistake:
    """Another activation of the reference between the right GEMMs."""
    text = f"the activation is {activation.name}"
    return Mistake(
        "wrong_activation",
        text,
        lambda t: t.finished(activation.combine(t.done.gate, t.done.up if activation.gated else None)),
        {"activation": activation.name},
    )


def weighted_input(twice: bool) -> Mistake:
    """The routing weight multiplies x; the output too if `twice`."""

    def rows(turn: Turn) -> Tensor:
        w = turn.weight[:, None]
        scaled = turn.activated(turn.done.gate * w, None if turn.done.up is None else turn.done.up * w)
        return scaled if twice else torch.where(w == 0, 0.0, scaled / w)

    text = "the routing weights are applied before the activation" + (" and again after it" if twice else "")
    return Mistake("unweighted", text, rows, {"applied": "before and after" if twice else "before the activation"})


def weighted_output(twice: bool) -> Mistake:
    """Where routing weights are due on the input: they multiply the output, instead or too."""

    def rows(turn: Turn) -> Tensor:
        assert turn.routed is not None
        w = turn.routed[..., None]
        if twice:
            return turn.done.row * w
        return turn.through(turn.weights, torch.where(w == 0, 0.0, turn.done.x / w)) * w

    text = "the routing weights multiply the output" + (" as well as the input" if twice else ", not the input")
    return Mistake("unweighted", text, rows, {"applied": "before and after" if twice else "after the experts"})


def other_bias(matrix: str, shift: int | None) -> Mistake:
    """The bias of "w13" or "w2" left out (None), or that of the expert `shift` further."""

    def rows(turn: Turn) -> Tensor:
        right = turn.biases(0)
        wrong = (None,) * 3 if shift is None else turn.biases(shift)
        gate, up, down = (_difference(w, r) for w, r in zip(wrong, right, strict=True))
        if matrix == "w2":
            return turn.done.row + down
        return turn.activated(turn.done.gate + gate, None if turn.done.up is None else turn.done.up + up)

    if shift is None:
        return Mistake("missing_bias", f"the bias of {matrix} is not added", rows, {"matrix": matrix})
    text = f"the bias of {matrix} is that of expert e {shift:+d}"
    return Mistake("wrong_expert", text, rows, {"matrix": f"{matrix}_bias", "shift": shift})


def _difference(wrong: Tensor | None, right: Tensor | None) -> Tensor | float:
    return (0.0 if wrong is None else wrong) - (0.0 if right is None else right)


def pre_factor(factor: float) -> Mistake:
    """GEMM 1 off by a factor: a scale of x or w13 applied twice or not at all."""

    def rows(turn: Turn) -> Tensor:
        return turn.activated(turn.done.gate * factor, None if turn.done.up is None else turn.done.up * factor)

    return Mistake("constant_factor", f"the results of GEMM 1 are {factor:g} times the expected", rows, {"gemm1": factor})


def guarding(case: Case) -> dict[str, Mistake]:
    """name -> the mistakes that a case must be able to see, or a pass says nothing. Left out is only what is no mistake:
    one expert has no neighbour, an activation without up has nothing to swap, one scale along K cannot move."""
    found = {
        "stale": stale(),
        "dropped_hidden_tail": dropped_hidden_tail(K_TAIL),
        "dropped_inter_tail": dropped_inter_tail(K_TAIL),
    }
    if ACTIVATIONS[case.activation].gated:
        found["gate_up_swap"] = gate_up_swap()
    found |= {f"scale_roll_{matrix}": scale_roll(matrix, 1) for matrix in scaled_along_k(case)}
    if case.shape.experts > 1:
        found["expert_permutation"] = next_expert(1)
        if get(case.recipe.weights).scaling is not None:
            found["next_expert_scales"] = next_scales(1)
    return found | _guarding_options(case)


def _guarding_options(case: Case) -> dict[str, Mistake]:
    """The same of biases and of weights on the input."""
    found: dict[str, Mistake] = {}
    if case.bias == "bias":
        found |= {f"lost_bias_{matrix}": other_bias(matrix, None) for matrix in ("w13", "w2")}
        if case.shape.experts > 1:
            found["next_expert_bias_w13"] = other_bias("w13", 1)
        if case.shape.experts > case.shape.top_k:  # of all experts with like weights the sum of what they add stays the same
            found["next_expert_bias_w2"] = other_bias("w2", 1)
    if case.weighting == "oninput":
        found |= {"weight_on_output": weighted_output(False), "weight_twice": weighted_output(True)}
    return found


def known_mistakes(case: Case) -> list[Mistake]:
    """Every mistake of this file that would change some case like this one."""
    found = [stale(), *_halves(case), *_tails(case), *_activations(case), *_weights(case), *_scales(case)]
    return found + list(_options(case))


def _options(case: Case) -> Iterator[Mistake]:
    if case.bias == "bias":
        for shift in (None, 1, -1)[: min(3, case.shape.experts)]:
            yield from (other_bias(matrix, shift) for matrix in ("w13", "w2"))
    if case.weighting == "oninput":
        yield from (weighted_output(twice) for twice in (False, True))


def _halves(case: Case) -> Iterator[Mistake]:
    if not ACTIVATIONS[case.activation].gated:
        return
    yield gate_up_swap()
    for stored, read in (("gate_up", "interleaved"), ("interleaved", "gate_up"), ("up_gate", "interleaved")):
        yield from (gate_up_interleave(stored, read, b) for b in (1, *BLOCKS) if case.shape.inter % b == 0)


def _tails(case: Case) -> Iterator[Mistake]:
    for size, make in ((case.shape.hidden, dropped_hidden_tail), (case.shape.inter, dropped_inter_tail)):
        lengths = set(K_STEPS) | {size % step for step in K_STEPS}
        yield from (make(n) for n in sorted(lengths) if 0 < n < size)


def _activations(case: Case) -> Iterator[Mistake]:
    mine = ACTIVATIONS[case.activation]
    for other in ACTIVATIONS.values():
        if other.name != mine.name and (mine.gated or not other.gated):
            yield other_activation(other)
        if mine.gated and not other.gated:
            halves = Activation(f"{other.name}(gate) * up", True, False, other.scalar, mine.linear)
            yield other_activation(halves)
    for lost in ("alpha", "beta", "limit") if {"alpha", "beta", "limit"} == mine.parameters.keys() else ():
        kept = {name: value for name, value in mine.parameters.items() if name != lost}
        without = swiglu_bias(f"{mine.name} without its {lost}", **kept)
        if without.parameters != mine.parameters:
            yield other_activation(without)


def _weights(case: Case) -> Iterator[Mistake]:
    if case.weighting == "onoutput":
        yield from (weighted_input(twice) for twice in (False, True))
    yield from (pre_factor(factor) for factor in PRE_FACTORS)
    yield from (transposed(matrix) for matrix in ("w13", "w2"))
    if case.shape.experts > 1:
        yield from (next_expert(shift) for shift in (1, -1)[: case.shape.experts - 1])


def _scales(case: Case) -> Iterator[Mistake]:
    for matrix in scaled_along_k(case):
        yield from (scale_roll(matrix, blocks) for blocks in (1, -1))
    if get(case.recipe.weights).scaling is not None and case.shape.experts > 1:
        shifts = (1, -1)[: case.shape.experts - 1]
        yield from (next_scales(shift, matrix) for shift in shifts for matrix in ("both", "w13", "w2"))


def scaled_along_k(case: Case) -> tuple[str, ...]:
    """The matrices that have more than one scale along K: with one, rolling it changes nothing."""
    scaling, shape = get(case.recipe.weights).scaling, case.shape
    if scaling is None:
        return ()
    sizes = {"w13": (shape.inter, shape.hidden), "w2": (shape.hidden, shape.inter)}
    return tuple(name for name, size in sizes.items() if scaling.scale_shape(*size)[1] > 1)
