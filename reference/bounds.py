"""A priori error: the variance of a right implementation's output, element by element, from its rounding points.

A rounding to a grid with spacing u adds an independent error of variance u**2 / 12. Errors of gate and up pass through
the activation's partial derivatives, everything in the middle through down**2 (one extra squared GEMM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.activation import Activation
from reference.experts import ExpertPass, ExpertWeights
from reference.grid import FLOATS, FP32, binade
from reference.rounding import Rounding

MEAN_SQUARED_ULP = 0.541  # mean of 1 / m**2 over m uniform in log over a binade [1, 2): 3 / (8 ln 2)
SAMPLED = 512  # columns: a mean square of that many is within a few percent, for a term that is itself an estimate
ACTIVATION_ERROR = 2.0**-22  # relative, of a single-precision exp-based activation: 2 ulp, CUDA C++ Guide appendix on expf


def rounding_variance(rounding: Rounding, point: str, value: Tensor) -> Tensor:
    """Variance of the error made at a rounding point, 0 where nothing is rounded. value: float64."""
    return rounding.variance(point, value)


def accumulation_variance(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """[rows, columns]: variance of the fp32 sums in total = a @ b.T taken one term after another, an upper estimate.

    Each partial sum S_j of K terms is rounded to fp32. Given the final sum s, a random walk has (Brownian bridge)
    E[S_j**2] = s**2 (j/K)**2 + q j (K - j) / K, q the mean squared product; summed over j: K s**2 / 3 + K**2 q / 6.
    q is taken from the rows' mean squares (of b over at most SAMPLED columns), so a and b are not multiplied again.
    """
    terms = a.shape[-1]
    mean_square = a.square().mean(-1)[:, None] * b[:, :: -(-terms // SAMPLED)].square().mean(-1)[None, :]
    relative = 2.0 ** (-2 * FP32.mantissa_bits) * MEAN_SQUARED_ULP / 12
    return (mean_square * (terms**2 / 6) + total.square() * (terms / 3)) * relative


def middle_variance(done: ExpertPass, weights: ExpertWeights, activation: Activation, rounding: Rounding) -> Tensor:
    """Variance of the input of GEMM 2 [rows, intermediate], float64."""
    by_gate, by_up = _partials(done, activation)
    gate_variance = rounding_variance(rounding, "gate_up", done.gate) + accumulation_variance(done.x, weights.gate, done.gate)
    activated = activation.scalar(done.gate)
    linear = torch.ones_like(activated)
    middle = by_gate.square() * gate_variance
    if done.up is not None and weights.up is not None:
        linear = activation.linear(done.up)
        up_variance = rounding_variance(rounding, "gate_up", done.up) + accumulation_variance(done.x, weights.up, done.up)
        middle = middle + by_up.square() * up_variance
    middle = middle + _activated_variance("activated", done.gate, activated, rounding) * linear.square()
    if done.up is None and rounding.activated is None:
        own = _activated_variance("middle", done.gate, done.middle, rounding)
    elif done.up is None and rounding.activated == rounding.middle:
        own = torch.zeros_like(middle)  # on that grid already
    else:
        own = rounding_variance(rounding, "middle", done.middle)
    return middle + own + (done.middle * ACTIVATION_ERROR).square()


def _activated_variance(point: str, gate: Tensor, activated: Tensor, rounding: Rounding) -> Tensor:
    """Variance of rounding act(gate) at `point`. Where the activation is nearly the identity, a gate on the same grid comes
    back unchanged: relu, and the gelus and silu above 3 to 6. The error is then that of not applying the activation."""
    variance = rounding_variance(rounding, point, activated)
    if getattr(rounding, point) != rounding.gate_up or rounding.gate_up not in FLOATS:
        return variance
    moved = (activated - gate).square()
    return torch.where(moved < 3 * variance, moved, variance)  # half a spacing u: u**2 / 4, and variance is u**2 / 12


def row_variance(done: ExpertPass, weights: ExpertWeights, middle: Tensor, rounding: Rounding) -> Tensor:
    """Variance of one expert's output rows [rows, hidden], float64, from `middle_variance`."""
    squared = weights.down.float().square_()  # a variance is wanted to a percent: float32 halves the traffic
    row = (middle.float() @ squared.T).double() + accumulation_variance(done.middle, weights.down, done.row)
    return row + rounding_variance(rounding, "row", done.row)


def independent_errors(middle: Tensor, weights: Tensor, hidden: int) -> float:
    """How many independent errors an output holds: the mean of z**2 over it varies like that of so many.

    middle [tokens, top_k, 2]: sums of the variances v of the errors in an expert's middle, and of v**2; weights [tokens,
    top_k]. A token's `hidden` outputs mix n = (sum w**2 v)**2 / sum w**4 v**2 errors (participation ratio); the mean of
    their squares then has relative variance 2 / n + 2 / hidden.
    """
    power = weights.square()
    total, squares = (middle[..., 0] * power).sum(-1), (middle[..., 1] * power.square()).sum(-1)
    share = squares / total.square()  # 1 / n; NaN for a token without middle errors: only its own roundings
    return float((1 / (share.nan_to_num(0.0) + 1 / hidden)).sum())


def _partials(done: ExpertPass, activation: Activation) -> tuple[Tensor, Tensor]:
    """d middle / d gate and d middle / d up, by differentiating the activation itself."""
    gate = done.gate.detach().requires_grad_()
    up = None if done.up is None else done.up.detach().requires_grad_()
    wanted = [gate] if up is None else [gate, up]
    with torch.enable_grad():
        grads = torch.autograd.grad(activation.combine(gate, up).sum(), wanted)
    return grads[0], grads[-1]


def finalize_variance(rows: Tensor, variances: Tensor, weights: Tensor, rounding: Rounding) -> Tensor:
    """Variance of the layer's output [tokens, hidden] from rows and their variances [tokens, top_k, hidden]."""
    total, variance = torch.zeros_like(rows[:, 0]), torch.zeros_like(rows[:, 0])
    weight_error = rounding.at("routing_weight", weights) - weights  # of what every kernel computes alike: known
    for k in range(rows.shape[1]):
        weighted = rows[:, k] * weights[:, k, None]
        total = total + weighted
        variance += weights[:, k, None].square() * variances[:, k] + (weight_error[:, k, None] * rows[:, k]).square()
        points = ("weighted", "partial", "out")[: 3 if rows.shape[1] == 1 else 2] if k == 0 else ("weighted",)
        variance += _chain_variance(points, weighted, _power_of_two(weights[:, k, None]), rounding)
        variance += FP32.ulp(total).square() / 12
        if k > 0:
            variance += rounding_variance(rounding, "partial", total)
    if rows.shape[1] == 1 or rounding.out == rounding.partial:
        return variance
    return variance + rounding_variance(rounding, "out", total)


def _chain_variance(points: tuple[str, ...], value: Tensor, same: Tensor, rounding: Rounding) -> Tensor:
    """Variance of rounding one value at several points with nothing in between: a grid it is on already adds nothing.
    `same`: where it is still on the grid of "row", the routing weight being a power of two."""
    variance, grid = torch.zeros_like(value), rounding.row
    for point in points:
        at = getattr(rounding, point)
        if at is not None:
            variance += torch.where(same & (at == grid), 0.0, rounding_variance(rounding, point, value))
            same, grid = torch.ones_like(same), at
    return variance


def _power_of_two(x: Tensor) -> Tensor:
    return binade(x.double()) == x
