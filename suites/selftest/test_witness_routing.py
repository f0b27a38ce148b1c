"""Routing against implementations nobody here wrote: transformers' routers, ONNX Runtime's MoE node, torch.topk.

Equal where the margin is clear; within slack any choice is legal. What else differs stands in DIFFERENCES.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import differences
from reference.activation import ACTIVATIONS, LIBRARY_ORDERS, join_halves, split_halves
from reference.routing import RULES, Routing, Rule, hash_topk, legal, select

HIDDEN, EXPERTS, TOP_K = 24, 32, 4
CLEAR = 1e-5  # float32 routers disagree with float64 below a few ulp of scores up to 20
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "group_limited_greedy",
    "scoring_func": "sqrtsoftplus",
    "moe_norm_min": 1e-12,
    "vocab_size": 50,
}


@dataclass(frozen=True)
class Witness:
    """A router class of transformers and the rule it must equal; `keeps_16_bits`: its logits keep the dtype of x."""

    module: str
    router: str
    rule: Rule
    config: dict[str, Any] = field(default_factory=dict)
    keeps_16_bits: bool = False

    @property
    def name(self) -> str:
        return f"{self.router}-{self.rule.name}"


V3, GROUPS = {"n_group": 8, "topk_group": 4}, {"n_group": 8, "topk_group": 3}
UNGROUPED = {"groups": (1, 1)}
WITNESSES = (
    Witness("mixtral", "MixtralTopKRouter", RULES["renormalize"], keeps_16_bits=True),
    Witness("mixtral", "MixtralTopKRouter", RULES["renormalize_naive"], keeps_16_bits=True),
    Witness("qwen3_moe", "Qwen3MoeTopKRouter", RULES["renormalize_naive"], keeps_16_bits=True),
    Witness("qwen3_moe", "Qwen3MoeTopKRouter", RULES["default"], {"norm_topk_prob": False}, keeps_16_bits=True),
    Witness("gpt_oss", "GptOssTopKRouter", RULES["renormalize"], keeps_16_bits=True),
    Witness("llama4", "Llama4Router", RULES["llama4"], keeps_16_bits=True),
    Witness("kolibri1", "Kolibri1TopKRouter", RULES["topk_sigmoid"], {"norm_topk_prob": False}),
    Witness("flint", "FlintTopKRouter", RULES["sigmoid"], {"norm_topk_prob": False}),
    Witness("flint", "FlintTopKRouter", RULES["sigmoid_renorm"]),
    Witness("flint", "FlintTopKRouter", replace(RULES["grouped_sigmoid"], **UNGROUPED), {"norm_topk_prob": False}),
    Witness("flint", "FlintTopKRouter", replace(RULES["grouped_sigmoid_renorm"], **UNGROUPED)),
    Witness("minimax_m2", "MiniMaxM2TopKRouter", RULES["minimax2"]),
    Witness("deepseek_v3", "DeepseekV3TopkRouter", RULES["deepseek_v3"], {**V3, "routed_scaling_factor": 2.5}),
    Witness("deepseek_v3", "DeepseekV3TopkRouter", RULES["kimi_k2"], {"routed_scaling_factor": 2.827}),
    Witness("deepseek_v3", "DeepseekV3TopkRouter", RULES["grouped_sigmoid_bias_renorm"], V3),
    Witness("deepseek_v3", "DeepseekV3TopkRouter", RULES["grouped_sigmoid_bias"], {**V3, "norm_topk_prob": False}),
    Witness("deepseek_v2", "DeepseekV2TopkRouter", RULES["deepseek_v2"], {**GROUPS, "routed_scaling_factor": 16.0}),
    Witness("deepseek_v2", "DeepseekV2TopkRouter", RULES["grouped_softmax"], V3),
    Witness("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", replace(RULES["grouped_softmax_bias_renorm"], **UNGROUPED)),
    Witness("deepseek_v4", "DeepseekV4TopKRouter", RULES["deepseek_v4"], {"routed_scaling_factor": 1.5}),
)
UNWITNESSED = {  # rules whose parts are witnessed, but not their combination
    "topk": "torch.topk below",
    "grouped_softmax_renorm": "DeepSeek-V2's router never divides",
    "grouped_softmax_bias": "Ernie's router always divides",
    **{rule.name: "a router has no shared expert: test_witness_layers" for rule in RULES.values() if rule.shared},
}
each_witness = pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: w.name)


@cache
def transformers_class(module: str, name: str) -> type[torch.nn.Module]:
    pytest.importorskip("transformers", reason="wants transformers: pip install transformers==5.23.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name, None)
    if found is None:
        pytest.skip(f"this transformers has no {module}.{name}; 5.23.0 has")
    return found


def router(module: str, name: str, config: dict[str, Any]) -> torch.nn.Module:
    """The module with weights that spread logits over a few units."""
    made = transformers_class(module, name)(SimpleNamespace(**{**CONFIG, **config}))
    generator = torch.Generator().manual_seed(21)
    for parameter in (*made.parameters(), *made.buffers()):
        if parameter.is_floating_point():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return made


def bias_of(made: torch.nn.Module, rule: Rule) -> Tensor | None:
    """The module's correction bias, a random one where the caller passes it in; None and zero where the rule has none."""
    biases = [b for name, b in (*made.named_buffers(), *made.named_parameters()) if "correction_bias" in name]
    for bias in biases:
        bias.data.mul_(float(rule.biased))
    if not rule.biased:
        return None
    return biases[0].detach().flatten() if biases else torch.randn(EXPERTS, generator=torch.Generator().manual_seed(22)) / 4


def run(witness: Witness, x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(logits, bias, weights, ids) of the witness; `shift` is added to every bias."""
    made = router(witness.module, witness.router, witness.config).to(x.dtype)
    bias = bias_of(made, witness.rule)
    if bias is not None:
        bias += shift
    with torch.no_grad():
        out = made(x, bias) if witness.module == "minimax_m2" else made(x)
    if witness.module == "llama4":  # (dense scores, 0 where not selected; logits)
        dense, logits = out
        weights, ids = dense.topk(TOP_K, dim=-1)
        return logits, bias, weights, ids
    return out[0], bias, out[1], out[2]


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(23)).to(dtype)


def agree(ours: Routing, weights: Tensor, ids: Tensor, clear: float, rtol: float) -> None:
    """Equal sets and weights of every token whose margin is clear; most are."""
    sure = ours.margin > clear
    assert sure.double().mean() > 0.5
    ours_by_id, theirs_by_id = ours.ids.argsort(-1), ids.argsort(-1)
    assert torch.equal(ours.ids.gather(-1, ours_by_id)[sure], ids.gather(-1, theirs_by_id)[sure])
    wanted, got = ours.weights.gather(-1, ours_by_id), weights.double().gather(-1, theirs_by_id)
    assert torch.allclose(wanted[sure], got[sure], rtol=rtol, atol=1e-30)


@each_witness
def test_a_router_of_transformers_selects_and_weighs_as_the_rule(witness: Witness) -> None:
    logits, bias, weights, ids = run(witness, tokens())
    agree(witness.rule(logits, bias, TOP_K), weights, ids, CLEAR, rtol=1e-5)
    assert legal(witness.rule, logits, bias, ids, CLEAR).all()


@pytest.mark.parametrize("witness", [w for w in WITNESSES if w.rule.biased], ids=lambda w: w.name)
def test_biased_routers_agree_when_every_score_is_negative(witness: Witness) -> None:
    logits, bias, weights, ids = run(witness, tokens(), shift=-9.0)
    agree(witness.rule(logits, bias, TOP_K), weights, ids, CLEAR, rtol=1e-5)


@pytest.mark.parametrize("witness", [w for w in WITNESSES if w.keeps_16_bits], ids=lambda w: w.name)
def test_bf16_routers_tie_and_every_choice_is_legal(witness: Witness) -> None:
    """Their logits are bf16 and so often equal that a comparison of ids alone would fail; the weights come out in bf16."""
    logits, bias, weights, ids = run(witness, tokens(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    ours = witness.rule(logits, bias, TOP_K)
    assert (ours.margin == 0).any()
    agree(ours, weights, ids, clear=0.0 if witness.rule.slack.ulps else 1e-7, rtol=2.0**-7)
    assert legal(witness.rule, logits, bias, ids).all()


def test_every_rule_has_a_witness_or_a_reason() -> None:
    assert {w.rule.name for w in WITNESSES} | set(UNWITNESSED) == set(RULES)


def test_hash_routing_is_that_of_transformers() -> None:
    made = router("deepseek_v4", "DeepseekV4HashRouter", {"routed_scaling_factor": 2.5})
    generator = torch.Generator().manual_seed(24)
    made.tid2eid.copy_(torch.rand(50, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K])
    token_ids = torch.randint(0, 50, (200,), generator=generator)
    with torch.no_grad():
        logits, weights, ids = made(tokens(), token_ids)
    ours = hash_topk(logits, token_ids, made.tid2eid, scale=2.5)
    assert torch.equal(ours.ids, ids)
    assert torch.allclose(ours.weights, weights.double(), rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=40, unique=True),
    top_k=st.integers(1, 40),
)
def test_untied_rows_are_selected_as_torch_topk_does(row: list[float], top_k: int) -> None:
    scores, top_k = torch.tensor([row]), min(top_k, len(row))
    wanted = scores.topk(top_k, dim=-1)
    assert torch.equal(select(scores, top_k)[0], wanted.indices)
    assert torch.equal(RULES["topk"](scores, None, top_k).weights, wanted.values.double())


def test_nan_ranks_first_in_torch_too() -> None:
    scores = torch.tensor([[1.0, float("inf"), float("nan"), 2.0]])
    assert torch.equal(select(scores, 3)[0], scores.topk(3, dim=-1).indices)


def onnx_node(activation: str, **attributes: int) -> Callable[..., Tensor]:
    """com.microsoft.MoE as a function (x, logits, w1 [experts, rows, hidden], w2 [experts, hidden, inter])."""
    pytest.importorskip("onnx", reason="wants onnx: pip install 'moecheck[cpu]'")
    runtime = pytest.importorskip("onnxruntime", reason="wants onnxruntime: pip install 'moecheck[cpu]'")
    from onnx import TensorProto, helper

    names = ("x", "logits", "w1", "w2")
    node = helper.make_node(
        "MoE", ["x", "logits", "w1", "", "w2"], ["out"], domain="com.microsoft", activation_type=activation, **attributes
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "moe", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda *given: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})[0])


def onnx_weights(logits: Tensor, top_k: int, normalize: bool) -> Tensor:
    """[tokens, experts] float32: expert e passes x[:, 0] = 1 on to output e, so the output is the routing weights."""
    count, experts = logits.shape
    x = torch.zeros(count, experts)
    x[:, 0] = 1
    w1 = torch.zeros(experts, 1, experts)
    w1[:, :, 0] = 1
    node = onnx_node("identity", k=top_k, normalize_routing_weights=int(normalize))
    return node(x, logits, w1, torch.eye(experts)[..., None].contiguous())


@pytest.mark.parametrize("name", ["default", "renormalize"])
def test_onnxruntime_routes_as_the_rule(name: str) -> None:
    logits = torch.randn(200, EXPERTS, generator=torch.Generator().manual_seed(25)) * 3
    dense = onnx_weights(logits, TOP_K, name == "renormalize")
    weights, ids = dense.topk(TOP_K, dim=-1)
    agree(RULES[name](logits, None, TOP_K), weights, ids, CLEAR, rtol=1e-5)
    assert (dense > 0).sum(-1).eq(TOP_K).all()
    assert legal(RULES[name], logits, None, ids).all()


def test_onnxruntime_takes_the_halves_in_the_order_of_the_table() -> None:
    """swiglu_fusion 1; the CPU kernel refuses 2."""
    gate, up = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, -3.0, 4.0])
    rows = join_halves(gate, up, LIBRARY_ORDERS["onnxruntime"].order)
    w1 = torch.zeros(1, 6, 3)
    w1[0, :, 0] = rows
    node = onnx_node("swiglu", k=1, normalize_routing_weights=1, swiglu_fusion=1)
    got = node(torch.tensor([[1.0, 0, 0]]), torch.zeros(1, 1), w1, torch.eye(3)[None])
    assert torch.allclose(got[0], ACTIVATIONS["swiglu"].combine(gate, up), atol=1e-6)


def test_gpt_oss_splits_and_activates_as_the_table_says() -> None:
    experts = transformers_class("gpt_oss", "GptOssExperts")
    made = experts(SimpleNamespace(**CONFIG, intermediate_size=4, swiglu_alpha=1.702, swiglu_limit=7.0))
    both = torch.randn(50, 8, generator=torch.Generator().manual_seed(26)).double() * 6
    gate, up = split_halves(both, LIBRARY_ORDERS["transformers.gpt_oss"].order)
    assert torch.allclose(made._apply_gate(both), ACTIVATIONS["swiglu_oai"].combine(gate, up), rtol=1e-12)


NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Difference:
    """Where a witness and our rule part: theirs and ours are the routing weights by expert, dense, for `logits`."""

    rule: str
    theirs: Callable[[Tensor], Tensor]
    logits: list[float]
    wanted_theirs: list[float]
    wanted_ours: list[float]


def by_router(module: str, name: str, **config: Any) -> Callable[[Tensor], Tensor]:
    """Dense weights of a router fed with the logits themselves: its matrix is the identity, its bias zero."""

    def dense(logits: Tensor) -> Tensor:
        size = logits.shape[-1]
        sizes = {"hidden_size": size, "num_experts": size, "num_local_experts": size, "num_experts_per_tok": 2}
        made = router(module, name, {**sizes, **config})
        for parameter in (*made.parameters(), *made.buffers()):
            parameter.data.zero_()
        made.weight.data.copy_(torch.eye(size))
        with torch.no_grad():
            out = made(logits, torch.zeros(size)) if module == "minimax_m2" else made(logits)
        return torch.zeros(size).scatter(0, out[2][0], out[1][0])

    return dense


def by_onnx(normalize: bool) -> Callable[[Tensor], Tensor]:
    return lambda logits: onnx_weights(logits, 2, normalize)[0]


DIFFERENCES = {
    "a softmax taken first underflows in float32, and the next best expert is lost": Difference(
        "renormalize",
        lambda logits: (by_router("mixtral", "MixtralTopKRouter")(logits) > 0).float(),
        [0.0, -200.0, -150.0, -300.0],
        [1, 0, 0, 0],
        [1, 0, 7.175e-66, 0],
    ),
    "without the guard of 1e-20 sigmoids that vanish give 0 / 0": Difference(
        "minimax2", by_router("minimax_m2", "MiniMaxM2TopKRouter"), [-800.0] * 2, [NAN] * 2, [0.0] * 2
    ),
    "onnxruntime gives equal logits to the higher index": Difference(
        "renormalize", by_onnx(True), [0.0] * 4, [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]
    ),
    "onnxruntime turns a NaN logit into weights of zero": Difference(
        "renormalize", by_onnx(True), [1.0, NAN, 3.0, 2.0], [0, 0, 0, 0], [0, NAN, NAN, 0]
    ),
    "onnxruntime turns an infinite logit into weights of zero": Difference(
        "default", by_onnx(False), [INF, 0.0, 1.0, 0.0], [0, 0, 0, 0], [NAN, NAN, 0, 0]
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_differences_are_as_the_table_says(difference: Difference) -> None:
    """A later version that mends or moves one must change the table."""
    logits, rule = torch.tensor([difference.logits]), RULES[difference.rule]
    routing = rule(logits, torch.zeros(logits.shape[-1]) if rule.biased else None, 2)
    ours = torch.zeros(logits.shape[-1], dtype=torch.float64).scatter(0, routing.ids[0], routing.weights[0])
    for got, wanted in ((ours, difference.wanted_ours), (difference.theirs(logits).double(), difference.wanted_theirs)):
        assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-3, atol=1e-300, equal_nan=True)


def test_the_documented_differences_are_these() -> None:
    assert [(d.rule, text) for text, d in DIFFERENCES.items()] == list(differences.ROUTING)
