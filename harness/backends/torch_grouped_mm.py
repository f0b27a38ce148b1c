"""torch.nn.functional.grouped_mm (CUTLASS on SM90, a native kernel on the CPU): bf16 expert GEMMs between torch ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.backends._packing import biases
from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import BIASES, WEIGHTINGS, Case, Limit
from harness.guard import Argument, Entry
from harness.inputs import Inputs
from reference.rounding import Rounding

GROUPED_MM: Callable[..., Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
}
GATED = ("swiglu", "geglu")
ALIGNMENT = 8  # grouped_mm wants 16-byte aligned strides: 8 bf16 elements
BYTES = 16  # of a start and a row stride: torch/_meta_registrations.py, check_valid_strides, and TMA
CONTRACT = (
    Argument("mat_a", torch.bfloat16, ("rows", "k"), align=BYTES, stride_align=BYTES),
    Argument("mat_b", torch.bfloat16, ("experts", "k", "n"), align=BYTES, stride_align=BYTES),
    Argument("offs", torch.int32, ("experts",)),
)


def probe(device: Device) -> Support:
    """grouped_mm became public in torch 2.10; before that it is torch._grouped_mm."""
    if GROUPED_MM is None:
        return Support.no("library", f"torch {torch.__version__} has no grouped_mm")
    return YES


def unaligned(case: Case) -> str | None:
    """16-byte row strides on both reduction axes."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % ALIGNMENT:
            return f"{name} {size} is not a multiple of {ALIGNMENT} (16-byte strides)"
    return None


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, hidden, 2 * inter] and w2 [experts, inter, hidden] as transposed views; tokens sorted by expert."""
    w13, w2 = inputs.stacked()
    buffers = {"x": inputs.x, "w13": w13, "w2": w2, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
    buffers |= biases(inputs, torch.bfloat16)
    gated = w13.shape[1] > w2.shape[2]
    tokens, hidden = case.shape.tokens, case.shape.hidden
    contract = (
        Argument("x", torch.bfloat16, (tokens, hidden)),
        Argument("w13", torch.bfloat16, (case.shape.experts, "rows", hidden)),
        Argument("w2", torch.bfloat16, (case.shape.experts, hidden, case.shape.inter)),
        Argument("ids", torch.int64, (tokens, case.shape.top_k)),
        Argument("topk_weights", torch.float32, (tokens, case.shape.top_k)),
    )
    return Launch(lambda: layer(buffers, case.activation, gated, case.weighting == "oninput"), buffers, contract=contract)


def layer(b: dict[str, Tensor], activation: str, gated: bool, on_input: bool = False) -> Tensor:
    """The layer as a user of grouped_mm writes it: sort, GEMM, activate in fp32, GEMM, weighted fp32 scatter-add; what a GEMM
    wrote and its bias, if there is one, add up in fp32. on_input: weights multiply x in fp32, rounded before GEMM 1 reads it,
    as torchtitan's MoE does with score_before_experts (Llama-4)."""
    tokens, top_k = b["ids"].shape
    order = b["ids"].flatten().argsort(stable=True)
    expert = b["ids"].flatten()[order]
    experts = torch.arange(len(b["w13"]), device=expert.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)  # on the device: a graph can hold it
    assert GROUPED_MM is not None
    grouped_mm = Entry(GROUPED_MM, CONTRACT)
    x, weights = b["x"][order // top_k], b["topk_weights"].flatten()[order, None]
    if on_input:
        x = (x.float() * weights).to(x.dtype)
    pre = grouped_mm(x, b["w13"].transpose(-2, -1), offs=ends)
    middle = _activate(_biased(pre.float(), b.get("w13_bias"), expert), activation, gated).to(pre.dtype)
    rows = _biased(grouped_mm(middle, b["w2"].transpose(-2, -1), offs=ends).float(), b.get("w2_bias"), expert)
    weighted = rows if on_input else rows * weights
    by_slot = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return by_slot.view(tokens, top_k, weighted.shape[1]).sum(1).to(pre.dtype)


def _biased(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return rows if bias is None else rows + bias[expert].float()


def _activate(pre: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return FUNCTIONS[activation](pre)
    gate, up = pre.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up


SCRIPT = """\
import torch.nn.functional as F

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def call(b):
    tokens, top_k = b["ids"].shape
    order = b["ids"].flatten().argsort(stable=True)
    expert = b["ids"].flatten()[order]
    ends = torch.searchsorted(expert, torch.arange(len(b["w13"]), device=expert.device), right=True, out_int32=True)
    weights = b["topk_weights"].flatten()[order, None]
    x = {x}
    pre = grouped_mm(x, b["w13"].transpose(-2, -1), offs=ends).float(){first}
    {activate}
    rows = grouped_mm(middle.to(x.dtype), b["w2"].transpose(-2, -1), offs=ends).float(){second}
    weighted = {weighted}
    by_slot = torch.empty_like(weighted).index_copy_(0, order, weighted)
    return by_slot.view(tokens, top_k, weighted.shape[1]).sum(1).to(x.dtype)
"""


def script(case: Case) -> str:
    """`layer` as straight-line text."""
    function = f"F.{FUNCTIONS[case.activation].__name__}"
    if case.activation in GATED:
        activate = f"gate, up = pre.chunk(2, dim=-1)\n    middle = {function}(gate) * up"
    else:
        activate = f"middle = {function}(pre)"
    added = [f' + b["{name}_bias"][expert].float()' * (case.bias == "bias") for name in ("w13", "w2")]
    x, weighted = 'b["x"][order // top_k]', "rows * weights"
    if case.weighting == "oninput":
        x, weighted = f'({x}.float() * weights).to(b["x"].dtype)', "rows"
    return SCRIPT.format(x=x, activate=activate, first=added[0], second=added[1], weighted=weighted)


def rounding(case: Case) -> Rounding:
    """Both GEMMs, the activation and the layer write bf16, and so does who multiplies x by weights; a bias joins what a GEMM
    wrote."""
    if case.bias == "bias":
        return Rounding(product="bf16", middle="bf16", out="bf16")
    weighted_x = "bf16" if case.weighting == "oninput" else None
    return Rounding(weighted_x=weighted_x, gate_up="bf16", middle="bf16", row="bf16", out="bf16")


BACKENDS = (
    Backend(
        name="torch_grouped_mm",
        library="torch",
        deterministic=True,
        recipes=("bf16",),
        activations=tuple(FUNCTIONS),
        archs=("cpu", "sm90", "sm100"),
        rounding=rounding,
        probe=probe,
        limits=(Limit(("hidden", "inter"), unaligned),),
        biases=BIASES,
        weightings=WEIGHTINGS,
        prepare=prepare,
        script=script,
        summary="bf16 grouped GEMMs of torch with eager torch around them",
    ),
)
