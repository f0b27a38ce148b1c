"""torch's _scaled_grouped_mm (CUTLASS on SM90): FP8 expert GEMMs, rows scaled per token and columns per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.backends._packing import pack
from harness.backends._slabs import in_blocks
from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case, Limit
from harness.guard import Argument, Entry
from harness.inputs import Inputs
from reference.rounding import Rounding

ALIGNMENT = 16  # bytes, so many FP8 elements: torch/_meta_registrations.py, check_valid_strides
ROWS = 16  # of a group's start: one list for every token count, and whole TMA boxes
E4M3 = torch.float8_e4m3fn
MAX = 448.0  # of E4M3
CONTRACT = (
    Argument("mat_a", E4M3, ("rows", "k"), align=ALIGNMENT, stride_align=ALIGNMENT),
    Argument("mat_b", E4M3, ("experts", "k", "n"), align=ALIGNMENT, stride_align=ALIGNMENT),
    Argument("scale_a", torch.float32, ("rows",), contiguous=True),
    Argument("scale_b", torch.float32, ("experts", "n"), contiguous=True),
    Argument("offs", torch.int32, ("experts",)),
)


def probe(device: Device) -> Support:
    """The operator is private before torch 2.10 and has no CPU kernel."""
    if not hasattr(torch.ops.aten, "_scaled_grouped_mm"):
        return Support.no("library", f"torch {torch.__version__} has no _scaled_grouped_mm")
    return YES


def rounding(case: Case) -> Rounding:
    """bf16 between the operations, act and multiply in fp32; FP8 per token by the format's own rule."""
    return Rounding(x="fp8_token", gate_up="bf16", middle="bf16>fp8_token", row="bf16", out="bf16", accumulate="hopper_fp8")


def unaligned(case: Case) -> str | None:
    """16-byte row strides on both reduction axes."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % ALIGNMENT:
            return f"{name} {size} is not a multiple of {ALIGNMENT} (16-byte strides)"
    return None


def no_tokens(case: Case) -> str | None:
    """amax of no rows is fine, a grouped GEMM of none is not asked for."""
    return None if case.shape.tokens else "a batch without tokens has no groups"


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden] and w2 [experts, hidden, inter] in E4M3, read as transposed views; scales a row."""
    w13, w2 = pack(case, inputs)
    assert w13.scales is not None
    assert w2.scales is not None
    buffers = {"x": inputs.x, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}
    buffers |= {"w13": w13.data.view(E4M3), "w2": w2.data.view(E4M3)}
    buffers |= {"w13_scales": w13.scales.squeeze(-1), "w2_scales": w2.scales.squeeze(-1)}
    tokens, top_k = case.shape.tokens, case.shape.top_k
    contract = (
        Argument("x", torch.bfloat16, (tokens, case.shape.hidden)),
        Argument("ids", torch.int64, (tokens, top_k)),
        Argument("topk_weights", torch.float32, (tokens, top_k)),
    )
    return Launch(lambda: layer(buffers, case.activation == "swiglu"), buffers, contract=contract)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x [rows, columns] and float32 scales [rows]: row amax / 448, 1 for a row of zeros; torchao's rule."""
    amax = x.float().abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / MAX)
    return (x.float() / scale.unsqueeze(-1)).clamp(-MAX, MAX).to(E4M3), scale


def layer(b: dict[str, Tensor], gated: bool) -> Tensor:
    """Rows by expert, each expert from a multiple of 16 on; what lies between holds a neighbour's expert's products."""
    grouped_mm = Entry(_scaled_grouped_mm, CONTRACT)
    experts = b["w13"].shape[0]
    places = in_blocks(b["ids"], experts, ROWS)
    ends = ((places.counts.long() + ROWS - 1) // ROWS * ROWS).cumsum(0).to(torch.int32)
    x, scale = quantised(b["x"])
    rows, scales = places.spread(x), places.spread(scale.unsqueeze(-1)).squeeze(-1)
    pre = grouped_mm(rows, b["w13"].transpose(-2, -1), scales, b["w13_scales"], ends).float()
    if gated:
        gate, up = pre.chunk(2, -1)
        middle = torch.nn.functional.silu(gate) * up
    else:
        middle = torch.nn.functional.silu(pre)
    narrow, scale = quantised(middle.to(torch.bfloat16))
    out = grouped_mm(narrow, b["w2"].transpose(-2, -1), scale, b["w2_scales"], ends)
    return places.gathered(out, b["topk_weights"])


def _scaled_grouped_mm(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor) -> Tensor:
    done: Tensor = torch.ops.aten._scaled_grouped_mm(mat_a, mat_b, scale_a, scale_b, offs=offs, out_dtype=torch.bfloat16)
    return done


BACKENDS = (
    Backend(
        name="torch_scaled_grouped_mm",
        library="torch",
        deterministic=True,
        recipes=("fp8_channel-fp8_token",),
        activations=("swiglu", "silu"),
        archs=("sm90",),
        rounding=rounding,
        probe=probe,
        limits=(Limit(("tokens",), no_tokens), Limit(("hidden", "inter"), unaligned)),
        prepare=prepare,
        summary="FP8 grouped GEMMs of torch, rowwise scales, with eager torch around them",
    ),
)
