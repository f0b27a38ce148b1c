"""A priori error: the variance of a right implementation's output, element by element, from its rounding points.

A rounding to a grid with spacing u adds an independent error of variance u**2 / 12. Errors of gate and up pass through
the activation's partial derivatives, everything in the middle through down**2 (one extra squared GEMM). What a format with
block scales adds before GEMM 2 is not random but known, and its mean over a block meets the mean of the block's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference.activation import Activation
from reference.experts import ExpertPass, ExpertWeights, combined, product_of
from reference.format import expand_blocks, to_blocks
from reference.grid import FLOATS, FP32, binade
from reference.rounding import IDEAL, Rounding

MEAN_SQUARED_ULP = 0.541  # mean of 1 / m**2 over m uniform in log over a binade [1, 2): 3 / (8 ln 2)
SAMPLED = 512  # columns: a mean square of that many is within a few percent, for a term that is itself an estimate
ACTIVATION_ERROR = 2.0**-22  # relative, of a single-precision exp-based activation: 2 ulp, CUDA C++ Guide appendix on expf
BLOCK = 16  # columns: NVFP4's scale block; every coarser group of errors, scales or zero points is made of such blocks


@dataclass(frozen=True)
class MiddleError:
    """Error of the input of GEMM 2 [rows, intermediate], float64. known: what the declared rounding points make of the ideal
    input where one of them is a format with scales, else None; random: variance of everything else."""

    random: Tensor
    known: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """Mean square of all of it."""
        return self.random if self.known is None else self.random + self.known.square()

    @property
    def moments(self) -> Tensor:
        """[rows, 2]: sums of the variances and of their squares, as `independent_errors` takes them."""
        return torch.stack((self.variance.sum(-1), self.variance.square().sum(-1)), dim=-1)


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
    mean_square = a.square().mean(-1)[..., :, None] * b[..., :: -(-terms // SAMPLED)].square().mean(-1)[..., None, :]
    relative = 2.0 ** (-2 * FP32.mantissa_bits) * MEAN_SQUARED_ULP / 12
    return (mean_square * (terms**2 / 6) + total.square() * (terms / 3)) * relative


def middle_error(done: ExpertPass, weights: ExpertWeights, activation: Activation, rounding: Rounding) -> MiddleError:
    """Error of the input of GEMM 2."""
    if not rounding.quantises:
        return MiddleError(_middle_variance(done, weights, activation, rounding))
    sums = _middle_variance(done, weights, activation, IDEAL)  # float roundings are part of what is known
    return MiddleError(sums, known_error(done, weights, activation, rounding))


def known_error(done: ExpertPass, weights: ExpertWeights, activation: Activation, rounding: Rounding) -> Tensor:
    """[rows, intermediate]: the middle with every rounding point before GEMM 2, minus the ideal one. A kernel's values differ
    from these by its fp32 sums, which rarely cross a 4- or 8-bit midpoint, and one that does errs by as much with the other
    sign. So scales fitted to rounded values, values on a grid already and the bias of a format are what the kernel has."""

    def kept(total: Tensor, bias: Tensor | None) -> Tensor:
        product = rounding.at("product", product_of(total, bias))
        return rounding.at("gate_up", product if bias is None else product + bias)

    gate = kept(done.gate, weights.gate_bias)
    up = None if done.up is None else kept(done.up, weights.up_bias)
    return combined(gate, up, activation, rounding) - done.middle


def _middle_variance(done: ExpertPass, weights: ExpertWeights, activation: Activation, rounding: Rounding) -> Tensor:
    """[rows, intermediate]: variance of the middle by roundings and sums, each independent of the others."""
    by_gate, by_up = _partials(done, activation)
    gate_variance = _sum_of_gemm(rounding, "gate_up", (done.x, weights.gate, weights.gate_bias), done.gate)
    activated = activation.scalar(done.gate)
    linear = torch.ones_like(activated)
    middle = by_gate.square() * gate_variance
    if done.up is not None and weights.up is not None:
        linear = activation.linear(done.up)
        up_variance = _sum_of_gemm(rounding, "gate_up", (done.x, weights.up, weights.up_bias), done.up)
        middle = middle + by_up.square() * up_variance
    middle = middle + _activated_variance("activated", done.gate, activation, rounding) * linear.square()
    if done.up is None and rounding.activated is None:
        own = _activated_variance("middle", done.gate, activation, rounding)
    elif done.up is None and rounding.activated == rounding.middle:
        own = torch.zeros_like(middle)  # on that grid already
    else:
        own = rounding_variance(rounding, "middle", done.middle)
    return middle + own + (done.middle * ACTIVATION_ERROR).square()


def _sum_of_gemm(rounding: Rounding, point: str, gemm: tuple[Tensor, Tensor, Tensor | None], total: Tensor) -> Tensor:
    """Variance of total = a @ b.T + bias, gemm = (a, b, bias), that leaves through `point`."""
    a, b, bias = gemm
    product = product_of(total, bias)
    variance = rounding_variance(rounding, point, total) + accumulation_variance(a, b, product)
    if bias is None and rounding.product is None:
        return variance
    return variance + rounding_variance(rounding, "product", product) + (0 if bias is None else FP32.ulp(total).square() / 12)


def _activated_variance(point: str, gate: Tensor, activation: Activation, rounding: Rounding) -> Tensor:
    """Variance of rounding act(gate) at `point`. Of a gate that was rounded itself, act takes few values, whose errors are
    known and not uniform: 0 for relu, what the activation changes where it is nearly the identity, and around 1 a tenth more
    or less (measured, silu and gelu in bf16). The gate's own rounding is `gate_up`'s."""
    if getattr(rounding, point) not in FLOATS or rounding.gate_up not in FLOATS:
        return rounding_variance(rounding, point, activation.scalar(gate))
    written = activation.scalar(rounding.at("gate_up", gate))
    return (rounding.at(point, written) - written).square()


def row_variance(done: ExpertPass, weights: ExpertWeights, middle: MiddleError, rounding: Rounding) -> Tensor:
    """Variance of one expert's output rows [rows, hidden], float64."""
    down = weights.down.float()  # a variance is wanted to a percent: float32 halves the traffic
    row = middle.random.float() @ down.square().mT if middle.known is None else _known_square(middle, down)
    return row.double() + _sum_of_gemm(rounding, "row", (done.middle, weights.down, weights.down_bias), done.row)


def _known_square(middle: MiddleError, down: Tensor) -> Tensor:
    """[rows, hidden]: mean square of the error that `middle` makes in middle @ down.T, down float32.

    Errors e that share a scale have a bias of one sign (clipped peaks, one-signed values on a coarse grid), and weights d
    with a zero point one mean: sum e**2 d**2, right for independent signs, then misses most of (sum e d)**2. With e = E + f
    and d = D + g, E and D the means of a block of n, sum e d = sum n E D + sum f g. The first sum is known. In the second
    signs are taken as random: its square is n / (n - 1) sum f**2 g**2 on average over the orders of a block's weights
    (Hoeffding 1951, "A combinatorial central limit theorem": sum f**2 sum g**2 / (n - 1)). A mean of 16 is
    an estimate: where few neurons matter the mean of z**2 is 1 or 2 % low (measured, fp8_tensor)."""
    assert middle.known is not None
    error, random = middle.known.float(), middle.random.float()
    counts = _block_sums(torch.ones_like(error[:1]))
    means, biases = _block_sums(down) / counts, _block_sums(error) / counts
    common = (biases * counts) @ means.T
    group = (1, BLOCK)
    deviation = (down - expand_blocks(means, (down.shape[0], down.shape[1]), group)).square_()
    bessel = expand_blocks(counts / (counts - 1).clamp(min=1), (1, down.shape[1]), group)
    scatter = (error - expand_blocks(biases, (error.shape[0], error.shape[1]), group)).square_() * bessel
    return common.square() + (scatter + random) @ deviation.T + _block_sums(random) @ means.square().T


def _block_sums(x: Tensor) -> Tensor:
    """[rows, blocks]: sums over BLOCK columns of x [rows, columns]."""
    return to_blocks(x, (1, BLOCK)).sum(-1).squeeze(1)


def independent_errors(middle: Tensor, weights: Tensor, hidden: int) -> Tensor:
    """How many independent errors each row of an output holds, [tokens]: the mean of z**2 varies like that of so many.

    middle [tokens, top_k, 2]: sums of the variances v of the errors in an expert's middle, and of v**2; weights [tokens,
    top_k]. A token's `hidden` outputs mix n = (sum w**2 v)**2 / sum w**4 v**2 errors (participation ratio); the mean of
    their squares then has relative variance 2 / n + 2 / hidden.
    """
    power = weights.square()
    total, squares = (middle[..., 0] * power).sum(-1), (middle[..., 1] * power.square()).sum(-1)
    share = squares / total.square()  # 1 / n; NaN for a token without middle errors: only its own roundings
    return 1 / (share.nan_to_num(0.0) + 1 / hidden)


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
    powers, squares = _power_of_two(weights), weights.square()
    for k in range(rows.shape[1]):
        weighted = rows[:, k] * weights[:, k, None]
        total = total + weighted
        variance += squares[:, k, None] * variances[:, k]
        points = ("weighted", "partial", "out")[: 3 if rows.shape[1] == 1 else 2] if k == 0 else ("weighted",)
        variance += _chain_variance(points, weighted, powers[:, k, None], rounding)
        variance += FP32.ulp(total).square() / 12
        if k > 0:
            variance += _sum_variance(total - weighted, weighted, rounding)
    if rounding.routing_weight is not None:  # the error of what every kernel computes alike: known
        error = rounding.at("routing_weight", weights) - weights
        variance += sum((error[:, k, None] * rows[:, k]).square() for k in range(rows.shape[1]))
    if rows.shape[1] == 1 or rounding.out == rounding.partial:
        return variance
    return variance + _out_variance(rows, weights, total, rounding)


def _out_variance(rows: Tensor, weights: Tensor, total: Tensor, rounding: Rounding) -> Tensor:
    """Variance of rounding the sum of several experts at "out". Where all terms are on that grid already, the weights being
    powers of two (1 where they multiplied the input), it is that of `_sum_variance`, with the finest of the terms."""
    variance = rounding_variance(rounding, "out", total)
    written = rounding.row if rounding.weighted is None else rounding.weighted
    if rounding.partial is not None or written != rounding.out or written not in FLOATS:
        return variance
    gridded = _power_of_two(weights).all(-1, keepdim=True) | (rounding.weighted is not None)
    if not bool(gridded.any()):
        return variance
    grid, finest = FLOATS[written], torch.full_like(total, torch.inf)
    for k in range(rows.shape[1]):
        weighted = rows[:, k] * weights[:, k, None]
        finest = torch.where(weighted == 0, finest, torch.minimum(finest, grid.ulp(weighted)))
    coarser = torch.where(finest < grid.ulp(total), variance + finest.square() / 6, 0.0)
    return torch.where(gridded, coarser, variance)


def _sum_variance(a: Tensor, b: Tensor, rounding: Rounding) -> Tensor:
    """Variance of rounding a + b at "partial". Where a and b are on that grid already, so is nearly their sum: it is a multiple
    of the finer of their spacings g, and rounding that to spacing u errs by a multiple of g: (u**2 + 2 g**2) / 12 for
    g < u, powers of two, ties included (g = u / 2: 0 or u / 2, u**2 / 8), and 0 for g >= u."""
    variance = rounding_variance(rounding, "partial", a + b)
    if rounding.weighted != rounding.partial or rounding.partial not in FLOATS:
        return variance
    grid = FLOATS[rounding.partial]
    finer = torch.minimum(torch.where(a == 0, torch.inf, grid.ulp(a)), torch.where(b == 0, torch.inf, grid.ulp(b)))
    return torch.where(finer < grid.ulp(a + b), variance + finer.square() / 6, 0.0)


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
