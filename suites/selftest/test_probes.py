"""The probe fills: bits are due, impostors are seen, and a wrong index names what was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import config, plan
from harness.backends.base import CPU
from harness.case import Case
from harness.checks import untrusted
from harness.compare import compare
from harness.diagnose import diagnose
from harness.errors import ConfigError
from harness.idcode import IdLayer
from harness.inputs import make_inputs
from harness.named import PROBES, named
from harness.oracle import Expected, expect, layer_experts
from harness.pipeline import Options, run
from harness.twins.aligned import AlignedMoe
from harness.verdict import Status
from harness.whatif import SATURATES
from reference.experts import ExpertWeights
from reference.moe import moe

SHAPE = "t17.h64.i32.e4.k2.renormalize.swiglu.standard"
RECIPES = ("bf16", "nvfp4", "mxfp4-fp16", "int4_g32", "fp8_block", "int8_channel")


def expected_of(text: str) -> Expected:
    case = Case.parse(text)
    return expect(case, make_inputs(case), SATURATES)


def said(expected: Expected, got: Tensor) -> str:
    comparison = compare(expected, got)
    assert not comparison.agrees
    return named(diagnose(expected, got, comparison), expected, got).text


def output(case: Case, wrong: Callable[[int, Callable[[int], ExpertWeights]], ExpertWeights]) -> Tensor:
    """The layer's output when expert e computes with wrong(e, right weights)."""
    inputs = make_inputs(case)
    experts = layer_experts(inputs)
    changed = replace(experts, weights=lambda e: wrong(e, experts.weights))
    return moe(inputs.x, inputs.routing, changed, SATURATES).to(torch.bfloat16)


@pytest.mark.parametrize("fill", PROBES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_probe_is_exact_and_sees_every_impostor(fill: str, recipe: str) -> None:
    case = Case.parse(f"moe.{recipe}.{SHAPE}.{fill}.s0")
    assert untrusted(case, expect(case, make_inputs(case), None)) is None
    assert run(case, AlignedMoe.backend(), CPU, options=Options(0)).status in (Status.PASSED, Status.UNSUPPORTED)


@pytest.mark.parametrize("shape", ["e16.k8.deepseek_v3.swiglu", "e33.k8.renormalize.geglu", "e1.k1.default.silu"])
@pytest.mark.parametrize("fill", PROBES)
def test_a_probe_is_exact_whatever_the_weights_of_the_slots(fill: str, shape: str) -> None:
    case = Case.parse(f"moe.mxfp4.t3.h96.i160.{shape}.standard.{fill}.s0")
    assert untrusted(case, expect(case, make_inputs(case), None)) is None


@pytest.mark.parametrize("fill", PROBES)
def test_tokens_have_one_column_each(fill: str) -> None:
    x = make_inputs(Case.parse(f"moe.bf16.{SHAPE}.{fill}.s0")).x[:, :-1]
    assert ((x != 0).sum(-1) == 1).all()
    assert len(x.nonzero()[:, 1].unique()) == len(x)


def test_codes_use_what_the_format_has() -> None:
    """E2M1 holds 1, 2, 3 and their doubles; bf16 four bits and more."""
    for recipe, largest in (("nvfp4", 3), ("int4_g32", 3), ("bf16", 15), ("fp8_block", 15)):
        layer = IdLayer(Case.parse(f"moe.{recipe}.{SHAPE}.idcode.s0"), "cpu")
        assert layer.largest == largest
        (up,) = layer.up([0])
        values = up.format.decode(up)[:, :-1]
        assert values.abs().unique().tolist() == list(range(1, largest + 1))


@pytest.mark.parametrize(("recipe", "tokens"), [("bf16", "t17"), ("nvfp4", "t33")])
def test_a_wrong_row_is_named(recipe: str, tokens: str) -> None:
    """A diagnosis that says "48 elements differ" leaves the index to be guessed. E2M1 has few codes: more tokens must tell."""
    case = Case.parse(f"moe.{recipe}.{SHAPE}.idcode.s0".replace("t17", tokens))

    def wrong(expert: int, right: Callable[[int], ExpertWeights]) -> ExpertWeights:
        own, other = right(expert), right(3)
        if expert != 2 or own.up is None or other.up is None:
            return own
        gate, up = own.gate.clone(), own.up.clone()
        gate[5], up[5] = other.gate[17], other.up[17]
        return replace(own, gate=gate, up=up)

    text = said(expected_of(case.id), output(case, wrong))
    assert "expert 3's row 17 of w13 was read where expert 2's row 5 was due" in text


@pytest.mark.parametrize("fill", PROBES)
def test_a_wrong_column_is_named(fill: str) -> None:
    case = Case.parse(f"moe.bf16.{SHAPE}.{fill}.s0")
    column = int(make_inputs(case).x[0, :-1].argmax())
    source = (column + 1) % 63

    def wrong(expert: int, right: Callable[[int], ExpertWeights]) -> ExpertWeights:
        own = right(expert)
        gate, up = own.gate.clone(), own.up.clone()  # type: ignore[union-attr]
        gate[:, column], up[:, column] = gate[:, source], up[:, source]
        return replace(own, gate=gate, up=up)

    text = said(expected_of(case.id), output(case, wrong))
    assert f"column {source} of w13 was read where column {column} was due" in text


@pytest.mark.parametrize("fill", PROBES)
def test_a_wrong_expert_is_named(fill: str) -> None:
    case = Case.parse(f"moe.bf16.{SHAPE}.{fill}.s0")
    text = said(expected_of(case.id), output(case, lambda e, right: right(0 if e == 1 else e)))
    assert "expert 0's weights were read where expert 1's were due" in text


def test_what_no_place_explains_is_not_named() -> None:
    case = Case.parse(f"moe.bf16.{SHAPE}.idcode.s0")
    expected = expected_of(case.id)
    got = expected.value.to(torch.bfloat16)
    got[0, :3] += 4
    assert "was read where" not in said(expected, got)


def test_tiers_have_probes_in_small_share() -> None:
    backends = {b.name: b for b in (AlignedMoe.backend(),)}
    items = plan.make(plan.Request("cpu", "ci"), backends, CPU).items
    probes = [i for i in items if Case.parse(i.case_id).fill in PROBES]
    assert 0 < len(probes) < len(items) / 5
    assert {Case.parse(i.case_id).fill for i in probes} == set(PROBES)
    assert not config.tier("smoke").probes


def test_an_unknown_probe_is_refused(tmp_path: object) -> None:
    with pytest.raises((ConfigError, ValueError), match="onehot"):
        config.Tier(name="t", strength=1, limit_s=1.0, probes=("onehott",))
