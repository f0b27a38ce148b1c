"""What vLLM 0.25.1's quantisers, activations and routers do: vllm/_custom_ops.py and the kernels of vllm._C and vllm._moe_C."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from reference.formats import get
from reference.layouts import get as layout_of
from reference.layouts.linear import pack_nibbles

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
SMALL = 1e-20  # what the sum of the chosen sigmoids is kept above
BLOCK = 16
BOTH = (torch.float16, torch.bfloat16)


def scaled_fp8_quant(  # noqa: PLR0913  the library's signature
    input: Tensor,
    scale: Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """input [M, N] -> (e4m3 [M, N], the scale given, float32 [1] or [M, 1]); no groups and no bounds here."""
    assert input.ndim == 2
    if scale_ub is not None or group_shape is not None:
        raise NotImplementedError("this twin has neither scale_ub nor group_shape")
    rows = max(num_token_padding or 0, len(input))
    if output is None:
        output = torch.empty((rows, input.shape[1]), device=input.device, dtype=E4M3)
    else:
        assert num_token_padding is None, "padding not supported if output passed in"
        assert output.dtype == E4M3
    if scale is not None:
        if scale.numel() != 1:
            raise RuntimeError("1D scale requires explicit group_shape")
        codes = (input.float() * (1 / scale.view(1, 1))).clamp(-LARGEST, LARGEST).to(E4M3)
        output[: len(input)] = codes
        return output, scale
    q = get("fp8_token:vllm" if use_per_token_if_dynamic else "fp8_tensor:vllm").encode(input)
    assert q.scales is not None
    output[: len(input)] = q.codes.view(E4M3)
    if not use_per_token_if_dynamic:
        return output, q.scales.view(1)
    scales = torch.empty((rows, 1), device=input.device, dtype=torch.float32)
    scales[: len(input)] = q.scales
    return output, scales


def scaled_fp4_quant(
    input: Tensor,
    input_global_scale: Tensor,
    is_sf_swizzled_layout: bool = True,
    backend: str = "none",
    padded_n: int | None = None,
) -> tuple[Tensor, Tensor]:
    """input [..., N] -> (uint8 [M, N / 2], e4m3 scales [rows padded to 128, groups padded to 4] or [M, N / 16])."""
    assert input.ndim >= 1, f"input.ndim needs to be >= 1, but got {input.ndim}."
    if "trtllm" in backend or padded_n is not None:
        raise NotImplementedError("this twin has neither the 8x4 layout nor padded_n")
    columns = input.shape[-1]
    input = input.reshape(input.numel() // columns, columns)
    assert columns % BLOCK == 0, f"last dim has to be multiple of 16, but got {columns}."
    assert input.dtype in BOTH, f"input.dtype needs to be fp16 or bf16 but got {input.dtype}."
    q = get("nvfp4:vllm").encode(input, input_global_scale)
    assert q.scales is not None
    scales = q.scales
    if is_sf_swizzled_layout:
        layout = layout_of("swizzle_128x4")
        scales = layout.pack(scales).view(layout.padded_shape((len(input), columns // BLOCK)))
    return pack_nibbles(q.codes), scales.view(E4M3)


class MoEActivation(Enum):
    """The gated ones that share the packed layout of halves."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


def apply_moe_activation(
    activation: MoEActivation,
    output: Tensor,
    input: Tensor,
    *,
    clamp_limit: float | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """input [M, 2 d] -> output [M, d] = act(gate) * up, rounded after the activation and after the product."""
    assert input.dim() == 2, "Input must be 2D"
    assert output.dim() == 2, "Output must be 2D"
    two, one = output.size(-1) * 2, input.size(-1)
    assert two == one, f"{activation.value} expects 2x ratio: {two} vs {one}"
    if clamp_limit is not None:
        raise NotImplementedError("this twin has no clamp")
    gate, up = input.chunk(2, -1)
    wide = gate.float()
    if activation is MoEActivation.SILU:
        activated = functional.silu(wide)
    else:
        activated = functional.gelu(wide, approximate="tanh" if activation is MoEActivation.GELU_TANH else "none")
    output.copy_(activated.to(input.dtype) * up)
    return output


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
) -> None:
    """gating_output [M, experts] -> float32 weights, ids and k * M + row [M, k] in place, best first."""
    if e_score_correction_bias is not None:
        raise NotImplementedError("this twin has no bias")
    scores = torch.softmax(gating_output.float(), -1)
    rows, top_k = topk_ids.shape
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, ids)
    topk_weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
    topk_ids.copy_(ids)
    token_expert_indices.copy_(torch.arange(top_k) * rows + torch.arange(rows)[:, None])


def grouped_topk(  # noqa: PLR0913  the library's signature
    scores: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: Tensor,
    scoring_func: int = 0,
) -> tuple[Tensor, Tensor]:
    """scores [M, experts], logits where scoring_func is 1 -> (float32 weights, int32 ids) [M, topk]."""
    plain = torch.sigmoid(scores.float()) if scoring_func == 1 else scores.float()
    biased = plain + bias.float()
    grouped = biased.unflatten(1, (num_expert_group, -1))
    best = grouped.topk(2, -1).values.sum(-1).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    keep = torch.zeros(len(scores), num_expert_group, dtype=torch.bool).scatter(1, best, True)
    masked = grouped.masked_fill(~keep[:, :, None], -torch.inf).flatten(1)
    ids = masked.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    chosen = plain.gather(1, ids)
    if renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + SMALL)
    return chosen * routed_scaling_factor, ids.int()


ENTRIES = {
    f"vllm._custom_ops.{function.__name__}": function
    for function in (scaled_fp8_quant, scaled_fp4_quant, topk_softmax, grouped_topk)
} | {
    f"vllm.model_executor.layers.fused_moe.activation.{thing.__name__}": thing
    for thing in (apply_moe_activation, MoEActivation)
}
