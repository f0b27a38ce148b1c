"""What the ops beside the whole layer should return, how far a right kernel may be from it, and what wrong ones return. Pure.

A call returns one matrix [tokens, columns], whose bytes are the kernel's own in another order:
quantize: uint8, the codes of a row (two 4-bit codes a byte, even column low), then the bytes of its scales (E8M0 or E4M3
codes, or little-endian float32; a scale that rows share stands in each of them);
activate: the values [tokens, inter]; route: int32 [tokens, 2 * top_k], the ids, then the bits of float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.inputs import Inputs
from reference.activation import ACTIVATIONS
from reference.format import WHOLE, Format, Quantized
from reference.formats import get
from reference.grid import FLOATS
from reference.layouts.linear import pack_nibbles
from reference.rounding import Rounding
from reference.routing import RULES, Rule, legal
from reference.routing.flat import normalized

FLOAT32 = 4  # bytes
# Relative error of a weight or a silu in fp32: __expf 2 + |1.16 x| ulp, __fdividef 2 (CUDA C++ Programming Guide, intrinsic
# functions), of up to 8 terms: 16 ulp of 2**-24.
FAST_FP32 = 2.0**-20
TANH_APPROX = 2.0**-11  # PTX ISA, tanh.approx.f32: largest relative error
SIGMOID = 2.0**-24  # absolute, of tanhf(x / 2) / 2 + 0.5 (FlashInfer noAuxTcKernels.cu sigmoid_accurate): half an ulp below 1
LEAST = 2.0**-126  # fp32 kernels flush what is smaller


@dataclass(frozen=True)
class Answer:
    """value, sigma [tokens, columns] float64 as `oracle.Expected` has them; exact: bits are due; read(output): the values
    that an output of the promised type holds; impostors: name -> the output of a wrong kernel, as a kernel would return it."""

    value: Tensor
    sigma: Tensor
    exact: bool
    impostors: dict[str, Tensor]
    read: Callable[[Tensor], Tensor] = lambda output: output


def promised(case: Case) -> tuple[tuple[int, int], torch.dtype]:
    """(shape, dtype) of the matrix that a call returns."""
    tokens = case.shape.tokens
    if case.op == "quantize":
        fmt = get(case.recipe.weights)
        return (tokens, code_bytes(fmt, case.shape.hidden) + scale_bytes(fmt, case.shape.hidden)), torch.uint8
    if case.op == "route":
        return (tokens, 2 * case.shape.top_k), torch.int32
    dtype = get(case.recipe.out).torch_dtype
    assert dtype is not None  # a plain format, as every out is
    return (tokens, case.shape.inter if case.op == "activate" else case.shape.hidden), dtype


def code_bytes(fmt: Format, columns: int) -> int:
    """Bytes of the codes of a row."""
    return columns * fmt.element.bits // 8


def scale_bytes(fmt: Format, columns: int) -> int:
    """Bytes of the scales of a row."""
    assert fmt.scaling is not None
    return fmt.scaling.scale_shape(1, columns)[1] * (FLOAT32 if fmt.scaling.element is FLOATS["fp32"] else 1)


def answer(case: Case, inputs: Inputs, rounding: Rounding) -> Answer:
    """The answer to a case of another op than moe, under the backend's declared rounding. quantize: `rounding.x` names the
    rule ("mxfp4:ocp"), or an element grid where the one scale is handed over ("e4m3"); activate: `activated` and `out` are
    looked at; route: `routing_weight`."""
    return {"quantize": _quantize, "activate": _activate, "route": _route}[case.op](case, inputs, rounding)


def canonical(q: Quantized) -> Tensor:
    """uint8 [rows, bytes] of a quantised matrix."""
    rows = q.shape[0]
    codes = pack_nibbles(q.codes) if q.format.element.bits == 4 else q.codes.contiguous().view(torch.uint8)
    assert q.scales is not None
    scales = q.scales.contiguous().view(torch.uint8).view(len(q.scales), scale_bytes(q.format, q.shape[1]))
    return torch.cat((codes, scales.expand(rows, -1)), 1)


def _quantize(case: Case, inputs: Inputs, rounding: Rounding) -> Answer:
    assert rounding.x is not None
    fmt = get(case.recipe.weights)
    bytes_ = canonical(_quantized(fmt, rounding.x, inputs))
    value = bytes_.double()
    wide = code_bytes(fmt, case.shape.hidden)
    impostors = {"zeros": torch.zeros_like(bytes_)} | _next_row(bytes_)
    assert fmt.scaling is not None
    each = scale_bytes(fmt, 1)
    if bytes_.shape[1] - wide > each:
        impostors["rolled_scales"] = torch.cat((bytes_[:, :wide], bytes_[:, wide:].roll(each, 1)), 1)
    elif fmt.scaling.group[0] != WHOLE and len(bytes_) > 1:
        impostors["rolled_scales"] = torch.cat((bytes_[:, :wide], bytes_[:, wide:].roll(1, 0)), 1)
    return Answer(value, torch.zeros_like(value), True, impostors)


def _quantized(fmt: Format, rule: str, inputs: Inputs) -> Quantized:
    x, scale = inputs.x.float(), inputs.x_scale
    if rule in FLOATS:
        assert scale is not None
        codes = fmt.element.encode(x * scale).to(torch.uint8)
        return Quantized(fmt, codes, torch.full((1, 1), 1 / scale, device=x.device))
    given = (
        None if scale is None or fmt.scaling is None or not fmt.scaling.global_scale else torch.tensor(scale, device=x.device)
    )
    return get(rule).encode(x, given)


def _activate(case: Case, inputs: Inputs, rounding: Rounding) -> Answer:
    act, x = ACTIVATIONS[case.activation], inputs.x.double()
    gate, up = (x, None) if not act.gated else x.chunk(2, 1)
    scalar = act.scalar(gate)
    if case.exact:
        scalar = scalar.float().double()  # SATURATED is where fp32 has no room for the difference from the identity
    linear = torch.ones_like(gate) if up is None else act.linear(up)
    value = scalar * linear
    variance = rounding.variance("activated", scalar) * linear.square() + rounding.variance("out", value)
    variance += (value * FAST_FP32).square() + LEAST**2 + (_cancelled(act.name, gate) * linear).square()
    rounded = rounding.at("activated", scalar) * linear
    exact = case.exact and torch.equal(rounding.at("out", rounded), value)
    wrong = {"zeros": torch.zeros_like(value)} | _next_row(value)
    if up is not None:
        evens = act.combine(x[:, ::2], x[:, 1::2])
        wrong |= {"gate_up_swap": act.combine(up, gate), "gate_up_interleave": evens}
    dtype = get(case.recipe.out).torch_dtype
    impostors = {name: w.to(dtype) for name, w in wrong.items() if not torch.equal(w, value) or name == "zeros"}
    return Answer(value, variance.sqrt(), exact, impostors)


def _cancelled(name: str, gate: Tensor) -> Tensor:
    """Error of x / 2 * (1 + tanh or erf) where the sum cancels: half of x times the function's own error."""
    if name in ("geglu_tanh", "gelu_tanh"):
        return gate.abs() / 2 * TANH_APPROX
    return gate.abs() / 2 * FAST_FP32 if name in ("geglu", "gelu") else torch.zeros_like(gate)


def _route(case: Case, inputs: Inputs, rounding: Rounding) -> Answer:
    routing, experts, dtype = inputs.routing, case.shape.experts, torch.float32
    order = routing.ids.argsort(-1)
    ids, value = routing.ids.gather(1, order), routing.weights.gather(1, order)
    variance = rounding.variance("routing_weight", value) + (value * FAST_FP32).square() + LEAST**2
    rule = RULES[case.routing]
    if rule.score is torch.sigmoid:
        scores = rule.scores(inputs.logits, inputs.bias)[0].gather(1, ids)
        variance += (value / scores.clamp(min=LEAST) * _sigmoid_error(rounding)).square()
    exact = case.exact and torch.equal(rounding.at("routing_weight", value), value)
    truth, due = packed(ids, value.to(dtype)), (ids, value)
    if _sums(rule, rounding):  # what the scores' errors leave untouched
        value, variance = (
            with_sum(value),
            torch.cat((variance, (rule.scale * FAST_FP32) ** 2 * torch.ones_like(value[:, :1])), 1),
        )
    wrong = {"zeros": torch.zeros_like(truth)} | _next_row(truth)
    if experts > case.shape.top_k:
        wrong["next_expert"] = packed((ids + 1) % experts, value.to(dtype))
    impostors = {name: w for name, w in wrong.items() if not torch.equal(w, truth) or name == "zeros"}
    return Answer(value, variance.sqrt(), exact, impostors, lambda output: _weights(case, inputs, due, output, rounding))


def _sigmoid_error(rounding: Rounding) -> float:
    """Absolute: half an ulp below 1 of the type in which the score is declared to leave the function, fp32 without one."""
    return SIGMOID if rounding.activated is None else float(FLOATS[rounding.activated].ulp(torch.tensor(0.75).double())) / 2


def _sums(rule: Rule, rounding: Rounding) -> bool:
    """Is the sum of a token's weights judged too? Scores of less than fp32 leave it as exact as a division is."""
    return rounding.activated is not None and rule.weigh is normalized


def with_sum(weights: Tensor) -> Tensor:
    """[tokens, top_k + 1]: a token's weights and their sum."""
    return torch.cat((weights, weights.sum(1, keepdim=True)), 1)


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    """int32 [tokens, 2 * top_k] of ids and float32 weights [tokens, top_k]."""
    return torch.cat((ids.int(), weights.contiguous().view(torch.int32)), 1)


def _weights(case: Case, inputs: Inputs, due: tuple[Tensor, Tensor], output: Tensor, rounding: Rounding) -> Tensor:
    """float64 [tokens, top_k]: the weights in ascending order of their experts, NaN where the expert is a wrong one. Another
    selection that is as right (`reference.routing.legal`) counts as the reference's, its weights as far from their own."""
    ids, weights = due
    given, held = output.to(ids.device)[:, : case.shape.top_k].long(), output.to(ids.device)[:, case.shape.top_k :]
    order = given.argsort(-1)
    given, got = given.gather(1, order), held.contiguous().view(torch.float32).double().gather(1, order)
    rule, wrong = RULES[case.routing], given != ids
    if wrong.any():
        delta = None if rounding.activated is None else 2 * _sigmoid_error(rounding)  # of two scores
        allowed = legal(rule, inputs.logits, inputs.bias, given, delta) & wrong.any(-1)
        scores, _ = rule.scores(inputs.logits, inputs.bias)
        theirs = rule.weigh(scores.gather(1, given.clamp(0, case.shape.experts - 1))) * rule.scale
        got = torch.where(allowed[:, None], got - theirs + weights, got)
        wrong &= ~allowed[:, None]
    got = torch.where(wrong, torch.nan, got)
    return with_sum(got) if _sums(rule, rounding) else got


def _next_row(output: Tensor) -> dict[str, Tensor]:
    return {"next_row": output.roll(-1, 0)} if len(output) > 1 else {}
