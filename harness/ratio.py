"""The gate for a kernel that declares no roundings: tile by tile, it may err twice as much as a plain emulation does.

Errors are against float64, in units of the sigma that the emulated recipe has; a tile is a row, a stripe of 64 columns or
all rows of an expert. A tile fails if rms(kernel) > 2 * quantile_0.99(rms(emulation), tiles of the kind) + floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Recipe
from reference.formats import get
from reference.grid import FLOATS
from reference.recipes import RECIPES
from reference.rounding import THEN, Rounding

TIMES = 2.0  # of the emulation's error: FlashAttention's tests, torch._dynamo's `same`
QUANTILE = 0.99  # of the emulation's tiles: not its single worst one, which no kernel has to match
STRIPE = 64  # columns: the narrowest output tile in use
FALSE_ALARM = 1e-6  # probability that a right kernel exceeds its limit in one case, if its errors are normal; every lane's


@dataclass(frozen=True)
class Baseline:
    """output [tokens, hidden]: the emulated recipe's; freedom [tokens, hidden]: variance of roundings that a kernel may add
    when it sums over experts; neurons: independent errors in the inputs of GEMM 2, mean over tokens. float64, CPU."""

    output: Tensor
    freedom: Tensor
    neurons: float


@dataclass(frozen=True)
class Ratios:
    """(rms - floor) / the emulation's quantile, for each row [tokens], stripe [stripes] and expert that has rows [experts];
    member [experts, tokens] says which rows those are."""

    rows: Tensor
    stripes: Tensor
    experts: Tensor
    member: Tensor

    @property
    def worst(self) -> float:
        """The largest of all tiles, 0 for no tiles."""
        return max((float(r.max()) for r in (self.rows, self.stripes, self.experts) if r.numel()), default=0.0)

    def failing(self, hidden: int) -> Tensor:
        """bool [tokens, hidden]: elements of the tiles above TIMES."""
        rows = (self.rows > TIMES) | self.member[self.experts > TIMES].any(0)
        columns = (self.stripes > TIMES).repeat_interleave(STRIPE)[:hidden]
        return rows[:, None] | columns[None, :]


def assumed_rounding(recipe: Recipe) -> Rounding:
    """What most libraries do with such a recipe: every tensor between kernels in the output's type, GEMM 2's input also
    through its format where that is quantised. Where one of `reference.recipes` quantises the output of GEMM 1, that too:
    a kernel that declares nothing may be of that library, and it errs up to 3.4 times as much (measured, relu2)."""
    carrier = recipe.out
    middle = recipe.middle if get(recipe.middle).scaling is None else f"{carrier}{THEN}{recipe.middle}"
    return Rounding(gate_up=_coarsest_gate_up(recipe), middle=middle, row=carrier, out=carrier)


def _coarsest_gate_up(recipe: Recipe) -> str:
    formats = recipe.acts, (recipe.middle,)
    known = [r.rounding for r in RECIPES.values() if (r.rounding.x, r.rounding.steps("middle")[-1:]) == formats]
    return next((r.gate_up for r in known if r.gate_up is not None and r.gate_up not in FLOATS), recipe.out)


def ratios(baseline: Baseline, value: Tensor, sigma: Tensor, got: Tensor, ids: Tensor) -> Ratios:
    """Judge got against value, with the sigma of the emulated recipe: [tokens, hidden] float64 each, at least one token;
    ids [tokens, top_k]."""
    tokens, hidden = value.shape
    member = torch.zeros(int(ids.max()) + 1, tokens, dtype=torch.bool).scatter_(0, ids.T, True)
    member = member[member.any(-1)]
    widths = torch.tensor([s.numel() for s in torch.empty(hidden).split(STRIPE)])
    whole = torch.tensor(hidden)
    independent = [  # see `reference.bounds.independent_errors`
        rows / (1 / baseline.neurons + 1 / columns)
        for rows, columns in ((torch.ones(tokens), whole), (tokens, widths), (member.sum(-1), whole))
    ]
    kernel, emulation, freedom = (
        _tiles(torch.where(error == 0, 0.0, error / sigma), member)
        for error in (got - value, baseline.output - value, baseline.freedom.sqrt())
    )
    chance = math.log(sum(n.numel() for n in independent) / FALSE_ALARM)
    luck = [(2 * chance / n).sqrt() for n in independent]
    rows, stripes, experts = map(_ratio, kernel, emulation, freedom, luck)
    return Ratios(rows, stripes, experts, member)


def _tiles(z: Tensor, member: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean squares of z [tokens, hidden] over the rows, the stripes and the experts' rows; inf where z is not finite."""
    squares = torch.where(z.isfinite(), z, torch.inf).square()
    rows = squares.mean(-1)
    stripes = torch.stack([s.mean() for s in squares.split(STRIPE, dim=-1)])
    experts = torch.where(member, rows, 0.0).sum(-1) / member.sum(-1)
    return rows.sqrt(), stripes.sqrt(), experts.sqrt()


def _ratio(kernel: Tensor, emulation: Tensor, freedom: Tensor, luck: Tensor) -> Tensor:
    """The floor has two parts, in sigmas. `luck`: the rms of n normal errors exceeds 1 + sqrt(2 log(1 / p) / n) with
    probability p at most (Laurent and Massart 2000, lemma 1). `freedom`: added in quadrature to what TIMES grants.
    An emulation in float64 sums does not err in them: less than the sigma it should have, 1, is not asked of a kernel."""
    scale = emulation.quantile(QUANTILE).clamp(min=1.0)
    floor = (freedom.square() + (TIMES * scale) ** 2).sqrt() - TIMES * scale + luck
    return (kernel - floor) / scale
