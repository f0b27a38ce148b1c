"""A priori error: the variance of a right implementation's output, element by element, from its rounding points.

A rounding to a grid with spacing u adds an independent error of variance u**2 / 12. Errors of gate and up pass through
the activation's partial derivatives, everything in the middle through down**2 (one extra squared GEMM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.activation import Activation
from reference.experts import ExpertPass, ExpertWeights
from reference.grid import FP32
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
    middle = middle + rounding_variance(rounding, "activated", activated) * linear.square()
    own = rounding_variance(rounding, "middle", done.middle)
    if done.up is None and rounding.middle == rounding.gate_up:
        own = torch.where(done.middle == done.gate, 0.0, own)  # relu and identity pass on what is on the grid already
    return middle + own + (done.middle * ACTIVATION_ERROR).square()


def row_variance(done: ExpertPass, weights: ExpertWeights, middle: Tensor, rounding: Rounding) -> Tensor:
    """Variance of one expert's output rows [rows, hidden], float64, from `middle_variance`."""
    squared = weights.down.float().square_()  # a variance is wanted to a percent: float32 halves the traffic
    row = (middle.float() @ squared.T).double() + accumulation_variance(done.middle, weights.down, done.row)
    return row + rounding_variance(rounding, "row", done.row)


def independent_errors(middle: Tensor, hidden: int) -> float:
    """How many independent errors the rows of one expert hold: the mean of z**2 over them varies like that of so many.

    A row's `hidden` outputs mix n middle errors of unequal variance v, n = (sum v)**2 / sum v**2 (participation ratio);
    the mean of their squares then has relative variance 2 / n + 2 / hidden.
    """
    total = middle.sum(-1)
    share = middle.square().sum(-1) / total.square()  # 1 / n; NaN for a row without middle errors: only its own roundings
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
    weight_variance = rounding_variance(rounding, "routing_weight", weights)
    for k in range(rows.shape[1]):
        weighted = rows[:, k] * weights[:, k, None]
        total = total + weighted
        variance += weights[:, k, None].square() * variances[:, k] + weight_variance[:, k, None] * rows[:, k].square()
        variance += rounding_variance(rounding, "weighted", weighted) + FP32.ulp(total).square() / 12
        if k > 0 or rounding.partial != rounding.weighted:  # a sum of one term is on that term's grid already
            variance += rounding_variance(rounding, "partial", total)
    return variance if rounding.out == rounding.partial else variance + rounding_variance(rounding, "out", total)
