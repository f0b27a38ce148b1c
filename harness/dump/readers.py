"""Which recorded calls can be read, how, and what a call of each leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backends import flashinfer_b12x, flashinfer_cute_sm90, flashinfer_cutedsl, flashinfer_cutlass
from harness.backends._trtllm import MOE, finalized
from harness.backends.flashinfer_activation import FUNCTIONS
from harness.backends.flashinfer_routing import ENTRY as ROUTER
from harness.dump import ops, trtllm
from harness.dump.cutedsl import read_b12x, read_cutedsl, read_sm90
from harness.dump.cutlass import read_cutlass
from harness.dump.layer import Call, Layer
from harness.dump.read import Dump, DumpError
from harness.guard import Argument
from harness.reading import printable

Arguments = Mapping[str, Any]
Outcome = Callable[[Arguments, Mapping[str, Tensor], tuple[Tensor, ...]], Tensor]
RELEASE = "0.7.2.post1"  # that the twins follow
# The largest number that has had one meaning since 0.6.8: tllm_enums.py of 0.6.8.post1 .. 0.7.2.post1
NUMBERS = {"activation_type": 6, "routing_method_type": 7}
ONE_GEMM = "one step of a layer in slabs: its inputs are no layer's, and no op here is that step"
UNREAD = {
    "scaled_fp4_grouped_quantize": ONE_GEMM,
    "silu_and_mul_scaled_nvfp4_experts_quantize": ONE_GEMM,
    "grouped_gemm_nt_masked": ONE_GEMM,
}
MAX_TEXT = 500  # characters of somebody's error in ours
# what twins raise, and what reading buffers of other shapes does
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, ArithmeticError)
STEP = (
    Argument("token_selected_experts", torch.int32, ("tokens", "top_k"), contiguous=True),
    Argument("token_final_scales", torch.float32, ("tokens", "top_k"), contiguous=True),
)
# one input scale of each expert is as good as one of all
B12X = tuple(a for a in flashinfer_b12x.CONTRACT if a.name not in ("fc2_input_scale", "input_global_scale"))


def first(arguments: Arguments, written: Mapping[str, Tensor], result: tuple[Tensor, ...]) -> Tensor:
    """The tensor that came back, or the first of several."""
    return result[0]


@dataclass(frozen=True)
class Reader:
    """How calls of one function are read. entry: its dotted name; read(arguments): what it computes; archs: where it runs, all
    if empty; written: the parameters that it writes to, the caller's output first; outcome(arguments, written, result): the
    tensor that the case promises; contract: of its tensors, by parameter."""

    entry: str
    read: Callable[[Arguments], Call]
    archs: tuple[str, ...] = ()
    written: tuple[str, ...] = ("output",)
    outcome: Outcome = first
    contract: tuple[Argument, ...] = ()


def _trtllm(name: str) -> Reader:
    tensors = ("hidden_states", "gemm1_weights", "gemm2_weights", "gemm1_weights_scale", "gemm2_weights_scale")
    contract = tuple(Argument(tensor, contiguous=True) for tensor in tensors)
    written = ("output", "routing_replay_out")
    read = partial(trtllm.read_trtllm, name)
    return Reader(f"{MOE}.{name}", read, ("sm100", "sm103"), written, _unfinalized, contract)


def _unfinalized(arguments: Arguments, written: Mapping[str, Tensor], result: tuple[Tensor, ...]) -> Tensor:
    """The layer's output; rows, weights and index of a call that leaves the sum to its caller are summed."""
    if arguments.get("do_finalize", True):
        return result[0]
    rows, weights, index = result
    return finalized(rows, torch.ones_like(weights) if arguments.get("use_routing_scales_on_input") else weights, index)


def _quantiser(name: str) -> Reader:
    def outcome(arguments: Arguments, written: Mapping[str, Tensor], result: tuple[Tensor, ...]) -> Tensor:
        return ops.quantiser_output(name, arguments, result)

    return Reader(f"flashinfer.quantization.{name}", partial(ops.read_quantiser, name), written=(), outcome=outcome)


def _activation(name: str) -> Reader:
    def outcome(arguments: Arguments, written: Mapping[str, Tensor], result: tuple[Tensor, ...]) -> Tensor:
        return result[0].reshape(-1, result[0].shape[-1])

    contract = (Argument("input", contiguous=True),)  # flashinfer_activation.DENSE
    read = partial(ops.read_activation, name)
    return Reader(f"flashinfer.activation.{name}", read, written=("out",), outcome=outcome, contract=contract)


def _routed(arguments: Arguments, written: Mapping[str, Tensor], result: tuple[Tensor, ...]) -> Tensor:
    return ops.router_output(arguments, written)


def _cutedsl(entry: str) -> Reader:
    contract = flashinfer_cutedsl.contract(scaled=True)
    return Reader(entry, read_cutedsl, ("sm100", "sm103"), ("moe_output",), contract=contract)


READERS = {
    "cutlass_fused_moe": Reader(
        flashinfer_cutlass.ENTRY,
        read_cutlass,
        written=("output", "workspace_buffer"),
        contract=(
            Argument("input", shape=("tokens", "row"), contiguous=True),
            *STEP,
            Argument("fc1_expert_weights", shape=("experts", "rows", "columns"), contiguous=True, align=16),
            Argument("fc2_expert_weights", shape=("experts", "hidden", "inter"), contiguous=True, align=16),
        ),
    ),
    **{name: _trtllm(name) for name in trtllm.NAMES},
    "cute_dsl_fused_moe": _cutedsl(flashinfer_cutedsl.FUSED),
    "cute_dsl_fused_moe_nvfp4": _cutedsl(flashinfer_cutedsl.NVFP4),
    "cute_dsl_fused_moe_bf16": Reader(
        flashinfer_cute_sm90.ENTRY, read_sm90, ("sm90",), ("moe_output", "intermediate_buffer"), contract=STEP
    ),
    "b12x_fused_moe": Reader(flashinfer_b12x.B12X, read_b12x, ("sm120",), contract=B12X),
    **{name: _quantiser(name) for name in ops.QUANTISERS},
    **{name: _activation(name) for name in FUNCTIONS},
    "fused_topk_deepseek": Reader(
        ROUTER, ops.read_router, written=("topk_values", "topk_indices", "routing_replay_out"), outcome=_routed
    ),
}


def call_of(dump: Dump) -> Call:
    """What the call computes; DumpError where nothing here reads such calls, or the call does something that no twin does."""
    reader = reader_of(dump)
    for name, most in NUMBERS.items():
        number, release = dump.arguments.get(name), dump.versions.get("flashinfer", "?")
        if isinstance(number, int) and number > most and release != RELEASE:
            raise DumpError(
                f"{dump.folder}: {name}={number}, recorded as a number under flashinfer {release}: numbers above {most} have"
                f" moved between releases, and their meaning is known of {RELEASE} only"
            )
    try:
        call = reader.read(dump.arguments)
        if isinstance(call, Layer):
            call.check()
        call.inputs("cpu")  # and so the case
    except DumpError as error:
        raise DumpError(f"{dump.folder}: {dump.function}: {error}") from error
    except REFUSALS as error:
        text = printable(str(error))[:MAX_TEXT]
        raise DumpError(f"{dump.folder}: {dump.function} would refuse this call, or is not read so: {text}") from error
    return call


def reader_of(dump: Dump) -> Reader:
    """The reader of the recorded function; DumpError."""
    if dump.function in UNREAD:
        raise DumpError(f"{dump.folder}: a call of {dump.function}: {UNREAD[dump.function]}")
    if dump.function not in READERS:
        raise DumpError(f"{dump.folder}: a call of {dump.function}; read are: {', '.join(READERS)}")
    return READERS[dump.function]
