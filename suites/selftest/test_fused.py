"""The layer in one pass over the codes equals the layer expert by expert."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch

import reference.fused
from harness.case import Case
from harness.inputs import Inputs, make_inputs
from harness.oracle import layer_experts
from reference.activation import ACTIVATIONS
from reference.formats import all_formats, get
from reference.fused import Stacked, matvec, refuses, stack
from reference.moe import moe

SHAPE = (64, 128)
TAKEN = [name for name, fmt in all_formats().items() if refuses(fmt, SHAPE) is None]


def stacked(inputs: Inputs) -> tuple[Stacked, ...]:
    experts = range(inputs.case.shape.experts)
    first = zip(*(inputs.gate_up(e) for e in experts), strict=True)
    return (*(stack(half) for half in first if half[0] is not None), stack([inputs.down(e) for e in experts]))


def error(case: Case, compiled: bool) -> float:
    """Largest difference to the layer expert by expert, relative to the largest output."""
    inputs, activation = make_inputs(case), ACTIVATIONS[case.activation]
    wanted = moe(inputs.x, inputs.routing, layer_experts(inputs))
    got = reference.fused.moe(inputs.x, inputs.routing, stacked(inputs), activation, compiled)
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_most_formats_are_taken() -> None:
    assert {"nvfp4", "mxfp4", "mxfp8", "fp8_tensor", "fp8_channel", "int8_channel", "int4_g32", "mxint4"} <= set(TAKEN)


@pytest.mark.parametrize("name", TAKEN)
def test_it_is_the_layer_expert_by_expert(name: str) -> None:
    case = f"moe.{name}.t5.h256.i128.e6.k2.renormalize.swiglu.standard.real.s1"
    assert error(Case.parse(case), compiled=False) < 1e-12


def test_an_activation_without_a_gate() -> None:
    case = Case.parse("moe.nvfp4.t5.h96.i64.e6.k4.deepseek_v4.relu2.standard.real.s1")
    assert error(case, compiled=False) < 1e-12


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_it_is_the_same(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By dynamo alone, in one graph; by inductor at night, because C++ takes 20 seconds to compile."""
    if compiler == "inductor" and (shutil.which("g++") is None or os.environ.get("HYPOTHESIS_PROFILE") != "nightly"):
        pytest.skip("inductor: nightly, with a C++ compiler")
    product = torch.compile(reference.fused._product, dynamic=True, fullgraph=True, backend=compiler)
    monkeypatch.setattr(reference.fused, "_compiled", lambda device: product)
    case = Case.parse("moe.nvfp4.t5.h64.i64.e6.k2.renormalize.swiglu.standard.real.s1")
    assert error(case, compiled=True) < 1e-12


def test_by_default_it_compiles_and_one_graph_serves_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shapes would compile, 20 seconds each, for every case of a run."""
    graphs, runs, original = list[int](), list[int](), torch.compile

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(len(runs))

        def ran(*values: object) -> object:
            runs.append(1)
            return graph.forward(*values)

        return ran

    monkeypatch.setattr(torch, "compile", partial(original, backend=backend))
    reference.fused._compiled.cache_clear()
    for shape in ("t5.h64.i96.e6.k2", "t9.h128.i192.e5.k3", "t3.h192.i64.e7.k2"):
        inputs = make_inputs(Case.parse(f"moe.nvfp4.{shape}.renormalize.swiglu.standard.real.s1"))
        weights = stacked(inputs)
        reference.fused.moe(inputs.x, inputs.routing, weights, ACTIVATIONS["swiglu"])
        matvec(weights[0], torch.zeros(2, dtype=torch.int64), inputs.x[:2].double())
    reference.fused._compiled.cache_clear()
    assert len(runs) == 3 * 4
    assert max(graphs) < 4  # none compiled after the first shape


def test_tables_have_an_entry_a_code() -> None:
    inputs = make_inputs(Case.parse("moe.nvfp4.t5.h64.i64.e6.k2.renormalize.swiglu.standard.real.s1"))
    w = stack([inputs.down(e) for e in range(6)])
    assert w.scale_table is not None
    assert (w.table.shape, w.scale_table.shape, w.divisor.shape, w.block) == ((16,), (256,), (6,), 16)


def test_a_product_by_hand() -> None:
    """Two experts of one row: codes 2 and 5 of E2M1 are 1 and 3, the block scales 2 and 4, the global scale 8."""
    codes = torch.tensor([[[2] * 16 + [5] * 16], [[5] * 16 + [2] * 16]], dtype=torch.uint8)
    table, scales = get("nvfp4").element.decode(torch.arange(16)), torch.tensor([[[2.0, 4.0]]]).expand(2, 1, 2)
    w = Stacked(codes, table, scales, None, torch.tensor([1.0, 8.0]).double(), 16)
    x = torch.ones(3, 32, dtype=torch.float64)
    got = matvec(w, torch.tensor([1, 0, 1]), x, compiled=False)
    assert got.flatten().tolist() == [16 * (3 * 2 + 1 * 4) / 8, 16 * (1 * 2 + 3 * 4), 16 * (3 * 2 + 1 * 4) / 8]


@pytest.mark.parametrize(
    ("name", "why"),
    [("bf16", "with scales"), ("int4_g32_zp", "zero points"), ("fp8_block", "one row"), ("nvfp4_token", "global")],
)
def test_what_it_cannot_read_in_one_pass_is_refused(name: str, why: str) -> None:
    inputs = make_inputs(Case.parse(f"moe.{name}.t5.h256.i128.e6.k2.renormalize.swiglu.standard.real.s1"))
    with pytest.raises(ValueError, match=why):
        stack([inputs.down(0)])


def test_ragged_blocks_are_refused() -> None:
    assert "whole blocks" in (refuses(get("nvfp4"), (8, 40)) or "")
