"""num_fused_shared_experts of FlashInfer's trtllm_*_moe: the adapter, what the library refuses, and defects that show."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import with_twins
from harness.backends._flashinfer import accepting
from harness.backends.base import CPU, Device
from harness.backends.flashinfer_trtllm import BACKENDS
from harness.case import Case
from harness.dump.trtllm import read_trtllm
from harness.entry import planting, twins
from harness.inputs import make_inputs
from harness.pipeline import Options, run
from harness.twins.libs import _trtllm_routing
from harness.verdict import Status, Verdict

SUBJECTS = {b.name: b for b in with_twins(BACKENDS) if "_shared" in b.name}
RECIPES = {
    "fp8_block-fp8_group": "fp8_block",
    "mxfp8-mxfp8": "fp8_block",
    "nvfp4-nvfp4": "fp4",
    "mxfp4-mxfp8": "fp4",
    "mxfp4": "fp4",
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def case_of(recipe: str, top_k: int = 3, **axes: int | str) -> Case:
    case = Case.parse(f"moe.{recipe}.t9.h128.i128.e17.k{top_k}.deepseek_v3_shared.swiglu.standard.exact.s0")
    return case.vary(**axes)


def judged(case: Case, checks: int | None = 0) -> Verdict:
    subject = SUBJECTS[f"flashinfer_trtllm_{RECIPES[str(case.recipe)]}_shared_twin"]
    assert subject.supports(case, CPU).ok
    return run(case, subject, CPU, options=Options(checks=checks))


def called(case: Case) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(the twin, the arguments of the adapter's call)."""
    subject = SUBJECTS[f"flashinfer_trtllm_{RECIPES[str(case.recipe)]}_shared_twin"]
    calls: list[dict[str, Any]] = []

    def spy(**named: Any) -> Any:
        calls.append(named)
        return twins()[subject.entries[0]](**named)

    with planting({subject.entries[0]: spy}):
        subject.prepare(case, make_inputs(case)).call()
    return twins()[subject.entries[0]], calls[0]


@pytest.mark.parametrize("recipe", ["fp8_block-fp8_group", "nvfp4-nvfp4"])
def test_a_case_passes_with_all_relations(recipe: str) -> None:
    verdict = judged(case_of(recipe), None)
    assert verdict.status is Status.PASSED, verdict.reason


@each_recipe
def test_every_recipe_passes(recipe: str) -> None:
    verdict = judged(case_of(recipe))
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize("top_k", [2, 5, 9])
def test_a_shared_slot_passes_beside_one_routed_slot_and_many(top_k: int) -> None:
    verdict = judged(case_of("mxfp8-mxfp8", top_k, experts=33))
    assert verdict.status is Status.PASSED, verdict.reason


@each_recipe
def test_the_library_is_told_of_routed_experts_only(recipe: str) -> None:
    """RoutingConfig and the launcher count routed experts; tensors per expert have a row more."""
    _, named = called(case_of(recipe))
    told = (named["num_experts"], named["local_num_experts"], named["top_k"], named["num_fused_shared_experts"])
    assert told == (16, 16, 2, 1)
    assert named["routing_logits"].shape == (9, 16)
    assert named["routing_bias"].shape == (16,)
    assert named["gemm1_weights"].shape[0] == named["gemm2_weights"].shape[0] == 17


def test_what_is_left_to_the_caller_covers_the_shared_slot() -> None:
    function, named = called(case_of("mxfp8-mxfp8"))
    replay = torch.full((9, 2), -7, dtype=torch.int16)
    _, weights, index = function(**named, do_finalize=False, routing_replay_out=replay)
    assert weights.shape == (9, 3)
    assert (weights[:, 2] == 1).all()
    assert torch.equal(weights[:, :2], torch.full((9, 2), 1.25, dtype=torch.bfloat16))
    assert (index.view(9, 3) >= 0).all()
    assert ((replay >= 0) & (replay < 16)).all()


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        ({"local_expert_offset": 8, "local_num_experts": 8}, ValueError, "do not yet support expert parallelism"),
        ({"routing_method_type": 1, "routing_bias": None}, ValueError, "only supported with DeepSeekV3"),
        ({"n_group": 1, "topk_group": 1}, RuntimeError, "no-groups routing path does not support"),
        ({"num_fused_shared_experts": 2}, RuntimeError, "incorrect shape|too small"),
        ({"routing_replay_out": torch.zeros(9, 3, dtype=torch.int16)}, ValueError, "routing_replay_out"),
    ],
)
@pytest.mark.parametrize("recipe", ["fp8_block-fp8_group", "mxfp4"])
def test_the_library_refuses(recipe: str, other: dict[str, Any], error: type[Exception], words: str) -> None:
    function, named = called(case_of(recipe))
    with pytest.raises(error, match=words):
        function(**{**named, **other})


def test_a_recorded_call_with_a_shared_expert_is_not_read() -> None:
    _, named = called(case_of("mxfp4"))
    with pytest.raises(NotImplementedError, match="num_fused_shared_experts"):
        read_trtllm("trtllm_fp4_block_scale_moe", named)


def test_a_routed_form_is_handed_the_shared_slot_like_any_other() -> None:
    routed = {b.name: b for b in with_twins(BACKENDS)}["flashinfer_trtllm_mxint4_routed_twin"]
    case = Case.parse("moe.mxint4.t9.h256.i256.e9.k3.kimi_k2_shared.swiglu.standard.real.s0")
    assert run(case, routed, CPU, options=Options(checks=0)).status is Status.PASSED


def scaled(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The routed scaling factor multiplies the shared expert too."""
    ids, weights = RIGHT(a, ids, weights)
    weights[:, a.top_k :] *= a.routed_scaling_factor
    return ids, weights


def dropped(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The slot is there and adds nothing."""
    ids, weights = RIGHT(a, ids, weights)
    weights[:, a.top_k :] = 0
    return ids, weights


def renormalised(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum by which routed weights are divided counts the shared slot."""
    ids, weights = RIGHT(a, ids, weights)
    return ids, torch.cat((weights[:, : a.top_k] * a.top_k / (a.top_k + 1), weights[:, a.top_k :]), 1)


def first_expert(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The shared experts are looked for in front of the routed ones."""
    ids, weights = RIGHT(a, ids, weights)
    return (ids + 1) % (a.num_experts + 1), weights


def swapped_away(a: SimpleNamespace, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The shared expert takes the last routed slot, as if top_k counted it, and the slot behind is empty."""
    ids, weights = RIGHT(a, ids, weights)
    ids[:, a.top_k - 1], weights[:, a.top_k - 1], weights[:, a.top_k] = a.num_experts, 1.0, 0.0
    return ids, weights


RIGHT = _trtllm_routing._fused
DEFECTS = {  # and what each is called
    scaled: "constant_factor",
    dropped: "missing_expert",
    renormalised: "constant_factor",
    first_expert: "expert_permutation",
    swapped_away: "missing_slot",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("recipe", ["fp8_block-fp8_group", "nvfp4-nvfp4"])
def test_a_shared_expert_that_counts_wrongly_is_found(
    monkeypatch: pytest.MonkeyPatch, recipe: str, defect: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    monkeypatch.setattr(_trtllm_routing, "_fused", defect)
    verdict = judged(case_of(recipe, tokens=33))
    assert verdict.status is Status.WRONG
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.kind == DEFECTS[defect]


def test_a_release_without_the_parameter_is_unavailable() -> None:
    gpu = Device("cuda", "sm100")
    assert accepting("json.dumps", "indent", "json.dumps", "json.loads")(gpu).ok
    refused = accepting("json.dumps", "num_fused_shared_experts", "json.dumps")(gpu)
    assert (refused.kind, "has no num_fused_shared_experts" in refused.reason) == ("library", True)
    assert not accepting("json.dumps", "indent", "json.dumps", "json.no_such")(gpu).ok


def test_shared_forms_promise_no_expert_parallelism() -> None:
    assert SUBJECTS
    assert not any(b.expert_parallel for b in SUBJECTS.values())
    assert {b.routings for b in SUBJECTS.values()} == {("deepseek_v3_shared",)}
