"""Encoders against quantisers that others wrote, over every finite bf16 value: no difference, or a named and exact one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.differences import FORMATS as DOCUMENTED
from reference.format import Format, Quantized, block_amax
from reference.formats import get
from reference.grid import E2M1, E4M3, E8M0

NVFP4_SCALES = (1.0, 2688 / 7, 2688.0, 2.0**-20, 1e20)  # global scales: blocks underflow, fit and clip


def witness(name: str) -> ModuleType:
    """The module of another library, or a skip that says which."""
    return pytest.importorskip(name, reason=f"the witness {name.split('.')[0]} is not installed")  # type: ignore[no-any-return]


@cache
def every_bf16(spread: int) -> Tensor:
    """[512, 128] bf16 holding every finite value once, zeros in place of the rest. `spread` magnitudes lie between
    neighbours of a row: 1 puts equals together, 128 makes each of a block's 16 the only one of its binade; 0 shuffles."""
    codes = torch.arange(65536, dtype=torch.int32)
    magnitude_first = ((codes >> 1) | ((codes & 1) << 15)).to(torch.int16).view(torch.bfloat16)
    values = torch.where(magnitude_first.isfinite(), magnitude_first, 0.0)
    if spread == 0:
        order = torch.randperm(65536, generator=torch.Generator().manual_seed(0))
        return values[order].view(512, 128)
    return values.view(-1, 2 * spread * 16).unflatten(1, (16, -1)).transpose(1, 2).reshape(512, 128).contiguous()


SPREADS = (1, 16, 64, 128, 0)
each_spread = pytest.mark.parametrize("spread", SPREADS)


def unpack(packed: Tensor) -> Tensor:
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def differences(q: Quantized, codes: Tensor, scales: Tensor) -> tuple[int, int]:
    """(elements, scales) in which a witness differs."""
    assert q.scales is not None
    return int((q.codes != codes).sum()), int((q.scales != scales.reshape(q.scales.shape)).sum())


def test_the_arrangements_hold_every_finite_value() -> None:
    for spread in SPREADS:
        bits = every_bf16(spread).view(torch.int16)
        assert len(bits.unique()) == 65536 - 2 * 128
    assert len(torch.frexp(every_bf16(128)[300, :16].float())[1].unique()) >= 15


# --- torchao ---------------------------------------------------------------------------------------------------------

TORCHAO_MX = [
    *[("mxfp4:" + rule, torch.float4_e2m1fn_x2, mode) for rule, mode in (("ocp", "FLOOR"), ("even", "EVEN"))],
    *[("mxfp4:" + rule, torch.float4_e2m1fn_x2, mode) for rule, mode in (("torchao_ceil", "CEIL"), ("rceil", "RCEIL"))],
    *[("mxfp8:" + rule, torch.float8_e4m3fn, mode) for rule, mode in (("ocp", "FLOOR"), ("even", "EVEN"))],
    *[("mxfp8:" + rule, torch.float8_e4m3fn, mode) for rule, mode in (("torchao_ceil", "CEIL"), ("rceil", "RCEIL"))],
    ("mxfp8_e5m2:ocp", torch.float8_e5m2, "FLOOR"),
]


def torchao_mx(x: Tensor, dtype: torch.dtype, mode: str) -> tuple[Tensor, Tensor]:
    """(codes, scale bytes)."""
    mx = witness("torchao.prototype.mx_formats.mx_tensor")
    scales, codes = mx.to_mx(x, dtype, 32, mx.ScaleCalculationMode[mode])
    codes = unpack(codes) if dtype == torch.float4_e2m1fn_x2 else codes.view(torch.uint8)
    return codes, scales.view(torch.uint8)


@each_spread
@pytest.mark.parametrize(("name", "dtype", "mode"), TORCHAO_MX, ids=lambda p: p if isinstance(p, str) else "")
def test_mx_rules_equal_torchao(name: str, dtype: torch.dtype, mode: str, spread: int) -> None:
    x = every_bf16(spread)
    assert differences(get(name).encode(x), *torchao_mx(x, dtype, mode)) == (0, 0)


def torchao_nvfp4(x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    nvfp4 = witness("torchao.prototype.mx_formats.nvfp4_tensor")
    scales, codes = nvfp4.nvfp4_quantize(x, per_tensor_scale=1 / gs)
    return unpack(codes), scales.view(torch.uint8)


@each_spread
@pytest.mark.parametrize("gs", NVFP4_SCALES)
def test_nvfp4_equals_torchao(gs: float, spread: int) -> None:
    x, scale = every_bf16(spread), torch.tensor(gs)
    assert differences(get("nvfp4:torchao").encode(x, scale), *torchao_nvfp4(x, scale)) == (0, 0)


FP8 = [
    ("fp8_tensor", (512, 128), torch.float8_e4m3fn),
    ("fp8_channel", (1, 128), torch.float8_e4m3fn),
    ("fp8_token", (1, 128), torch.float8_e4m3fn),
    ("fp8_fnuz_tensor", (512, 128), torch.float8_e4m3fnuz),
    ("fp8_fnuz_channel", (1, 128), torch.float8_e4m3fnuz),
]


@each_spread
@pytest.mark.parametrize(("name", "block", "dtype"), FP8, ids=lambda p: p if isinstance(p, str) else "")
def test_fp8_scales_and_codes_equal_torchao(name: str, block: tuple[int, int], dtype: torch.dtype, spread: int) -> None:
    """Rows of which the maximum is 0, or so small that amax / 448 is 0, are a difference: torchao divides by that 0."""
    ao = witness("torchao.quantization.quant_primitives")
    x = every_bf16(spread).float()
    scales = ao._choose_scale_float8(x, list(block), dtype)
    codes = ao._quantize_affine_float8(x, scales, dtype).view(torch.uint8)
    q = get(name).encode(x)
    assert q.scales is not None
    sane = scales != 0
    assert torch.equal(q.scales[sane], scales[sane])
    assert (q.scales[~sane] == 1).all()
    rows = sane.expand(512, 1).flatten()
    assert torch.equal(q.codes[rows], codes[rows])


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(x: Tensor, gs: Tensor | None = None, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(x in groups quantised to values, scales, zero points, arguments) by compressed-tensors, all in x's dtype."""
    ct = witness("compressed_tensors.quantization")
    forward = witness("compressed_tensors.quantization.lifecycle.forward")
    args = ct.QuantizationArgs(**arguments)
    scales, zeros = ct.utils.compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=gs)
    zero = None if args.symmetric else zeros
    values = forward.quantize(x=x, scale=scales, zero_point=zero, args=args, global_scale=gs)
    return values, scales, zeros, args


def with_lost_signs(codes: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """FP4 codes with the sign bit that its cast drops where x / scale is -0.0: it multiplies by torch.sign(x), there +0."""
    scaled = x / scales.repeat_interleave(x.shape[1] // scales.shape[1], dim=1)
    return torch.where((scaled == 0) & scaled.signbit(), codes | 8, codes)


@each_spread
@pytest.mark.parametrize("gs", NVFP4_SCALES)
def test_nvfp4_equals_compressed_tensors(gs: float, spread: int) -> None:
    """Scales as its dynamic quantiser finds them, codes through its packer, the signs of -0.0 restored."""
    helpers = witness("compressed_tensors.compressors.nvfp4.helpers")
    x, scale = every_bf16(spread).float(), torch.tensor([gs])
    values, scales, _, _ = compressed(
        x, scale, num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    codes = with_lost_signs(unpack(helpers.pack_fp4_to_uint8(values)), x, scales / scale)
    bytes_ = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    assert differences(get("nvfp4:compressed_tensors").encode(x, scale), codes, bytes_) == (0, 0)


@each_spread
@pytest.mark.parametrize(("name", "bits"), [("mxfp4:even", 4), ("mxfp8:compressed_tensors", 8)])
def test_mx_rules_equal_compressed_tensors(name: str, bits: int, spread: int) -> None:
    """Block scales of 2**-127 divide as themselves here; torchao, whose rule mxfp4:even is, takes them for 2**-126. From
    1.75 * 2**127 up its rounded maximum, and so the scale, is inf and the stored byte meaningless."""
    helpers = witness("compressed_tensors.compressors.nvfp4.helpers")
    mx = witness("compressed_tensors.compressors.mx_utils")
    x = every_bf16(spread).float()
    values, scales, _, _ = compressed(x, num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    bytes_ = mx.compress_mx_scale(scales, torch.uint8)
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8)
    if bits == 4:
        codes = with_lost_signs(unpack(helpers.pack_fp4_to_uint8(values)), x, scales)
    q = get(name).encode(x)
    assert q.scales is not None
    finite = scales.isfinite()
    assert torch.equal(finite, block_amax(x, (1, 32)) < 1.75 * 2.0**127)
    assert torch.equal(q.scales[finite], bytes_[finite])
    plain = (finite & ((bytes_ > 0) | (bits == 8))).repeat_interleave(32, dim=1)
    assert torch.equal(q.codes[plain], codes[plain])


@each_spread
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_groups_equal_compressed_tensors(symmetric: bool, size: int, spread: int) -> None:
    """Codes through its int32 packer, which stores code + 8, first column in the lowest nibble; zero points likewise."""
    helpers = witness("compressed_tensors.compressors.pack_quantized.helpers")
    x = every_bf16(spread).float() / 4  # max - min of finite values must be finite
    values, scales, zeros, _ = compressed(x, num_bits=4, type="int", strategy="group", group_size=size, symmetric=symmetric)
    words = helpers.pack_to_int32(values.to(torch.int8), 4)
    nibbles = unpack(words.view(torch.uint8))
    q = get(f"int4_g{size}:compressed_tensors" if symmetric else f"int4_g{size}_zp").encode(x)
    assert q.scales is not None
    assert torch.equal((q.codes + 8) & 0xF, nibbles)
    assert torch.equal(q.scales, scales.bfloat16().float() if symmetric else scales)
    if not symmetric:
        assert q.zeros is not None
        assert torch.equal(q.zeros, (zeros.to(torch.int8) & 0xF).view(torch.uint8))


# --- FlashInfer's quantisers in torch --------------------------------------------------------------------------------


@each_spread
def test_linear_mxfp4_equals_flashinfer(spread: int) -> None:
    prepare = witness("flashinfer.fused_moe.prepare")
    codes, scales = prepare._quantize_mxfp4_linear(every_bf16(spread))
    assert differences(get("mxfp4:linear").encode(every_bf16(spread)), unpack(codes), scales) == (0, 0)


@each_spread
def test_int4_and_mxint4_equal_flashinfer(spread: int) -> None:
    prepare = witness("flashinfer.fused_moe.prepare")
    x = every_bf16(spread)
    codes, scales = prepare._quantize_int4_grouped(x[None])
    assert differences(get("int4_g128").encode(x), unpack(codes[0]), scales[0].float()) == (0, 0)
    codes, scales = prepare._mxint4_quantize(x)
    assert differences(get("mxint4").encode(x), unpack(codes), scales.float()) == (0, 0)


@each_spread
def test_fp8_recipes_equal_flashinfer(spread: int) -> None:
    prepare = witness("flashinfer.fused_moe.prepare")
    x = every_bf16(spread)
    codes, scales = prepare._deepseek_fp8_quantize_activations(x)
    assert differences(get("fp8_group").encode(x), codes.view(torch.uint8), scales.T) == (0, 0)
    codes, scales = prepare._deepseek_fp8_quantize_weights(x[None])
    assert differences(get("fp8_block").encode(x), codes[0].view(torch.uint8), scales[0]) == (0, 0)
    codes, multipliers = prepare._quantize_fp8_per_expert(x[None])
    assert differences(get("fp8_tensor:multiplier").encode(x), codes[0].view(torch.uint8), 1 / multipliers) == (0, 0)


# --- Conventions that differ -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Two rules for the same bytes. `predict` derives the second's scale codes from the first's; it must be right for every
    block, and some block must differ. Equal scales give equal codes unless `codes_too`."""

    first: str
    second: str
    why: str
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]  # (first's scale codes, second's own, amax) -> second's
    gs: float | None = None
    codes_too: bool = False


def mantissa(amax: Tensor) -> Tensor:
    """1 <= m < 2 of a normal amax; 0 where amax is 0."""
    return 2 * torch.frexp(amax)[0]


def normal(amax: Tensor) -> Tensor:
    """No scale byte is 0 or above 253, and no subnormal of the block reaches the grid: flushed or not, it is 0."""
    return (amax >= 2.0**-100) & (amax < 2.0**127)


def steps(above: float, below: float = 2.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The second scale is one binade up where above < mantissa of amax < below; outside normal maxima nothing is said."""

    def predict(first: Tensor, second: Tensor, amax: Tensor) -> Tensor:
        up = (mantissa(amax) > above) & (mantissa(amax) < below)
        return torch.where(normal(amax), first + up.to(torch.uint8), second)

    return predict


def at_least(byte: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The second scale is never below `byte`; one code either way where the two round a tie from different sides."""

    def predict(first: Tensor, second: Tensor, amax: Tensor) -> Tensor:
        floored = first.clamp(min=byte)
        return torch.where((floored.int() - second.int()).abs() <= 1, second, floored)

    return predict


def zero_is(byte: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The second scale is `byte` where the first is 0, else the same up to one code."""

    def predict(first: Tensor, second: Tensor, amax: Tensor) -> Tensor:
        replaced = torch.where(first == 0, byte, first)
        return torch.where((first != 0) & ((replaced.int() - second.int()).abs() <= 1), second, replaced)

    return predict


def same(first: Tensor, second: Tensor, amax: Tensor) -> Tensor:
    """Equal scales of normal maxima: the rules differ in the codes."""
    return torch.where(normal(amax), first, second)


def one_where_zero(first: Tensor, second: Tensor, amax: Tensor) -> Tensor:
    """The second scale is 1.0 where amax is 0."""
    return torch.where(amax == 0, 0x38, first)


BELOW_HALF = 1.75 - 2.0**-8  # bf16 mantissas above it are 1.75 and up
DIFFERENCES = (
    Difference("mxfp4:ocp", "mxfp4", "floor clips what lies above 6 * scale, ceil of amax / 6 never clips", steps(1.5)),
    Difference("mxfp4:ocp", "mxfp4:even", "EVEN goes up from mantissa 1.75, which E2M1 would round to 8", steps(BELOW_HALF)),
    Difference("mxfp4:ocp", "mxfp4:torchao_ceil", "CEIL goes up unless amax is a power of two", steps(1.0)),
    Difference("mxfp4:triton_down_v1", "mxfp4:ocp", "floor of amax / 6 is a binade lower below mantissa 1.5", steps(0.0, 1.5)),
    Difference("mxfp8:ocp", "mxfp8", "floor clips what lies above 448 * scale, ceil of amax / 448 never clips", steps(1.75)),
    Difference("mxfp8:ocp", "mxfp8:compressed_tensors", "rounds amax to one mantissa bit", steps(BELOW_HALF)),
    Difference("mxfp8:ocp", "mxfp8:even", "rounds amax to three mantissa bits", steps(1.9375 - 2.0**-8)),
    Difference("mxfp4:triton_up", "mxfp4:linear", "ties go to the lower magnitude, -0.0 loses its sign", same, codes_too=True),
    Difference("mxfp4:triton_up", "mxfp4:triton_away", "ties go away from zero", same, codes_too=True),
    Difference("nvfp4", "nvfp4:torchao", "block scales of at least 2**-6", at_least(0x08), 1.0, codes_too=True),
    Difference("nvfp4", "nvfp4:compressed_tensors", "a zero scale becomes 0.125", zero_is(0x20), 1.0, codes_too=True),
    Difference("nvfp4", "nvfp4:modelopt", "zero blocks: 1.0; underflow: zeros are 0 / 0", one_where_zero, 1.0, codes_too=True),
    Difference("nvfp4", "nvfp4:vllm", "blocks whose scale rounds to 0 get codes 0, not +-6", same, 1.0, codes_too=True),
    Difference("nvfp4", "nvfp4:fast", "such blocks have zeros of code 7: 0 * inf", same, 1.0, codes_too=True),
)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: f"{d.first}->{d.second}")
def test_conventions_differ_exactly_as_described(difference: Difference) -> None:
    first, second = get(difference.first), get(difference.second)
    differ = 0
    for spread in SPREADS:
        x = every_bf16(spread)
        gs = None if difference.gs is None else torch.tensor(difference.gs)
        a, b = first.encode(x, gs), second.encode(x, gs)
        assert a.scales is not None
        assert b.scales is not None
        amax = block_amax(x, first.scaling.group)  # type: ignore[union-attr]
        assert torch.equal(difference.predict(a.scales, b.scales, amax), b.scales)
        apart = a.codes != b.codes
        if not difference.codes_too:
            equal_scales = (a.scales == b.scales) & normal(amax)
            assert not (apart & equal_scales.repeat_interleave(x.shape[1] // amax.shape[1], dim=1)).any()
        differ += int((a.scales != b.scales).sum()) + int(apart.sum())
    assert differ > 0


def test_ties_are_all_that_directed_rounding_changes() -> None:
    """The codes of `linear` and `triton_away` differ from nearest even where the scaled value is a midpoint, or is -0.0."""
    for spread in SPREADS:
        x = every_bf16(spread)
        even, lower, away = (get(f"mxfp4:{rule}").encode(x) for rule in ("triton_up", "linear", "triton_away"))
        assert even.scales is not None
        scaled = x.float() / E8M0.decode(even.scales, torch.float32).repeat_interleave(32, dim=1)  # may underflow to -0.0
        usable = normal(block_amax(x, (1, 32))).repeat_interleave(32, dim=1)
        tie = torch.isin(scaled.abs(), E2M1.midpoints.float())
        minus = (scaled == 0) & scaled.signbit()
        assert torch.equal((even.codes != lower.codes) & usable, (tie & ((even.codes - lower.codes) == 1) | minus) & usable)
        assert torch.equal((even.codes != away.codes) & usable, tie & ((away.codes - even.codes) == 1) & usable)


def test_ml_dtypes_has_other_specials() -> None:
    """Overflow and inf are NaN, not +-max; NaN in E2M1 is -0 or 0; E8M0 rounds to nearest and has no zero."""
    ml = witness("ml_dtypes")
    np = witness("numpy")
    wide = np.array([465.0, np.inf, -np.inf], dtype=np.float32)
    assert wide.astype(ml.float8_e4m3fn).view(np.uint8).tolist() == [0x7F, 0x7F, 0xFF]
    assert E4M3.encode(torch.tensor(wide)).tolist() == [0x7E, 0x7E, 0xFE]
    nans = np.array([np.nan, -np.nan], dtype=np.float32)
    assert nans.astype(ml.float4_e2m1fn).view(np.uint8).tolist() == [8, 0]
    assert E2M1.encode(torch.tensor(nans)).tolist() == [7, 7]
    scales = np.array([0.0, 1.25, 1.5, -1.0], dtype=np.float32)
    assert scales.astype(ml.float8_e8m0fnu).view(np.uint8).tolist() == [255, 127, 128, 255]
    assert E8M0.encode(torch.tensor(scales)).tolist() == [0, 128, 128, 127]


def test_compressed_tensors_drops_the_sign_of_minus_zero_only() -> None:
    """A negative that is rounded to 0 keeps its sign, one that was -0.0 before the cast does not."""
    helpers = witness("compressed_tensors.compressors.nvfp4.helpers")
    x = torch.tensor([[-0.0, -0.1] + [6.0] * 14])
    values, _, _, _ = compressed(
        x, torch.ones(1), num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    assert unpack(helpers.pack_fp4_to_uint8(values))[0, :2].tolist() == [0, 8]
    assert get("nvfp4:compressed_tensors").encode(x, torch.ones(1)).codes[0, :2].tolist() == [8, 8]


def test_every_format_with_a_witness_is_named_here() -> None:
    """The two tables name existing rules only."""
    names = {d.first for d in DIFFERENCES} | {d.second for d in DIFFERENCES} | {name for name, _, _ in TORCHAO_MX}
    assert all(isinstance(get(name), Format) for name in names)


def test_the_documented_differences_are_these() -> None:
    assert [(d.first, d.second, d.why) for d in DIFFERENCES] == list(DOCUMENTED)
