"""How each mode of `cutlass_fused_moe` reads its buffers: flashinfer_cutlass_fused_moe_binding.cu of 0.7.2.post1.

The constructor picks a mode from dtypes and flags, getQuantParams checks quant_scales; both are repeated here in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.twins.libs._flashinfer_layer import check, dense
from reference.format import Quantized, expand_blocks
from reference.formats import get
from reference.grid import FLOATS
from reference.layouts import sm90_scale_fold, sm90_weight_fp4, sm90_weight_int4
from reference.layouts.linear import unpack_nibbles
from reference.layouts.swizzle_128x4 import padded_shape, unswizzle

E4M3, INT32, FP32 = torch.float8_e4m3fn, torch.int32, torch.float32
HALVES = (torch.float16, torch.bfloat16)
NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    E4M3: "float8_e4m3fn",
    torch.int64: "int64",
    torch.uint8: "uint8",
}


@dataclass(frozen=True)
class Call:
    """What a mode looks at. w: (fc1, fc2); gated: has FC1 a second half?"""

    input: Tensor
    input_sf: Tensor | None
    swizzled: bool
    w: tuple[Tensor, Tensor]
    scales: list[Tensor]
    out: torch.dtype
    gated: bool
    fp8_block: bool
    w4_group: bool
    mxfp8_act: bool
    packed: bool


class Mode:
    """fp16 or bf16 on both sides; the other modes differ in a few of its steps. All values are float32."""

    INNER = 1  # weights' elements in one of their storage
    ALIGN = 8  # elements of a row in 128 bits of weights, runMoe; of MX weights in 64 bytes
    COUNT = 0  # of quant_scales; 0: none is looked at
    TEXT = ""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.experts, self.hidden = call.w[1].shape[0], call.w[1].shape[1]
        self.inter = call.w[1].shape[2] * self.INNER
        self.sizes = (((1 + call.gated) * self.inter, self.hidden), (self.hidden, self.inter))

    def check(self) -> None:
        """RuntimeError with the binding's text where alignment or scales are not as it wants them."""
        self.check_alignment()
        if self.COUNT:
            n = len(self.call.scales)
            check(n == self.COUNT, f"({n} vs. {self.COUNT}) : Expecting {self.COUNT} quant scales for {self.TEXT} quantization")
            self.check_scales()

    def check_alignment(self) -> None:
        """TMA wants 128 bits."""
        unit = 16 // min(self.call.input.element_size(), self.call.w[0].element_size())
        for name, size in (("hidden_size", self.hidden), ("inter_size", self.inter)):
            check(size % unit == 0, f"{name} {size} must be divisible by {unit} for weights")
        for name, size in (("Hidden", self.hidden), ("Inter", self.inter)):
            kind = "MXFP8 MOE GEMM" if isinstance(self, Mxfp8) and not isinstance(self, Nvfp4) else "MOE GEMM"
            text = f"{name} size {size} does not meet minimum alignment requirements for {kind} {self.ALIGN}"
            check(size % self.ALIGN == 0, text)

    def check_scales(self) -> None:
        """Of quant_scales, beyond their number."""

    def x(self) -> Tensor:
        """[tokens, hidden] as GEMM 1 multiplies them."""
        return dense(self.call.input).float()

    def weight(self, gemm: int, expert: int) -> Tensor:
        """[rows, columns] of GEMM 0 or 1."""
        return dense(self.call.w[gemm])[expert].float()

    def alpha(self, gemm: int, expert: int) -> Tensor | float:
        """What the epilogue multiplies sums by."""
        return 1.0

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """The activated [rows, inter] as GEMM 2 multiplies it."""
        return value.to(self.call.out).float()

    def scale(self, index: int) -> Tensor:
        """One of quant_scales, dense."""
        return dense(self.call.scales[index])

    def wants(self, index: int, name: str, dtype: torch.dtype, *dims: int) -> None:
        """CHECK_INPUT_TYPE and CHECK_DIM."""
        tensor = self.call.scales[index]
        check(tensor.dtype == dtype, f"Inconsistency of Tensor type: {name}")
        check(tensor.dim() in dims, f"{name} must be a {dims[-1]}D tensor")

    def wants_each(self, index: int, name: str) -> None:
        """One float32 of each expert."""
        self.wants(index, name.replace(" ", "_"), FP32, 1)
        check(self.call.scales[index].shape[0] == self.experts, f"{name} size must be (num_experts_on_rank,)")

    def wants_one_or_each(self, index: int, name: str) -> None:
        """float32 [] or one of each expert."""
        self.wants(index, name.replace(" ", "_"), FP32, 0, 1)
        tensor = self.call.scales[index]
        check(not tensor.dim() or tensor.shape[0] == self.experts, f"{name} must be scalar or (num_experts_on_rank,)")

    def wants_blocks(self, index: int, gemm: int, group: int, rows: int) -> None:
        """int32 [experts, rows, columns / group / 4], columns rounded up to 4 groups."""
        name = f"fc{gemm + 1}_weight_block"
        self.wants(index, name, INT32, 3)
        columns = -(-self.sizes[gemm][1] // (4 * group))
        shape = ("inter_size * 2, hidden_size" if self.call.gated else "inter_size, hidden_size", "hidden_size, inter_size")
        text = f"fc{gemm + 1} weight block size must be (num_experts_on_rank, {shape[gemm]} // 4 // block_scale_vector_size)"
        check(self.call.scales[index].shape == (self.experts, rows, columns), text)


def number(scale: Tensor, expert: int) -> Tensor:
    """A scalar, or the expert's of a 1-D tensor."""
    return scale[expert] if scale.dim() else scale


def blocks(tensor: Tensor, expert: int, rows: int, count: int) -> Tensor:
    """uint8 [rows, count]: an expert's block scales out of their 128x4 tiles."""
    return unswizzle(tensor.view(torch.uint8)[expert].flatten(), rows, count)


def quantised(name: str, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """float32 value [rows, columns] through a block format and back, a global scale not taken out again."""
    fmt = get(name)
    if not value.numel():
        return value
    q = fmt.encode(value, scale)
    return fmt.decode(Quantized(fmt, q.codes, q.scales), torch.float32)


class Fp8Tensor(Mode):
    """E4M3 on both sides, a scale per tensor."""

    COUNT, TEXT, ALIGN = 4, "fp8", 16

    def check_scales(self) -> None:
        """See Mode."""
        self.wants_each(0, "fc1 dequant")
        self.wants_one_or_each(1, "fc2 quant")
        self.wants_each(2, "fc2 dequant")
        self.wants(3, "fc1_input_dequant", FP32, 0)

    def alpha(self, gemm: int, expert: int) -> Tensor:
        """fc1_dequant and fc2_dequant; fc1_input_dequant is for LoRA only."""
        return self.scale(2 * gemm)[expert]

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """float32 to E4M3 with no stop between."""
        return FLOATS["e4m3"].round((value * number(self.scale(1), expert)).double()).float()


class Fp8Block(Mode):
    """bf16 inputs, quantised by groups of 128; E4M3 weights in 128 x 128 blocks. No size of a scale is checked."""

    ALIGN = 16

    def x(self) -> Tensor:
        """scale_1x128_kernel: x * (448 / amax) in E4M3, times 1 / (448 / amax)."""
        return by_groups(super().x())

    def weight(self, gemm: int, expert: int) -> Tensor:
        """See Mode."""
        rows, columns = self.sizes[gemm]
        high, wide = rows // 128, columns // 128
        flat = self.scale(gemm).flatten()[expert * high * wide : (expert + 1) * high * wide]
        return super().weight(gemm, expert) * expand_blocks(flat.view(high, wide), (rows, columns), (128, 128))

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """bf16 in memory, then as x."""
        return by_groups(super().middle(value, expert))


def by_groups(value: Tensor) -> Tensor:
    """float32 [rows, columns] through E4M3 with one scale of 128 columns."""
    groups = value.unflatten(1, (value.shape[1] // 128, 128))
    amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, 448.0 / amax)
    return (FLOATS["e4m3"].round((groups * scale).double()).float() * (1.0 / scale)).flatten(1)


class W4A16(Mode):
    """MXFP4 x bf16 on SM90: weights interleaved, scales folded. No size of a scale is checked."""

    INNER, COUNT, TEXT, ALIGN = 2, 2, "W4A16", 32

    def weight(self, gemm: int, expert: int) -> Tensor:
        """See Mode."""
        rows, columns = self.sizes[gemm]
        codes = unpack_nibbles(sm90_weight_fp4.LAYOUTS[0].unpack(dense(self.call.w[gemm])[expert], (rows, columns // 2)))
        scales = unfolded(self.scale(gemm), (32, 1), expert, (rows, columns // 32))
        return get("mxfp4").decode(Quantized(get("mxfp4"), codes, scales), torch.float32)


class W4A8(Mode):
    """INT4 x E4M3 on SM90: inputs times a scale per column become E4M3; each group of 128 has a bf16 scale."""

    INNER, COUNT, TEXT, ALIGN = 2, 8, "INT4", 32

    def check_scales(self) -> None:
        """See Mode."""
        for index, size, text in ((2, self.hidden, "FC1"), (3, self.inter, "FC2")):
            axis = "hidden_size" if text == "FC1" else "inter_size"
            shared = f"INT4xFP8 {text} prequant scale must be shared across experts with shape [{axis}]"
            check(self.call.scales[index].numel() in (0, size), shared)
        if self.call.scales[4].numel() or self.call.scales[5].numel():
            raise NotImplementedError("the twin knows no zero points")

    def narrowed(self, value: Tensor, gemm: int) -> Tensor:
        """[rows, columns] of the input's dtype, times the columns' scales where there are any for both GEMMs, in E4M3."""
        if self.call.scales[2].numel() and self.call.scales[3].numel():
            value = (value * self.scale(2 + gemm).float()).to(self.call.input.dtype).float()
        return FLOATS["e4m3"].round(value.double()).float()

    def x(self) -> Tensor:
        """See Mode."""
        return self.narrowed(super().x(), 0)

    def weight(self, gemm: int, expert: int) -> Tensor:
        """See Mode."""
        rows, columns = self.sizes[gemm]
        codes = unpack_nibbles(sm90_weight_int4.LAYOUTS[0].unpack(dense(self.call.w[gemm])[expert], (rows, columns // 2)))
        scales = unfolded(self.scale(gemm), (128, 2), expert, (rows, columns // 128))
        return get("int4_g128").decode(Quantized(get("int4_g128"), codes, scales.float()), torch.float32)

    def alpha(self, gemm: int, expert: int) -> Tensor | float:
        """1 where none is given."""
        return self.scale(6 + gemm)[expert] if self.call.scales[6 + gemm].numel() else 1.0

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """See Mode."""
        return self.narrowed(super().middle(value, expert), 1)


def unfolded(stored: Tensor, fold: tuple[int, int], expert: int, shape: tuple[int, int]) -> Tensor:
    """An expert's scales [rows, K / group] from the fold (group, bytes of a scale) that the kernel reads, whatever shape they
    arrive in."""
    size = shape[0] * shape[1]
    flat = (stored.view(torch.uint8) if fold[1] == 1 else stored).flatten()
    return sm90_scale_fold.scale_fold(*fold).unpack(flat[expert * size : (expert + 1) * size], shape)


class Mxfp8(Mode):
    """E4M3 with E8M0 scales of 32 columns on both sides."""

    COUNT, TEXT, ALIGN, GROUP, WEIGHTS = 4, "MXFP8xMXFP8", 64, 32, "mxfp8"
    FIRST = 0  # of a GEMM's scales: the block scales

    def check_scales(self) -> None:
        """FC1's halves are rounded up to 128 rows each."""
        inter, hidden = (padded_shape(n, 1)[0] for n in (self.inter, self.hidden))
        self.wants_blocks(0, 0, self.GROUP, (1 + self.call.gated) * inter)
        self.wants_each(1, "fc1 global")
        self.wants_blocks(2, 1, self.GROUP, hidden)
        self.wants_each(3, "fc2 global")

    def x(self) -> Tensor:
        """See Mode."""
        sf = self.call.input_sf
        if sf is None:
            raise RuntimeError("Check failed: input_sf must be provided when use_mxfp8_act_scaling=True")
        codes, count = dense(self.call.input).view(torch.uint8), self.hidden // self.GROUP
        rows = codes.shape[0]
        scales = (
            unswizzle(dense(sf).view(torch.uint8).flatten(), rows, count) if self.call.swizzled else dense(sf).view(rows, -1)
        )
        return get("mxfp8").decode(Quantized(get("mxfp8"), codes, scales.view(torch.uint8)), torch.float32)

    def codes(self, gemm: int, expert: int) -> Tensor:
        """uint8 [rows, columns]: the weights' codes."""
        stored = dense(self.call.w[gemm])[expert].view(torch.uint8)
        return stored if self.WEIGHTS == "mxfp8" else unpack_nibbles(stored)

    def weight(self, gemm: int, expert: int) -> Tensor:
        """See Mode."""
        rows, columns = self.sizes[gemm]
        scales = blocks(self.scale(self.COUNT // 2 * gemm + self.FIRST), expert, rows, columns // self.GROUP)
        return get(self.WEIGHTS).decode(Quantized(get(self.WEIGHTS), self.codes(gemm, expert), scales), torch.float32)

    def alpha(self, gemm: int, expert: int) -> Tensor:
        """fc1_global and fc2_global."""
        return self.scale(self.COUNT // 2 * gemm + self.FIRST + 1)[expert]

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """Rounded to the output's type, then to MXFP8."""
        return quantised("mxfp8", super().middle(value, expert))


class Mxfp8Mxfp4(Mxfp8):
    """MXFP4 weights, 16 codes to an int64."""

    INNER, TEXT, WEIGHTS = 16, "W4A8_MXFP4_MXFP8", "mxfp4"

    def check_alignment(self) -> None:
        """See Mode."""
        for name, size in (("hidden_size", self.hidden), ("inter_size", self.inter)):
            check(size % 128 == 0, f"{name} must be divisible by 128 for MXFP4 weights")


class Nvfp4(Mxfp8):
    """NVFP4 on both sides: a global scale, E4M3 scales of 16 columns; x may come in fp16 or bf16."""

    INNER, COUNT, TEXT, ALIGN, GROUP, WEIGHTS, FIRST = 16, 6, "nvfp4", 32, 16, "nvfp4", 1

    def check_scales(self) -> None:
        """FC1's rows are rounded up to 64 for each half."""
        self.wants_one_or_each(0, "fc1 act global")
        self.wants_blocks(1, 0, self.GROUP, (1 + self.call.gated) * (-(-self.inter // 64) * 64))
        self.wants_each(2, "fc1 global")
        self.wants_one_or_each(3, "fc2 act global")
        self.wants_blocks(4, 1, self.GROUP, padded_shape(self.hidden, 1)[0])
        self.wants_each(5, "fc2 global")

    def x(self) -> Tensor:
        """Quantised on the way in."""
        if self.call.input.dtype not in HALVES or self.scale(0).dim():
            raise NotImplementedError("the twin takes fp16 or bf16 and one global scale of x")
        return quantised("nvfp4", dense(self.call.input).float(), self.scale(0))

    def middle(self, value: Tensor, expert: int) -> Tensor:
        """Rounded to the output's type, then to NVFP4."""
        return quantised("nvfp4", Mode.middle(self, value, expert), number(self.scale(3), expert))


def mode_of(call: Call) -> Mode:
    """The mode of these dtypes and flags; a later one of the constructor's list replaces an earlier one."""
    act, weight = call.input.dtype, call.w[0].dtype
    found: type[Mode] | None = None
    if act == weight and act in HALVES:
        found = Mode
    elif (act, weight) == (torch.bfloat16, E4M3) and call.fp8_block:
        found = Fp8Block
    if (act, weight) == (E4M3, E4M3) and not call.fp8_block:
        found = Mxfp8 if call.mxfp8_act else Fp8Tensor
    if weight == torch.int64:
        found = Nvfp4 if act != E4M3 else Mxfp8Mxfp4 if call.mxfp8_act else None
    if weight == torch.uint8 and act in HALVES and call.w4_group:
        found = W4A8 if call.packed else W4A16
        text = "SM90 MXFP4 W4A16 supports BF16 activations only; FP16 is incompatible with the interleaved weight layout."
        check(call.packed or act == torch.bfloat16, text)
    if found is None:
        given = (
            f"Activation: {NAMES.get(act, act)}, Weight: {NAMES.get(weight, weight)}, Output: {NAMES.get(call.out, call.out)}"
        )
        raise RuntimeError(f"Check failed: Could not construct fused moe op with the requested input combination {given}")
    return found(call)
