"""Weights and scales of each mode of `cutlass_fused_moe` in its physical layout, and what becomes of x on the way in.

The shapes are those that getQuantParams checks in flashinfer_cutlass_fused_moe_binding.cu (0.7.2.post1), or, where it checks
none, those of fused_moe/prepare.py there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from harness.backends._packing import Stack, pack
from harness.case import Case
from harness.entry import resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.formats import get
from reference.layouts.swizzle_128x4 import padded_shape, swizzle

SCALES_PER_INT = 4  # block scales of MX and NVFP4 are handed over as int32, FP4 weights of the same modes as int64
E4M3_MAX = 448.0


def as_given(x: Tensor) -> dict[str, Tensor]:
    """x as it is."""
    return {"input": x}


@dataclass(frozen=True)
class Scale:
    """One of quant_scales, with the shape that the library wants of it."""

    tensor: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """w13, w2; scales by name, in the order of quant_scales; feed(x): the arguments that x makes, asked at each call."""

    w13: Tensor
    w2: Tensor
    scales: dict[str, Scale] = field(default_factory=dict)
    feed: Callable[[Tensor], dict[str, Tensor]] = as_given

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The scales by name."""
        return {name: scale.tensor for name, scale in self.scales.items()}

    @property
    def contract(self) -> tuple[Argument, ...]:
        """What each scale must be."""
        return tuple(Argument(n, s.dtype, s.shape, contiguous=True) for n, s in self.scales.items())


def plain(case: Case, inputs: Inputs) -> Packed:
    """bf16 or fp16: no scales."""
    w13, w2 = pack(case, inputs, up_first=True)
    return Packed(w13.data, w2.data)


def fp8_tensor(case: Case, inputs: Inputs) -> Packed:
    """E4M3 with a scale per tensor: x is quantised by the caller, the middle by the kernel with `fc2_quant`."""
    w13, w2 = pack(case, inputs, up_first=True, one_factor=True)
    x_scale, middle = _static(inputs)
    scales = {
        "fc1_dequant": _each(_factors(w13) / x_scale),
        "fc2_quant": _number(inputs, middle),
        "fc2_dequant": _each(_factors(w2) / middle),
        "fc1_input_dequant": _number(inputs, 1 / x_scale),
    }
    return Packed(_as_e4m3(w13), _as_e4m3(w2), scales, partial(_e4m3, x_scale))


def _e4m3(x_scale: float, x: Tensor) -> dict[str, Tensor]:
    return {"input": (x.float() * x_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)}


def fp8_block(case: Case, inputs: Inputs) -> Packed:
    """DeepSeek: E4M3 weights with float32 scales of 128 x 128 blocks; the kernel quantises both inputs by groups of 128. The
    binding checks no size of these scales."""
    w13, w2 = pack(case, inputs, up_first=True)
    scales = {}
    for name, stack in (("fc1_scales", w13), ("fc2_scales", w2)):
        experts, rows, columns = stack.data.shape
        scales[name] = Scale(_there(stack.scales), torch.float32, (experts, rows // 128, columns // 128))
    return Packed(_as_e4m3(w13), _as_e4m3(w2), scales)


def w4a16(weights: str, fold: str, case: Case, inputs: Inputs) -> Packed:
    """MXFP4 x bf16 on SM90, through the library's own interleaves."""
    stacks = pack(case, inputs, up_first=True)
    scales = {name: _folded(fold, s.scales, 32) for name, s in zip(("fc1_scales", "fc2_scales"), stacks, strict=True)}
    w13, w2 = (resolve(weights, inputs.device)(s.data, "fp4") for s in stacks)
    return Packed(w13, w2, scales)


def w4a8(weights: str, fold: str, case: Case, inputs: Inputs) -> Packed:
    """INT4 x E4M3 on SM90. x and the middle are multiplied by a scale per column before they become E4M3, here one for all,
    and the results by `alpha`; no zero points."""
    stacks = pack(case, inputs, up_first=True)
    w13, w2 = (resolve(weights, inputs.device)(s.data, "int4") for s in stacks)
    x, experts = inputs.x, len(inputs.local)
    gemms = tuple(zip((1, 2), stacks, (case.shape.hidden, case.shape.inter), _static(inputs), strict=True))
    scales = {f"fc{i}_weight_scales": _folded(fold, _there(s.scales).bfloat16(), 128) for i, s, _, _ in gemms}
    scales |= {f"fc{i}_act_scales": Scale(x.new_full((n,), scale), x.dtype, (n,)) for i, _, n, scale in gemms}
    scales |= {f"fc{i}_weight_zeros": Scale(x.new_empty(0), x.dtype, (0,)) for i, *_ in gemms}
    scales |= {f"fc{i}_alpha": _each(torch.full((experts,), 1 / scale, device=x.device)) for i, _, _, scale in gemms}
    return Packed(w13, w2, scales)


def mxfp8(case: Case, inputs: Inputs) -> Packed:
    """MXFP8 x MXFP8: E4M3 elements with swizzled E8M0 scales on both sides."""
    w13, w2 = pack(case, inputs, up_first=True)
    return Packed(_as_e4m3(w13), _as_e4m3(w2), _mx_scales(w13, w2, 1), _mxfp8)


def mxfp4_mxfp8(case: Case, inputs: Inputs) -> Packed:
    """MXFP8 x MXFP4: weights 16 codes to an int64."""
    w13, w2 = pack(case, inputs, up_first=True)
    return Packed(w13.data.view(torch.int64), w2.data.view(torch.int64), _mx_scales(w13, w2, 2), _mxfp8)


def _mxfp8(x: Tensor) -> dict[str, Tensor]:
    """x as codes, with E8M0 scales in the 128x4 swizzle, flat."""
    q = get("mxfp8").encode(x)
    return {"input": q.codes.view(torch.float8_e4m3fn), "input_sf": swizzle(_there(q.scales))}


def _mx_scales(w13: Stack, w2: Stack, codes_per_byte: int) -> dict[str, Scale]:
    scales = {}
    for gemm, stack in enumerate((w13, w2), 1):
        experts, rows, columns = stack.data.shape
        scales[f"fc{gemm}_weight_block"] = _swizzled(stack, rows, columns * codes_per_byte // 32)
        scales[f"fc{gemm}_global"] = _each(torch.ones(experts, device=stack.data.device))
    return scales


def nvfp4(case: Case, inputs: Inputs) -> Packed:
    """NVFP4: x in its carrier, both inputs quantised by the kernel with global scales in the encode sense."""
    w13, w2 = pack(case, inputs, up_first=True, one_factor=True)
    scales = {}
    for gemm, (stack, scale) in enumerate(zip((w13, w2), _static(inputs), strict=True), 1):
        _, rows, columns = stack.data.shape
        scales[f"fc{gemm}_act_global"] = _number(inputs, scale)
        scales[f"fc{gemm}_weight_block"] = _swizzled(stack, rows, columns // 8)
        scales[f"fc{gemm}_global"] = _each(_factors(stack) / scale)
    return Packed(w13.data.view(torch.int64), w2.data.view(torch.int64), scales)


def _as_e4m3(stack: Stack) -> Tensor:
    return stack.data.view(torch.float8_e4m3fn)


def _swizzled(stack: Stack, rows: int, blocks: int) -> Scale:
    """Each expert's scales [rows, blocks] in whole 128x4 tiles, four to an int32."""
    high, wide = padded_shape(rows, blocks)
    tiles = torch.stack([swizzle(one) for one in _there(stack.scales)]).view(-1, high, wide)
    shape = (stack.data.shape[0], high, wide // SCALES_PER_INT)
    return Scale(tiles.view(torch.int32), torch.int32, shape)


def _folded(fold: str, scales: Tensor | None, group: int) -> Scale:
    """Through the library's fold, [experts, rows / 64, K / 128, m, 16 bytes] since 0.6.16; 0.6.10 .. 0.6.15 and 0.6.16.post3
    .. 0.6.17 give [experts, K / 128, rows * n]. The kernels of a release read their own."""
    scales = _there(scales)
    folded = resolve(fold, scales.device.type)(scales, group)
    experts, rows, blocks = scales.shape
    per_k, per_row = 128 // group, 16 // scales.element_size()
    shape: tuple[int, ...] = (experts, rows // 64, blocks // per_k, 64 * per_k // per_row, per_row)
    if folded.dim() == 3:
        shape = (experts, blocks // per_k, rows * per_k)
    return Scale(folded, scales.dtype, shape)


def _static(inputs: Inputs) -> tuple[float, float]:
    """What x and the middle are multiplied by."""
    assert inputs.x_scale is not None
    assert inputs.middle_scale is not None
    return inputs.x_scale, inputs.middle_scale


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _factors(stack: Stack) -> Tensor:
    """[experts]: the factor of each matrix, both halves of w13 having one."""
    return _there(stack.factors)[:, 0].contiguous()


def _each(values: Tensor) -> Scale:
    """One float32 of each expert."""
    return Scale(values, torch.float32, tuple(values.shape))


def _number(inputs: Inputs, value: float) -> Scale:
    """float32 []."""
    return Scale(torch.tensor(value, device=inputs.x.device), torch.float32, ())
