"""Twins of AITER's fused_moe and of what prepares its weights: aiter/fused_moe.py and aiter/ops/shuffle.py of 2026."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace

import torch
from torch import Tensor

from reference.formats import get

GROUP = 128  # columns of a scale of QuantType.per_1x128, and rows of a weight's


class ActivationType(Enum):
    """aiter.ActivationType, of which the two that the adapter names."""

    Silu = 0
    Gelu = 1


class QuantType(Enum):
    """aiter.QuantType."""

    No = 0
    per_Tensor = 1
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5


ACTS: dict[ActivationType, Callable[[Tensor], Tensor]] = {
    ActivationType.Silu: torch.nn.functional.silu,
    ActivationType.Gelu: torch.nn.functional.gelu,
}
FORMATS = {QuantType.per_Token: "fp8_token", QuantType.per_1x128: "fp8_group", QuantType.per_128x128: "fp8_group"}


def shuffle_weight(
    x: Tensor,
    layout: tuple[int, int] = (16, 16),
    use_int4: bool = False,
    is_guinterleave: bool = False,
    gate_up: bool = False,
) -> Tensor:
    """x [.., N, K] in blocks of layout[0] rows and 2 * layout[1] columns; in a block, runs of 16 bytes of a column of rows lie
    one after the other. The same shape and dtype, with the attribute `is_shuffled`. AssertionError for a ragged block."""
    if use_int4 or is_guinterleave:
        raise NotImplementedError("the twin shuffles plain blocks only")
    rows, columns, run = layout[0], 2 * layout[1], 16 // x.element_size()
    assert x.shape[-2] % rows == 0, f"{x.shape[-2]} % {rows} == {x.shape[-2] % rows}"
    assert x.shape[-1] % columns == 0, f"{x.shape[-1]} % {columns} == {x.shape[-1] % columns}"
    pieces = x.view(-1, x.shape[-2] // rows, rows, x.shape[-1] // columns, columns // run, run)
    shuffled = pieces.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]
    return shuffled


def unshuffled(x: Tensor) -> Tensor:
    """The inverse of `shuffle_weight` in blocks of 16 x 32, as a kernel's loads walk it."""
    *lead, n, k = x.shape
    run = 16 // x.element_size()
    return x.reshape(-1, n // 16, k // 32, 32 // run, 16, run).permute(0, 1, 4, 2, 3, 5).reshape(*lead, n, k)


def fused_moe(  # noqa: PLR0913  the library's signature
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    quant_type: QuantType = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_size_M: int | None = None,
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    splitk: int = 0,
) -> Tensor:
    """x [tokens, hidden] bf16 or fp16, w1 [experts of the rank, (2 *) inter, hidden] gate first and w2 [.., hidden, inter],
    both shuffled; expert_mask int32 [experts]: 1 where this rank holds the expert. A new [tokens, hidden] tensor.

    AssertionError for an output dtype or a w1 that the library refuses. Not twinned: biases, pads, weights on stage 1.
    """
    call = SimpleNamespace(**locals())
    assert w1.shape[1] in (w2.shape[2], 2 * w2.shape[2]), f"Invalid MoE weight: {w1.shape=} {w2.shape=}"
    out = hidden_states.dtype if dtype is None else dtype
    assert out in (torch.float16, torch.bfloat16), f"Fused_moe unsupported out dtype: {out}"
    if doweight_stage1 or bias1 is not None or bias2 is not None or hidden_pad or intermediate_pad:
        raise NotImplementedError("the twin has neither biases nor pads nor weights on stage 1")
    return _stages(call, out)


def _stages(a: SimpleNamespace, dtype: torch.dtype) -> Tensor:
    first, second = _dense(a.w1, a.w1_scale, a.quant_type), _dense(a.w2, a.w2_scale, a.quant_type)
    numbers = _numbers(a.expert_mask, a.w1.shape[0])
    x = _quantised(a.hidden_states, a.quant_type)
    result = torch.zeros_like(a.hidden_states, dtype=dtype)
    for k in range(a.topk_ids.shape[1]):  # rows are added one slot after the other, each sum rounded: one order of the atomics
        local = numbers[a.topk_ids[:, k].long()]
        for expert in local.unique().tolist():
            if expert < 0:
                continue
            mine = local == expert
            pre = x[mine] @ first[expert].T
            middle = _activated(pre, a, first.shape[1] > second.shape[2]).to(dtype)
            row = _quantised(middle, a.quant_type) @ second[expert].T
            weighted = (row * a.topk_weight[mine, k, None]).to(dtype)
            result[mine] += weighted
    return result


def _activated(pre: Tensor, a: SimpleNamespace, gated: bool) -> Tensor:
    act = ACTS[a.activation]
    if not gated:
        return act(pre)
    gate, up = pre.chunk(2, -1)
    return act(gate) * up


def _numbers(mask: Tensor | None, held: int) -> Tensor:
    """int64 [experts]: an expert's number among those of this rank, -1 if it is another's."""
    if mask is None:
        return torch.arange(held)
    return torch.where(mask > 0, mask.long().cumsum(0) - 1, -1)


def _dense(weights: Tensor, scale: Tensor | None, quant: QuantType) -> Tensor:
    """float32 [experts, rows, columns] from the shuffled bytes."""
    values = unshuffled(weights).float()
    if scale is None:
        return values
    if quant is QuantType.per_Token:
        return values * scale.view(len(values), -1, 1)
    spread = scale.repeat_interleave(GROUP, 1)[:, : values.shape[1]].repeat_interleave(GROUP, 2)
    return values * spread[:, :, : values.shape[2]]


def _quantised(x: Tensor, quant: QuantType) -> Tensor:
    """float32: what stage 1 or 2 reads of x."""
    if quant is QuantType.No or not x.numel():
        return x.float()
    fmt = get(FORMATS[quant])
    return fmt.decode(fmt.encode(x.float()), torch.float32)


ENTRIES = {
    "aiter.fused_moe.fused_moe": fused_moe,
    "aiter.ops.shuffle.shuffle_weight": shuffle_weight,
    "aiter.ActivationType": ActivationType,
    "aiter.QuantType": QuantType,
}
