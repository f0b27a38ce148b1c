"""vllm#39315: in FlashInfer 0.6.5 `do_finalize` was inserted before `enable_pdl`, and trtllm_mxint4_block_scale_moe began to
return a list (flashinfer#2548). Callers of both times over twins of both releases, at the size that was served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from harness.backends import with_twins
from harness.backends._trtllm import Library, layer_arguments, routing_arguments, step_buffers
from harness.backends._trtllm_packs import mxint4
from harness.backends.base import CPU, Backend, Launch
from harness.backends.flashinfer_trtllm import BACKENDS
from harness.case import Case
from harness.entry import planted, resolve, twins
from harness.inputs import Inputs, make_inputs
from harness.oracle import expect
from harness.pipeline import Options, OracleCache, run
from harness.twins.libs._signature import Function, signed
from harness.twins.libs.flashinfer_enums import ENUMS
from harness.variants import Handed
from harness.verdict import Status

ENTRY = "flashinfer.fused_moe.trtllm_mxint4_block_scale_moe"
BEFORE = """routing_logits, routing_bias, hidden_states, gemm1_weights, gemm1_weights_scale, gemm1_alpha, gemm1_beta,
gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, num_experts, top_k, n_group, topk_group, intermediate_size,
local_expert_offset, local_num_experts, routed_scaling_factor, routing_method_type=0, enable_pdl=None, output=None,
tune_max_num_tokens=8192"""  # flashinfer-python 0.6.4, flashinfer/fused_moe/core.py


def _release_0_6_4() -> Function:
    now = twins()[ENTRY]

    def trtllm_mxint4_block_scale_moe(a: SimpleNamespace) -> Tensor:
        """0.6.4: no `do_finalize`, and the layer comes back bare, whatever the annotation says."""
        return now(**vars(a))[0]

    return signed(BEFORE, ENUMS)(trtllm_mxint4_block_scale_moe)


RELEASES = {"0.6.4": _release_0_6_4(), "0.7.2.post1": twins()[ENTRY]}
POSITIONS = [name.split("=")[0].strip() for name in BEFORE.split(",")][:19]  # up to routing_method_type


def bare(function: Function, a: dict[str, Any]) -> Any:
    """Written for 0.6.4: the result is the layer."""
    return function(**a)


def listed(function: Function, a: dict[str, Any]) -> Any:
    """Written for 0.6.5: the result is a list of one."""
    return function(**a)[0]


def positional(function: Function, a: dict[str, Any]) -> Any:
    """Written for 0.6.4 without names; the last argument is enable_pdl."""
    return function(*(a[name] for name in POSITIONS), False)


def _caller(style: Callable[[Function, dict[str, Any]], Any]) -> Callable[[Case, Inputs], Launch]:
    def prepare(case: Case, inputs: Inputs) -> Launch:
        function, packed, buffers = resolve(ENTRY, inputs.device), mxint4(case, inputs), step_buffers(inputs, routed=False)
        fixed = layer_arguments(Library(inputs.device), case, inputs.local, routed=False)
        arguments = {
            **routing_arguments(buffers, routed=False),
            "hidden_states": buffers["x"],
            **packed.weights,
            **packed.fixed,
        }
        return Launch(lambda: style(function, {**arguments, **fixed}), {**buffers, **packed.weights})

    return prepare


FIXED = next(b for b in with_twins(BACKENDS) if b.name == "flashinfer_trtllm_mxint4_twin")
CALLERS = {"by_contract": FIXED.prepare, **{style.__name__: _caller(style) for style in (bare, listed, positional)}}


def subject(caller: str, release: str) -> Backend:
    """`caller` over the twin of `release`."""
    backend = replace(FIXED, name=caller, prepare=CALLERS[caller])
    return planted(backend, f"{caller}_on_{release.replace('.', '_')}", {ENTRY: RELEASES[release]})


HELD = 9  # experts of the rank: more than top_k


@cache
def served(tokens: int) -> OracleCache:
    """What is asked: the rank with the layer's first experts, and tokens that choose among those, so that the answer is a
    whole layer and fits a laptop. Its wrong twins (impostors) are those of small cases."""
    case = Case.parse(SERVED.format(tokens))
    inputs = make_inputs(case)
    order = inputs.logits[:, :HELD].argsort(dim=-1, descending=True).argsort(dim=-1)
    inputs.logits[:, :HELD] = 3 - order / 4
    inputs.logits[:, HELD:] -= 8  # below those: none was above 3 times a spread of 1.375
    given = {f.name: getattr(inputs, f.name) for f in fields(Inputs)}
    held = Handed(**given, handed=inputs.routing, local=range(HELD))
    rounding = FIXED.rounding(case)
    return OracleCache((case.id, CPU.kind), held, {rounding: expect(case, held, rounding, guard=False)})


SMALL = "moe.mxint4.t1.h256.i256.e16.k8.kimi_k2.swiglu.standard.real.s0"
SERVED = "moe.mxint4.t{}.h7168.i512.e384.k8.kimi_k2.swiglu.standard.real.s0"
OLD, NEW = RELEASES
ROWS = (
    ("by_contract", OLD, Status.PASSED, ""),
    ("by_contract", NEW, Status.PASSED, ""),
    ("bare", OLD, Status.PASSED, ""),
    ("bare", NEW, Status.MALFORMED, "returned list, wanted a tensor"),
    ("listed", OLD, Status.MALFORMED, "returned shape (256,), wanted (1, 256)"),
    ("listed", NEW, Status.PASSED, ""),
    ("positional", OLD, Status.PASSED, ""),
    ("positional", NEW, Status.MALFORMED, "returned list, wanted a tensor"),
)


@pytest.mark.parametrize(("caller", "release", "status", "says"), ROWS)
def test_39315_a_caller_meets_a_release(caller: str, release: str, status: Status, says: str) -> None:
    verdict = run(Case.parse(SMALL), subject(caller, release), CPU, options=Options(checks=0))
    assert verdict.status is status, verdict.reason
    assert says in verdict.reason


@pytest.mark.parametrize(
    ("tokens", "caller", "release", "status", "says"),
    [
        (1, "by_contract", OLD, Status.PASSED, ""),
        (33, "by_contract", NEW, Status.PASSED, ""),
        (1, "listed", OLD, Status.MALFORMED, "returned shape (7168,), wanted (1, 7168)"),
        (33, "positional", NEW, Status.MALFORMED, "returned list, wanted a tensor"),
    ],
)
def test_39315_at_the_size_that_was_served(tokens: int, caller: str, release: str, status: Status, says: str) -> None:
    known = served(tokens)
    mine = OracleCache(known.key, known.inputs, dict(known.expected))
    verdict = run(Case.parse(SERVED.format(tokens)), subject(caller, release), CPU, cache=mine, options=Options(checks=0))
    assert verdict.status is status, verdict.reason
    assert says in verdict.reason


def test_39315_asking_an_old_release_not_to_finalize_says_so() -> None:
    case = Case.parse(SMALL)
    launch = subject("by_contract", OLD).prepare(case, make_inputs(case))
    with pytest.raises(TypeError, match="unexpected keyword argument 'do_finalize'"):
        launch.tactics["unfinalized"]()
