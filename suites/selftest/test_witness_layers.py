"""Whole layers against transformers' MoE blocks on the CPU: routing, experts, biases, shared experts, weights on the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.compare import z_limit
from reference.activation import ACTIVATIONS
from reference.bounds import finalize_variance, middle_error, row_variance
from reference.experts import ExpertWeights, forward
from reference.moe import Experts, moe, passes
from reference.rounding import Rounding
from reference.routing import RULES, Routing, Rule

transformers = pytest.importorskip("transformers", reason="transformers is the witness of whole layers")

TOKENS, HIDDEN, INTER, EXPERTS, TOP_K = 40, 64, 48, 8, 2
FP32 = Rounding()


def randomized(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module in eval mode with every parameter and buffer drawn at std 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return module.eval()


def inputs(seed: int) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 + seed))


def concatenated(gate_up: Tensor, down: Tensor) -> ExpertWeights:
    """[gate; up] rows [2 * inter, hidden], as Mixtral, Qwen3 and DeepSeek store an expert."""
    gate, up = gate_up.double().chunk(2)
    return ExpertWeights(gate, up, down.double())


def expert(block: torch.nn.Module, e: int) -> tuple[Tensor, Tensor]:
    """(gate_up_proj, down_proj) of expert e."""
    return block.experts.gate_up_proj[e], block.experts.down_proj[e]


def mlp(block: torch.nn.Module) -> ExpertWeights:
    """A dense gated MLP module as an expert."""
    return ExpertWeights(*(getattr(block, f"{name}_proj").weight.double() for name in ("gate", "up", "down")))


def worst_ratio(got: Tensor, x: Tensor, routing: Routing, experts: Experts) -> float:
    """Largest |got - layer| in units of the derived limit of an fp32 implementation."""
    rows = torch.zeros(TOKENS * routing.ids.shape[1], HIDDEN, dtype=torch.float64)
    variances = torch.zeros_like(rows)
    for _, slots, done, weights in passes(x, routing, experts):
        rows[slots] = done.row
        variances[slots] = row_variance(done, weights, middle_error(done, weights, experts.activation, FP32), FP32)
    shape = (TOKENS, -1, HIDDEN)
    weights = torch.ones_like(routing.weights) if experts.weight_on_input else routing.weights
    variance = finalize_variance(rows.view(shape), variances.view(shape), weights, FP32)
    variance += (2.0**-22 * moe(x, routing, experts)).square()  # the routing weights are fp32 softmaxes or sigmoids
    if experts.shared is not None:
        done = forward(x.double(), experts.shared, experts.activation)
        variance += row_variance(done, experts.shared, middle_error(done, experts.shared, experts.activation, FP32), FP32)
    z = (got.double() - moe(x, routing, experts)).abs() / variance.sqrt()
    return float(z.max()) / z_limit(z.numel())


def same_choice(ids: Tensor, routing: Routing) -> bool:
    return torch.equal(ids.sort(-1).values, routing.ids.sort(-1).values)


def check(got: Tensor, x: Tensor, routing: Routing, experts: Experts) -> None:
    ratio = worst_ratio(got, x, routing, experts)
    assert 0 < ratio <= 1, f"{ratio:.3f} of the derived bound"
    swapped = Experts(experts.count, lambda e: _swapped(experts.weights(e)), experts.activation, experts.shared)
    assert worst_ratio(got, x, routing, swapped) > 100, "the bound must see a swap of gate and up"


def _swapped(w: ExpertWeights) -> ExpertWeights:
    assert w.up is not None
    return ExpertWeights(w.up, w.gate, w.down, w.up_bias, w.gate_bias, w.down_bias)


@pytest.mark.parametrize("seed", range(3))
def test_mixtral(seed: int) -> None:
    from transformers.models.mixtral import modeling_mixtral as modeling

    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    block = randomized(modeling.MixtralSparseMoeBlock(config), seed)
    x = inputs(seed)
    logits, _, ids = block.gate(x)
    routing = RULES["renormalize"](logits.detach(), None, TOP_K)
    assert same_choice(ids, routing)
    experts = Experts(
        EXPERTS, lambda e: concatenated(block.experts.gate_up_proj[e], block.experts.down_proj[e]), ACTIVATIONS["swiglu"]
    )
    with torch.no_grad():
        check(block(x[None])[0], x, routing, experts)


@pytest.mark.parametrize("normalized", [True, False])
def test_qwen3_moe(normalized: bool) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTER, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=normalized
    )
    block = randomized(modeling.Qwen3MoeSparseMoeBlock(config), 3)
    x = inputs(3)
    logits, _, ids = block.gate(x)
    routing = RULES["renormalize" if normalized else "default"](logits.detach(), None, 3)
    assert same_choice(ids, routing)
    experts = Experts(
        EXPERTS, lambda e: concatenated(block.experts.gate_up_proj[e], block.experts.down_proj[e]), ACTIVATIONS["swiglu"]
    )
    with torch.no_grad():
        check(block(x[None])[0], x, routing, experts)


@pytest.mark.parametrize("seed", range(3))
def test_deepseek_v3(seed: int) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INTER, n_routed_experts=16, num_local_experts=16, num_experts_per_tok=4,
        n_group=8, topk_group=4, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    block = randomized(modeling.DeepseekV3MoE(config), seed)
    x = inputs(seed)
    logits, _, ids = block.gate(x)
    rule: Rule = RULES["deepseek_v3"]
    routing = rule(logits.detach(), block.gate.e_score_correction_bias, 4)
    assert same_choice(ids, routing)
    experts = Experts(
        16,
        lambda e: concatenated(*expert(block, e)),
        ACTIVATIONS["swiglu"],
        shared=mlp(block.shared_experts),
    )
    with torch.no_grad():
        check(block(x[None])[0], x, routing, experts)


def fused(block: torch.nn.Module, shared: torch.nn.Module, experts: int) -> Experts:
    """The block's experts and its shared one behind them, none beside them."""
    return Experts(
        experts + 1, lambda e: concatenated(*expert(block, e)) if e < experts else mlp(shared), ACTIVATIONS["swiglu"]
    )


@pytest.mark.parametrize(("rule", "groups", "kept"), [("deepseek_v3", 8, 4), ("kimi_k2", 1, 1)])
def test_deepseek_v3_with_its_shared_expert_fused(rule: str, groups: int, kept: int) -> None:
    """One more slot of weight 1 is the shared MLP: the block's numbers, and those of our layer with the MLP beside it."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=INTER, n_routed_experts=16, num_local_experts=16, num_experts_per_tok=4,
        n_group=groups, topk_group=kept, n_shared_experts=1, routed_scaling_factor=RULES[rule].scale, norm_topk_prob=True,
    )  # fmt: skip
    block = randomized(modeling.DeepseekV3MoE(config), 5)
    x = inputs(5)
    logits, _, ids = block.gate(x)
    bias = block.gate.e_score_correction_bias
    routing = RULES[f"{rule}_shared"](logits.detach(), bias, 5)
    beside = RULES[rule](logits.detach(), bias, 4)
    assert same_choice(ids, beside)
    with torch.no_grad():
        experts = fused(block, block.shared_experts, 16)
        check(block(x[None])[0], x, routing, experts)
        alone = Experts(16, experts.weights, experts.activation, shared=experts.weights(16))
        assert torch.allclose(moe(x, routing, experts), moe(x, beside, alone), rtol=1e-12, atol=1e-12)


def test_hunyuan_with_its_shared_expert_fused() -> None:
    from transformers.models.hunyuan_v1_moe import modeling_hunyuan_v1_moe as modeling

    config = transformers.HunYuanMoEV1Config(hidden_size=HIDDEN, intermediate_size=INTER, num_experts=EXPERTS, moe_topk=TOP_K)
    block = randomized(modeling.HunYuanMoEV1Moe(config), 6)
    x = inputs(6)
    logits, _, ids = block.gate(x)
    routing = RULES["renormalize_shared"](logits.detach(), None, TOP_K + 1)
    assert same_choice(ids, RULES["renormalize"](logits.detach(), None, TOP_K))
    with torch.no_grad():
        check(block(x[None])[0], x, routing, fused(block, block.shared_mlp, EXPERTS))


@pytest.mark.parametrize("seed", range(3))
def test_gpt_oss(seed: int) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS, num_experts_per_tok=4
    )
    block = randomized(modeling.GptOssMLP(config), seed)
    x = 4 * inputs(seed)  # so that the clamp at 7 acts

    def weights(e: int) -> ExpertWeights:
        both, bias = block.experts.gate_up_proj[e].double().T, block.experts.gate_up_proj_bias[e].double()
        down, down_bias = block.experts.down_proj[e].double().T, block.experts.down_proj_bias[e].double()
        return ExpertWeights(both[::2], both[1::2], down, bias[::2], bias[1::2], down_bias)

    logits, _, ids = block.router(x)
    routing = RULES["renormalize"](logits.detach(), None, 4)
    assert same_choice(ids, routing)
    with torch.no_grad():
        experts = Experts(EXPERTS, weights, ACTIVATIONS["swiglu_oai"])
        check(block(x[None])[0][0], x, routing, experts)


@pytest.mark.parametrize("seed", range(3))
def test_llama4(seed: int) -> None:
    """One expert per token, sigmoid of its logit on the input, a shared expert beside it."""
    from transformers.models.llama4 import modeling_llama4 as modeling

    config = transformers.Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS, num_experts_per_tok=1
    )
    block = randomized(modeling.Llama4TextMoe(config), seed)
    x = inputs(seed)
    logits = torch.nn.functional.linear(x, block.router.weight).detach()
    chosen = RULES["default"](logits, None, 1)
    routing = Routing(chosen.ids, logits.double().sigmoid().gather(-1, chosen.ids), chosen.margin)

    def weights(e: int) -> ExpertWeights:
        return concatenated(block.experts.gate_up_proj[e].T, block.experts.down_proj[e].T)

    with torch.no_grad():
        experts = Experts(EXPERTS, weights, ACTIVATIONS["swiglu"], mlp(block.shared_expert), weight_on_input=True)
        got, _ = block(x)
        check(got, x, routing, experts)
