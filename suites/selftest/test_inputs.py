"""Case -> Inputs: reproducible, pinned, of the promised magnitudes, exact where promised."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import fills
from harness import inputs as inputs_module
from harness.case import Case
from harness.inputs import Inputs, make_inputs
from harness.oracle import expect, layer_experts
from reference.activation import ACTIVATIONS, SATURATED
from reference.format import Quantized
from reference.formats import all_formats, get
from reference.moe import moe, passes
from reference.rounding import Rounding
from reference.routing import RULES

BF16_EVERYWHERE = Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16")
PINNED: dict[str, tuple[str, str, str]] = {
    "moe.nvfp4.t5.h64.i32.e8.k2.renormalize.swiglu.standard.real.s0": (
        "af12c30a49a2",
        "99796401e09b",
        "1c1cc5d28cf9",
    ),
    "moe.bf16.t3.h40.i24.e16.k2.deepseek_v3.geglu.standard.exact.s7": (
        "008aa2b87ccd",
        "b629d2cc059c",
        "03dd24c23776",
    ),
    "moe.mxfp4-fp16.t4.h96.i64.e4.k1.default.relu.standard.real.hot.s1": (
        "3931b4abfb02",
        "348ae5f2f4d8",
        "54bc6366a787",
    ),
}
EXACT_SHAPES = [
    "moe.bf16.t65.h7168.i256.e16.k8.renormalize",
    "moe.nvfp4.t33.h256.i128.e64.k8.renormalize",
    "moe.mxfp4.t65.h2880.i96.e8.k4.renormalize",
    "moe.int4_channel.t128.h512.i512.e8.k1.renormalize",
    "moe.fp8_tensor.t65.h64.i32.e4.k2.default",
    "moe.fp16.t5.h7.i3.e1.k1.renormalize",
    "moe.nvfp4.t33.h256.i128.e32.k8.deepseek_v3",
    "moe.bf16.t65.h512.i256.e16.k4.deepseek_v3",
    "moe.bf16.t33.h1024.i256.e16.k1.deepseek_v3",
]
each_weight = pytest.mark.parametrize("weights", sorted(all_formats()))


def case(text: str) -> Case:
    return Case.parse(text)


def small(weights: str = "bf16", fill: str = "real", routing: str = "renormalize", skew: str = "", tokens: int = 64) -> Case:
    tail = f".{skew}" if skew else ""
    return case(f"moe.{weights}.t{tokens}.h128.i64.e16.k2.{routing}.swiglu.standard.{fill}{tail}.s3")


def bytes_of(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        if t is not None:
            digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def matrices(inputs: Inputs, expert: int) -> list[Quantized]:
    gate, up = inputs.gate_up(expert)
    return [gate, *([] if up is None else [up]), inputs.down(expert)]


def digests(inputs: Inputs) -> tuple[str, str, str]:
    """x, logits and bias, and all that is stored of expert 1."""
    stored = [t for q in matrices(inputs, 1) for t in (q.codes, q.scales, q.global_scale) if t is not None]
    return bytes_of(inputs.x), bytes_of(inputs.logits, inputs.bias), bytes_of(*[t.reshape(-1) for t in stored])


@pytest.mark.parametrize("text", PINNED)
def test_bytes_of_a_case_never_change(text: str) -> None:
    assert digests(make_inputs(case(text))) == PINNED[text]


@each_weight
@pytest.mark.parametrize("fill", ["real", "exact"])
def test_the_same_case_twice_gives_the_same_bytes(weights: str, fill: str) -> None:
    """In any order of asking: expert 1 first or last."""
    first, second = make_inputs(small(weights, fill)), make_inputs(small(weights, fill))
    second.down(5)
    assert digests(first) == digests(second)


def test_every_seed_and_expert_and_fill_is_its_own_draw() -> None:
    """Equal experts would make a kernel that mixes them up look right."""
    made = make_inputs(small())
    other = make_inputs(replace(small(), seed=4))
    seen = [bytes_of(q.codes) for i in (made, other) for e in (0, 1) for q in matrices(i, e)]
    assert len(set(seen)) == len(seen)


def test_a_variant_draws_another_x_only() -> None:
    one, two = make_inputs(small()), make_inputs(small(), variant="/previous")
    assert not torch.equal(one.x, two.x)
    assert torch.equal(one.down(0).codes, two.down(0).codes)


@each_weight
def test_real_fills_have_the_promised_magnitudes(weights: str) -> None:
    """Below a gate std of 1, silu(g) * u is nearly g * u / 2 and a swap of gate and up goes unseen."""
    inputs = make_inputs(case(f"moe.{weights}.t64.h1024.i256.e8.k2.renormalize.swiglu.standard.real.s0"))
    gate = torch.cat([done.gate for _, _, done, _ in passes(inputs.x, inputs.routing, layer_experts(inputs))])
    output = moe(inputs.x, inputs.routing, layer_experts(inputs))
    assert 1 < float(gate.std()) < 3
    assert 0.3 < float(output.square().mean().sqrt()) < 6


@each_weight
def test_real_fills_use_both_signs_and_no_specials(weights: str) -> None:
    values = get(weights).decode(make_inputs(small(weights)).down(0))
    assert values.isfinite().all()
    assert 0.4 < float((values < 0).double().mean()) < 0.6


@each_weight
def test_exact_fills_hold_zero_and_one_magnitude_only(weights: str) -> None:
    fmt, inputs = get(weights), make_inputs(small(weights, "exact"))
    gate, up, down = (fmt.decode(q) for q in matrices(inputs, 2))
    assert set(gate.unique().tolist()) == {0.0, SATURATED}
    assert set(up.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert set(down.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_exact_tokens_hold_ones_and_twos() -> None:
    assert set(make_inputs(small(fill="exact")).x.unique().tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("fill", ["real", "exact"])
@pytest.mark.parametrize("weights", [f.name for f in all_formats().values() if f.scaling])
def test_scales_differ_between_blocks(weights: str, fill: str) -> None:
    """With one scale everywhere a kernel that reads the neighbour's looks right. Whole-tensor scales differ by expert."""
    inputs = make_inputs(small(weights, fill))
    seen = torch.cat([get(weights).scale_values(inputs.down(e)).flatten() for e in range(8)])
    assert len(seen.unique()) >= 2


@pytest.mark.parametrize("routing", sorted(RULES))
def test_no_routing_choice_is_nearly_tied(routing: str) -> None:
    """Neighbouring logits are 1/32 apart; what is left after sigmoid or softmax and a bias must stay above a fast-math
    kernel's 3e-4 for nearly all tokens, except of a softmax over many."""
    shared = RULES[routing].shared
    inputs = make_inputs(small().vary(routing=routing, experts=16 + shared, top_k=2 + shared))
    near = (inputs.routing.margin < 3e-4).double().mean()
    assert near < (0.05 if RULES[routing].biased else 1e-9)


@pytest.mark.parametrize("routing", ["renormalize", "deepseek_v3", "default"])
def test_exact_routing_weights_are_equal_shares(routing: str) -> None:
    weights = make_inputs(small(fill="exact", routing=routing)).routing.weights
    assert torch.equal(weights, torch.full_like(weights, RULES[routing].scale / 2))


def test_half_leaves_the_upper_experts_idle() -> None:
    assert int(make_inputs(small(skew="half")).topk_ids.max()) < 8


@pytest.mark.parametrize(
    ("fill", "routing"), [("real", "renormalize"), ("real", "deepseek_v3"), ("exact", "renormalize"), ("exact", "deepseek_v3")]
)
def test_hot_sends_every_token_to_one_expert(fill: str, routing: str) -> None:
    ids = make_inputs(small(fill=fill, routing=routing, skew="hot")).topk_ids
    assert (ids == 3).any(-1).all()


def test_uniform_reaches_every_expert() -> None:
    assert set(make_inputs(small(tokens=200)).topk_ids.flatten().tolist()) == set(range(16))


def test_no_tokens_are_a_case_too() -> None:
    inputs = make_inputs(small(tokens=0))
    assert inputs.x.shape == (0, 128)
    assert inputs.topk_ids.shape == (0, 2)


@pytest.mark.parametrize("shape", EXACT_SHAPES)
def test_exact_cases_are_exact(shape: str) -> None:
    """Every rounding point of a bf16 kernel is a fixed point, so bits must agree and no tolerance is needed."""
    made = case(f"{shape}.swiglu.standard.exact.s0")
    expected = expect(made, make_inputs(made), BF16_EVERYWHERE)
    assert expected.reason == ""
    assert expected.exact


@pytest.mark.parametrize("activation", [a.name for a in ACTIVATIONS.values() if a.exact])
def test_exact_cases_are_exact_with_every_saturating_activation(activation: str) -> None:
    made = case(f"moe.bf16.t33.h128.i128.e8.k4.renormalize.{activation}.standard.exact.s0")
    assert expect(made, make_inputs(made), BF16_EVERYWHERE).exact


@pytest.mark.parametrize("shape", EXACT_SHAPES[:4])
def test_exact_outputs_are_dense(shape: str) -> None:
    """All zeros would be exact as well."""
    made = case(f"{shape}.swiglu.standard.exact.s0".replace("h7168", "h512"))
    assert float((expect(made, make_inputs(made), BF16_EVERYWHERE).value != 0).double().mean()) > 0.4


def test_weights_are_drawn_once_and_every_asker_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does to the weights it was handed must not reach the oracle of the next relation."""
    inputs = make_inputs(Case.parse("moe.mxfp4.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"))
    draws: list[Any] = []
    real = fills.real_all

    def counted(*args: Any) -> list[Quantized]:
        draws.append(args)
        return real(*args)

    monkeypatch.setattr(fills, "real_all", counted)
    first = inputs.down(1)
    kept = first.codes.clone()
    first.codes.zero_()
    assert torch.equal(replace(inputs, x=inputs.x + 1).down(1).codes, kept)
    assert len(draws) == 1


def test_weights_beyond_the_budget_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A served layer would fill the memory."""
    monkeypatch.setattr(inputs_module, "DRAWN_BYTES", 0)
    inputs = make_inputs(Case.parse("moe.mxfp4.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"))
    assert torch.equal(inputs.down(1).codes, inputs.down(1).codes)
    assert not inputs.drawn.kept
