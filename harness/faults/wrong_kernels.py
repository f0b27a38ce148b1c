"""Kernels with a mistake, for the tests of the diagnosis: reference.moe with its inputs edited, as a kernel rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from harness.case import Case
from harness.compare import compare
from harness.diagnose import diagnose
from harness.inputs import Inputs, make_inputs
from harness.oracle import Expected, expect, weight_source
from harness.verdict import Diagnosis, Finding
from reference.activation import ACTIVATIONS, Activation
from reference.experts import ExpertWeights
from reference.format import Quantized
from reference.formats import get
from reference.moe import Experts, moe
from reference.rounding import Rounding
from reference.routing import Routing

KERNEL = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
CASES = {
    "bf16": "moe.bf16.t33.h128.i96.e6.k2.renormalize.swiglu.standard.{}.s1",
    "square": "moe.bf16.t17.h96.i96.e5.k2.default.swiglu.standard.{}.s3",
    "nvfp4": "moe.nvfp4.t33.h128.i96.e6.k2.renormalize.swiglu.standard.{}.s1",
    "mxfp4": "moe.mxfp4.t17.h160.i96.e5.k2.renormalize.geglu.standard.{}.s2",
    "fp8": "moe.fp8_tensor.t17.h96.i64.e4.k2.renormalize.swiglu.standard.{}.s2",
    "top1": "moe.nvfp4.t33.h128.i96.e6.k1.renormalize.swiglu.standard.{}.s1",
    "one_expert": "moe.mxfp4.t17.h96.i64.e1.k1.renormalize.swiglu.standard.{}.s1",
    "one_token": "moe.nvfp4.t1.h128.i96.e6.k2.renormalize.swiglu.standard.{}.s1",
    "ungated": "moe.bf16.t17.h96.i64.e5.k2.renormalize.relu.standard.{}.s1",
    "biased": "moe.bf16.t17.h96.i64.e32.k4.deepseek_v3.swiglu.standard.{}.s1",
}


@dataclass(frozen=True)
class Bench:
    """A case with its right output, bf16 between the steps, and everything a wrong kernel is made of."""

    case: Case
    inputs: Inputs
    expected: Expected
    right: Tensor

    @property
    def routing(self) -> Routing:
        """The right one."""
        return self.inputs.routing

    def kernel(
        self,
        x: Tensor | None = None,
        weights: Callable[[int], ExpertWeights] | None = None,
        activation: Activation | None = None,
        **experts: bool,
    ) -> Tensor:
        """The output of a kernel with these parts in place of the right ones."""
        layer = Experts(
            self.case.shape.experts,
            weights or weight_source(self.inputs),
            activation or ACTIVATIONS[self.case.activation],
            **experts,  # type: ignore[arg-type]
        )
        return self.out(moe(self.inputs.x if x is None else x, self.routing, layer, KERNEL))

    def routed(self, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The output of a kernel with other expert ids or routing weights."""
        routing = replace(self.routing, ids=self.routing.ids if ids is None else ids)
        routing = replace(routing, weights=routing.weights if weights is None else weights)
        layer = Experts(self.case.shape.experts, weight_source(self.inputs), ACTIVATIONS[self.case.activation])
        return self.out(moe(self.inputs.x, routing, layer, KERNEL))

    def edited(self, edit: Callable[[ExpertWeights], ExpertWeights], only: int | None = None) -> Tensor:
        """The output of a kernel that sees edited weights, of one expert or all."""
        source = weight_source(self.inputs)
        return self.kernel(weights=lambda e: edit(source(e)) if only in (None, e) else source(e))

    def repacked(self, edit: Callable[[Quantized, int, int], Quantized]) -> Tensor:
        """The output of a kernel that decodes edited codes and scales; edit(q, expert, position in gate, up, down)."""
        decode = get(self.case.recipe.weights).decode

        def source(expert: int) -> ExpertWeights:
            gate, up, down = packed(self.inputs, expert)
            edited = [None if q is None else decode(edit(q, expert, i)) for i, q in enumerate((gate, up, down))]
            return ExpertWeights(*edited)  # type: ignore[arg-type]

        return self.kernel(weights=source)

    def out(self, x: Tensor) -> Tensor:
        """x in the output's dtype."""
        return x.to(self.right.dtype)

    def diagnosis(self, wrong: Tensor, findings: tuple[Finding, ...] = ()) -> Diagnosis:
        """What is said of a wrong output; AssertionError if it is not rejected."""
        comparison = compare(self.expected, wrong)
        assert not comparison.agrees
        return diagnose(self.expected, wrong, comparison, findings)


def packed(inputs: Inputs, expert: int) -> tuple[Quantized, Quantized | None, Quantized]:
    """(gate, up, down) of one expert."""
    return *inputs.gate_up(expert), inputs.down(expert)


@cache
def bench(name: str, fill: str) -> Bench:
    """The bench of CASES[name] with that fill."""
    return bench_of(Case.parse(CASES[name].format(fill)))


def bench_of(case: Case) -> Bench:
    """The bench of a case."""
    inputs = make_inputs(case)
    layer = Experts(case.shape.experts, weight_source(inputs), ACTIVATIONS[case.activation])
    right = moe(inputs.x, inputs.routing, layer, KERNEL).to(get(case.recipe.out).torch_dtype)
    return Bench(case, inputs, expect(case, inputs, KERNEL), right)


def busiest(b: Bench) -> int:
    """The expert with most slots."""
    return int(b.routing.ids.flatten().bincount().argmax())
