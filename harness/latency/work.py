"""What a case must do at the least: floating-point operations, and bytes with every input read and every output written once.

The two terms of the roofline (Williams, Waterman and Patterson 2009). Padding, re-reads and tensors between kernels are the
kernel's own and count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.case import Case
from reference.activation import ACTIVATIONS
from reference.format import Format
from reference.formats import get

ROUTE_BYTES = 8  # an id of 32 bits and a float32 weight for each slot


@dataclass(frozen=True)
class Work:
    """flops: a multiply-add counts two; bytes: the fewest that move."""

    flops: float
    bytes: float


def matrix_bytes(fmt: Format, rows: int, columns: int) -> float:
    """Of one matrix in a format: codes and block scales; a global scale is nothing."""
    size = rows * columns * fmt.element.bits / 8
    if fmt.scaling is not None:
        down, right = fmt.scaling.scale_shape(rows, columns)
        size += down * right * (fmt.scaling.stored or fmt.scaling.element).bits / 8
    return size


def work(case: Case, experts: float) -> Work:
    """Of a case whose tokens reach so many different experts, the mean over what is measured."""
    shape, recipe = case.shape, case.recipe
    x, out = get(recipe.carrier), get(recipe.out)
    slots = shape.tokens * shape.top_k
    routed = slots * ROUTE_BYTES
    if case.op == "route":
        return Work(0.0, shape.tokens * shape.experts * 4 + routed)
    if case.op == "quantize":
        return Work(
            0.0, matrix_bytes(x, shape.tokens, shape.hidden) + matrix_bytes(get(recipe.weights), shape.tokens, shape.hidden)
        )
    halves = 2 if ACTIVATIONS[case.activation].gated else 1
    if case.op == "activate":
        return Work(0.0, matrix_bytes(x, shape.tokens, (halves + 1) * shape.inter))
    weights = get(recipe.weights)
    each = halves * matrix_bytes(weights, shape.inter, shape.hidden) + matrix_bytes(weights, shape.hidden, shape.inter)
    tokens = matrix_bytes(x, shape.tokens, shape.hidden) + matrix_bytes(out, shape.tokens, shape.hidden)
    return Work(2.0 * slots * shape.hidden * shape.inter * (halves + 1), experts * each + tokens + routed)
