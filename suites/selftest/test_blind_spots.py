"""Which wrong kernels a planned case would pass: tails, tiles and scales, each computed by the reference itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from harness import config, plan
from harness.backends import discover
from harness.case import Case
from harness.compare import compare
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect, handed
from reference.activation import ACTIVATIONS
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.formats import get
from reference.moe import Experts, moe
from reference.rounding import Rounding

TAIL, TILE = 16, 64
BUDGET = 2**21  # weights of the experts reached, of a case that is cheap enough here
SAMPLED = 12  # planned cases of each fill
LEAST = ("t1.h64.i32.e1.k1", "t1.h64.i32.e2.k1", "t1.h96.i64.e5.k2")
LEAST_RECIPES = ("fp8_tensor", "fp8_block", "mxfp4", "nvfp4-nvfp4")
Weights = tuple[Quantized, Quantized | None, Quantized]


@cache
def planned() -> tuple[Case, ...]:
    """Every cheap case with tokens of both tiers and platforms, for the backend with the most recipes."""
    ids = set()
    for platform, tier in ((p, t) for p in ("cpu", "sm90") for t in ("smoke", "ci")):
        request = plan.Request(platform, tier, ("triton_moe",))
        ids |= {i.case_id for i in plan.make(request, discover(), plan.device_named(config.platform(platform))).items}
    return tuple(c for c in map(Case.parse, sorted(ids)) if c.shape.tokens and cost(c) < BUDGET)


def cost(case: Case) -> int:
    shape = case.shape
    return shape.hidden * shape.inter * min(shape.experts, shape.tokens * shape.top_k)


def sample(fill: str) -> list[Case]:
    """Some of the planned cases, and the least there are: a token, an expert or few, a tile of columns."""
    cases = [c for c in planned() if c.fill == fill]
    least = [
        f"moe.{r}.{s}.renormalize.{a}.standard.{fill}.s0" for r in LEAST_RECIPES for s in LEAST for a in ("swiglu", "silu")
    ]
    return cases[:: max(1, len(cases) // SAMPLED)] + [Case.parse(c) for c in least]


def next_expert(inputs: Inputs, expert: int) -> Weights:
    return weights_of(inputs, (expert + 1) % inputs.case.shape.experts)


def weights_of(inputs: Inputs, expert: int) -> Weights:
    return (*inputs.gate_up(expert), inputs.down(expert))


def rolled(q: Quantized) -> Quantized:
    assert q.scales is not None
    return replace(q, scales=q.scales.roll(1, dims=1))


def cut(weight: Tensor) -> Tensor:
    return torch.cat([weight[:, :-TAIL], torch.zeros_like(weight[:, -TAIL:])], dim=1)


def borrowed(mine: Quantized, theirs: Quantized) -> Quantized:
    return replace(mine, scales=theirs.scales, global_scale=theirs.global_scale)


def lost_tail_of_gemm1(inputs: Inputs, expert: int) -> ExpertWeights:
    gate, up, down = decoded(inputs, weights_of(inputs, expert))
    return ExpertWeights(cut(gate), None if up is None else cut(up), down)


def lost_tail_of_gemm2(inputs: Inputs, expert: int) -> ExpertWeights:
    gate, up, down = decoded(inputs, weights_of(inputs, expert))
    return ExpertWeights(gate, up, cut(down))


def scales_of_the_next_block(inputs: Inputs, expert: int) -> ExpertWeights:
    gate, up, down = weights_of(inputs, expert)
    return ExpertWeights(*decoded(inputs, (rolled(gate), None if up is None else rolled(up), rolled(down))))


def scales_of_the_next_block_in_gemm2(inputs: Inputs, expert: int) -> ExpertWeights:
    gate, up, down = weights_of(inputs, expert)
    return ExpertWeights(*decoded(inputs, (gate, up, rolled(down))))


def scales_of_the_next_expert(inputs: Inputs, expert: int) -> ExpertWeights:
    (gate, up, down), (gate2, up2, down2) = weights_of(inputs, expert), next_expert(inputs, expert)
    swapped = up if up is None or up2 is None else borrowed(up, up2)
    return ExpertWeights(*decoded(inputs, (borrowed(gate, gate2), swapped, borrowed(down, down2))))


def scales_of_the_next_expert_in_gemm1(inputs: Inputs, expert: int) -> ExpertWeights:
    return replace(scales_of_the_next_expert(inputs, expert), down=get(inputs.case.recipe.weights).decode(inputs.down(expert)))


def decoded(inputs: Inputs, weights: Weights) -> tuple[Tensor, Tensor | None, Tensor]:
    fmt = get(inputs.case.recipe.weights)
    gate, up, down = weights
    return fmt.decode(gate), None if up is None else fmt.decode(up), fmt.decode(down)


def applies(wrong: Callable[[Inputs, int], ExpertWeights], case: Case) -> bool:
    """Is it another function at all?"""
    scaling = get(case.recipe.weights).scaling
    if wrong in (lost_tail_of_gemm1, lost_tail_of_gemm2):
        return True
    if scaling is None:
        return False
    if "block" in wrong.__name__:
        return scaling.scale_shape(case.shape.hidden, case.shape.inter)[1] > 1
    return case.shape.experts > 1


WRONG = (
    lost_tail_of_gemm1,
    lost_tail_of_gemm2,
    scales_of_the_next_block,
    scales_of_the_next_block_in_gemm2,
    scales_of_the_next_expert,
    scales_of_the_next_expert_in_gemm1,
)


@cache
def judged(case: Case) -> tuple[Inputs, Expected]:
    inputs = make_inputs(case)
    out = case.recipe.out
    return inputs, expect(case, inputs, Rounding() if out == "fp32" else Rounding(gate_up=out, middle=out, row=out, out=out))


def output(inputs: Inputs, wrong: Callable[[Inputs, int], ExpertWeights]) -> Tensor:
    experts = Experts(inputs.case.shape.experts, lambda e: wrong(inputs, e), ACTIVATIONS[inputs.case.activation])
    return moe(inputs.x, inputs.routing, experts, handed(Rounding(), inputs)).to(get(inputs.case.recipe.out).torch_dtype)


def tiles(case: Case) -> Iterator[tuple[slice, slice]]:
    for row in range(0, case.shape.tokens, TILE):
        for column in range(0, case.shape.hidden, TILE):
            yield slice(row, row + TILE), slice(column, column + TILE)


@pytest.mark.parametrize("fill", ["exact", "real"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.__name__)
def test_a_wrong_kernel_is_seen(fill: str, wrong: Callable[[Inputs, int], ExpertWeights]) -> None:
    cases = [c for c in sample(fill) if applies(wrong, c)]
    blind = [c.id for c in cases if compare(judged(c)[1], output(judged(c)[0], wrong)).agrees]
    assert cases
    assert not blind


@pytest.mark.parametrize("fill", ["exact", "real"])
def test_a_lost_tile_is_seen(fill: str) -> None:
    cases = sample(fill)
    blind = [c.id for c in cases for tile in tiles(c) if not judged(c)[1].value[tile].any()]
    assert cases
    assert not blind
