"""The dear hypotheses: tokens sent elsewhere, routing weights of others, scales and weights read in another way.

Each planted misreading is written out here from addresses, as the kernel would read, not with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.case import Case
from harness.faults.wrong_kernels import Bench, bench, bench_of, busiest, packed
from harness.oracle import weight_source
from reference.activation import ACTIVATIONS, swiglu_bias
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.routing import RULES

Scales = list[Tensor]  # of w13 (gate rows, then up rows) or w2: [rows, blocks] for every expert


def routed_by(b: Bench, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Another selection bias, and the weights that follow from it."""
    assert b.inputs.bias is not None
    routing = RULES[b.case.routing](b.inputs.logits, change(b.inputs.bias), b.case.shape.top_k)
    return b.routed(ids=routing.ids, weights=routing.weights)


def one_replaced(b: Bench) -> Tensor:
    """The first slot of token 0 is computed by the first expert that token 0 was not sent to."""
    ids = b.routing.ids.clone()
    ids[0, 0] = next(e for e in range(b.case.shape.experts) if e not in ids[0])
    return b.routed(ids=ids)


def rescaled(b: Bench, read: Callable[[Scales, int], Tensor], only: str = "both") -> Tensor:
    """Every expert's codes under read(scales of all experts, expert), [rows, blocks]; w13 as one matrix."""
    experts = [packed(b.inputs, e) for e in range(b.case.shape.experts)]
    w13 = [torch.cat([q.scales for q in (gate, up) if q is not None and q.scales is not None]) for gate, up, _ in experts]
    w2 = [down.scales for *_, down in experts if down.scales is not None]

    def edit(q: Quantized, expert: int, i: int) -> Quantized:
        if only == ("w13" if i == 2 else "w2"):
            return q
        found = read(w2 if i == 2 else w13, expert)
        return replace(q, scales=found if i == 2 else found[i * q.shape[0] : (i + 1) * q.shape[0]])

    return b.repacked(edit)


def swizzled_read_linear(scales: Scales, expert: int) -> Tensor:
    """Byte r * blocks + c of an expert, experts `rows * blocks` apart, of memory that holds 128x4 tiles."""
    rows, blocks = scales[0].shape
    tiles = -(-blocks // 4)
    size = -(-rows // 128) * tiles * 512
    memory = torch.zeros(len(scales) * size, dtype=scales[0].dtype)
    r, c = torch.arange(rows)[:, None], torch.arange(blocks)
    at = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    for e, one in enumerate(scales):
        memory[e * size + at] = one
    return memory[expert * rows * blocks :][: rows * blocks].view(rows, blocks)


def column_major(scales: Scales, expert: int) -> Tensor:
    rows, blocks = scales[0].shape
    at = torch.arange(blocks) * rows + torch.arange(rows)[:, None]
    return scales[expert].flatten()[at]


def spans_two(scales: Scales, expert: int) -> Tensor:
    return scales[expert][:, torch.arange(scales[expert].shape[1]) // 2]


def global_of_first(b: Bench) -> Tensor:
    def edit(q: Quantized, expert: int, i: int) -> Quantized:
        first = packed(b.inputs, 0)[i]
        assert first is not None
        return replace(q, global_scale=first.global_scale)

    return b.repacked(edit)


def global_by_row(b: Bench) -> Tensor:
    """Row n of [gate; up] and of w2 takes the factor of row 0 of expert n."""
    experts = [packed(b.inputs, e) for e in range(b.case.shape.experts)]

    def edit(w: ExpertWeights, expert: int) -> ExpertWeights:
        gate, up, down = experts[expert]
        assert up is not None
        n13, n2 = torch.arange(2 * len(w.gate)) % len(experts), torch.arange(len(w.down)) % len(experts)
        of13, of2 = (torch.stack([1 / e[i].global_scale.double() for e in experts]) for i in (0, 2))  # type: ignore[union-attr]
        first, second = of13.flatten()[n13].chunk(2)
        return ExpertWeights(
            w.gate * gate.global_scale * first[:, None],  # type: ignore[operator]
            w.up * up.global_scale * second[:, None],  # type: ignore[operator]
            w.down * down.global_scale * of2.flatten()[n2][:, None],  # type: ignore[operator]
        )

    source = weight_source(b.inputs)
    return b.kernel(weights=lambda e: edit(source(e), e))


def sharded(b: Bench) -> Tensor:
    """w2 in four shards of 24 columns, each counting blocks of 16 from the one that its first column lies in."""
    k = torch.arange(b.case.shape.inter)
    seen = k // 24 * 24 // 16 + k % 24 // 16
    source = weight_source(b.inputs)

    def edit(expert: int) -> ExpertWeights:
        down, w = packed(b.inputs, expert)[2], source(expert)
        scales = down.format.scale_values(down)
        return replace(w, down=w.down / scales[:, k // 16] * scales[:, seen])

    return b.kernel(weights=edit)


def reread(b: Bench, where: Callable[[int, int], Tensor]) -> Tensor:
    """w13 [2 * inter, hidden] whose element i is memory[where[i]]."""

    def edit(w: ExpertWeights) -> ExpertWeights:
        assert w.up is not None
        both = torch.cat((w.gate, w.up))
        gate, up = both.flatten()[where(*both.shape)].view_as(both).chunk(2)
        return replace(w, gate=gate, up=up)

    return b.edited(edit)


def shuffled(rows: int, columns: int) -> Tensor:
    """Where [n, k] comes from when tiles of 16 rows x 32 columns, in vectors of 8, are read row by row."""
    i = torch.arange(rows * columns)
    tile, inside = i // 512, i % 512
    vector, n, k = inside // 128, inside % 128 // 8, inside % 8
    return (tile // (columns // 32) * 16 + n) * columns + tile % (columns // 32) * 32 + vector * 8 + k


def random_order(rows: int, columns: int) -> Tensor:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    return (order[:, None] * columns + torch.arange(columns)).flatten()


def w13_of_others(b: Bench, expert: Callable[[int], tuple[int, int]]) -> Tensor:
    """w13 whose two halves are halves expert(e) of all experts' halves in a row, w2 as it should be."""
    all_of = [packed(b.inputs, e) for e in range(b.case.shape.experts)]
    halves = [q for gate, up, _ in all_of for q in (gate, up) if q is not None]

    def source(e: int) -> ExpertWeights:
        gate, up = (halves[i % len(halves)] for i in expert(e))
        return ExpertWeights(*(q.format.decode(q) for q in (gate, up, all_of[e][2])))

    return b.kernel(weights=source)


DEFECTS: dict[str, tuple[Callable[[Bench], Tensor], str]] = {
    "bias_rolled": (lambda b: routed_by(b, lambda bias: bias.roll(1)), "wrong_expert"),
    "bias_in_halves": (lambda b: routed_by(b, lambda bias: bias.view(torch.bfloat16)[: len(bias)].float()), "wrong_expert"),
    "one_replaced": (one_replaced, "wrong_expert"),
    "previous_weights": (lambda b: b.routed(weights=b.routing.weights.roll(1, 0)), "wrong_weights"),
    "first_weight": (
        lambda b: b.routed(weights=b.routing.weights[:, :1].expand_as(b.routing.weights).contiguous()),
        "unweighted",
    ),
    "global_of_first": (global_of_first, "wrong_scales"),
    "one_scale": (lambda b: rescaled(b, lambda s, e: s[e][:1, :1].expand_as(s[e])), "wrong_scales"),
    "spans_two": (lambda b: rescaled(b, spans_two), "wrong_scales"),
    "spans_two_in_w2": (lambda b: rescaled(b, spans_two, "w2"), "wrong_scales"),
    "swizzled": (lambda b: rescaled(b, swizzled_read_linear), "wrong_scales"),
    "row_of_expert": (global_by_row, "wrong_scales"),
    "sharded_w2": (sharded, "wrong_scales"),
    "rolled_both": (lambda b: rescaled(b, lambda s, e: s[e].roll(1, 1)), "scale_roll"),
    "rows_rolled": (lambda b: rescaled(b, lambda s, e: s[e].roll(1, 0)), "wrong_scales"),
    "column_major": (lambda b: rescaled(b, column_major), "wrong_scales"),
    "shuffled": (lambda b: reread(b, shuffled), "weight_order"),
    "zero_index": (lambda b: reread(b, lambda r, c: torch.arange(c).repeat(r)), "weight_order"),
    "half_stride": (lambda b: w13_of_others(b, lambda e: (e, e + 1)), "wrong_expert"),
    "w13_of_next": (lambda b: w13_of_others(b, lambda e: (2 * e + 2, 2 * e + 3)), "wrong_expert"),
    "random_order": (lambda b: reread(b, random_order), "unexplained"),
    "random_scales": (
        lambda b: rescaled(b, lambda s, e: s[e][torch.randperm(len(s[e]), generator=torch.Generator().manual_seed(e))]),
        "unexplained",
    ),
    "two_mistakes": (lambda b: rescaled(b, column_major, "w2").roll(1, 1), "unexplained"),
    "random_x": (
        lambda b: b.kernel(x=b.inputs.x[torch.arange(len(b.inputs.x)) % 7].roll(3, 1)),
        "unexplained",
    ),
}
CELLS = """
bias_rolled: biased.real
bias_in_halves: biased.real
one_replaced: bf16.real nvfp4.real mxfp4.exact biased.exact
previous_weights: nvfp4.real biased.real
first_weight: bf16.real
global_of_first: nvfp4.real
one_scale: nvfp4.real
row_of_expert: nvfp4.real
sharded_w2: nvfp4.real
rolled_both: nvfp4.real
rows_rolled: nvfp4.real
spans_two: nvfp4.real mxfp4.real
spans_two_in_w2: nvfp4.real
swizzled: nvfp4.real mxfp4.real
column_major: nvfp4.real mxfp4.real
shuffled: bf16.real bf16.exact
zero_index: bf16.real
half_stride: bf16.real
w13_of_next: nvfp4.real
random_order: bf16.real nvfp4.real
random_scales: nvfp4.real
two_mistakes: nvfp4.real
random_x: bf16.real biased.real nvfp4.real
"""
PLANTED = [(line.split(":")[0], cell) for line in CELLS.split("\n") for cell in line.split()[1:]]


@pytest.mark.parametrize(("defect", "cell"), PLANTED, ids="-".join)
def test_a_misreading_gets_its_name_and_nothing_else_does(defect: str, cell: str) -> None:
    b = bench(*cell.split("."))
    make, name = DEFECTS[defect]
    found = b.diagnosis(make(b))
    assert found.kind == name, found


def test_every_misreading_is_planted() -> None:
    assert {defect for defect, _ in PLANTED} == set(DEFECTS)


def test_the_evidence_says_who_computed_a_token_and_who_should_have() -> None:
    b = bench("bf16", "real")
    due = b.routing.ids[0].tolist()
    used = next(e for e in range(b.case.shape.experts) if e not in due)
    assert b.diagnosis(one_replaced(b)).evidence["routed"] == [[0, [used, *due[1:]], due]]


def test_one_slot_does_not_tell_an_experts_factor_from_a_weight() -> None:
    """Only several tokens of an expert can say that the expert is to blame."""
    b = bench("bf16", "real")
    weights = b.routing.weights.clone()
    weights[b.routing.ids == busiest(b)] *= torch.linspace(1.5, 3.0, int((b.routing.ids == busiest(b)).sum())).double()
    assert b.diagnosis(b.routed(weights=weights)).kind == "wrong_weights"


def test_a_faint_mistake_is_named_if_nothing_else_is_left() -> None:
    """Of 16 rows one pre-activation is above the limit."""
    case = Case.parse("moe.mxfp4.t2.h160.i128.e16.k8.renormalize.swiglu_oai.standard.real.half.s0")
    b = bench_of(case)
    without = swiglu_bias("without its limit", **{**ACTIVATIONS[case.activation].parameters, "limit": math.inf})
    found = b.diagnosis(b.kernel(activation=without))
    assert (found.kind, found.evidence.get("faint")) == ("wrong_activation", True), found


def test_one_row_may_be_another_tokens() -> None:
    b = bench("nvfp4", "real")
    wrong = b.right.clone()
    wrong[5] = wrong[21]
    found = b.diagnosis(wrong)
    assert (found.kind, found.evidence["moves"]) == ("row_permutation", [[5, 21]]), found


def test_next_to_nothing_is_no_multiple() -> None:
    b = bench("bf16", "real")
    found = b.diagnosis(b.out(torch.rand_like(b.right.double()) * 1e-30))
    assert found.kind == "unexplained", found


@pytest.mark.parametrize("size", [0.01, 0.03, 0.1])
def test_weights_that_are_a_little_off_are_no_rounding(size: float) -> None:
    b = bench("nvfp4", "real")
    noise = torch.randn(b.routing.weights.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = b.diagnosis(b.routed(weights=b.routing.weights * (1 + size * noise)))
    assert found.kind in ("wrong_weights", "unexplained"), found


def test_one_row_in_eight_makes_no_rule_for_all_experts() -> None:
    """A token sent to experts 3 - e, of four, fits "e is taken for E - 1 - e"; the seven right tokens refute it."""
    b = bench_of(Case.parse("moe.bf16.t8.h64.i160.e4.k3.renormalize.swiglu.standard.real.s0"))
    ids = b.routing.ids.clone()
    token = next(t for t in range(8) if set(ids[t].tolist()) != set((3 - ids[t]).tolist()))
    ids[token] = 3 - ids[token]
    assert b.diagnosis(b.routed(ids=ids)).kind == "wrong_expert"
    assert b.diagnosis(b.routed(ids=3 - b.routing.ids)).kind == "expert_permutation"
