"""Where rules differ only at the ends of the number range: flushed subnormals, overflowing reciprocals, floors, near ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.format import Quantized
from reference.formats import all_formats, get
from reference.formats.fp8_fnuz import from_e4m3
from reference.formats.nvfp4 import token_global_scales

FLT_MAX = torch.finfo(torch.float32).max


def encode(name: str, values: list[float], gs: float | None = None) -> tuple[list[int], list[float]]:
    """(codes, scales) of one row."""
    q = get(name).encode(torch.tensor([values]), None if gs is None else torch.tensor(gs))
    assert q.scales is not None
    return q.codes[0].tolist(), q.scales.flatten().tolist()


@pytest.mark.parametrize(("name", "limit"), [("mxfp4", 6.0), ("mxfp8", 448.0)])
def test_cuda_flushes_a_subnormal_quotient_before_rounding_it_up(name: str, limit: float) -> None:
    """amax / limit = 0.75 * 2**-126: flushed it is byte 0, kept (torchao) byte 1."""
    amax = limit * 0.75 * 2.0**-126
    assert encode(name, [amax])[1] == [0]
    assert encode(f"{name}:rceil", [amax])[1] == [1]


def test_cuda_reads_subnormal_elements_as_zero() -> None:
    """2**-127 beside 6 * 2**-126 scales to 0.5; flushed it is a zero of its sign."""
    values = [6 * 2.0**-126, 2.0**-127, -(2.0**-127)]
    assert encode("mxfp4", values) == ([7, 0, 8], [1])
    assert encode("mxfp4:triton_up", values) == ([7, 1, 9], [1])


def test_the_lost_sticky_bit_spans_three_float32_values() -> None:
    values = [4.0, *(0.25 + i * 2.0**-25 for i in range(5))]
    assert encode("mxfp4:triton_lost_sticky", values)[0] == [6, 0, 0, 0, 0, 1]
    assert encode("mxfp4:triton_up", values)[0] == [6, 0, 1, 1, 1, 1]


def test_the_exact_and_the_fast_recipe_flush_different_products() -> None:
    """amax / 6 is subnormal and gs / 6 is not: the exact order keeps the scale, the fast one loses it."""
    assert encode("nvfp4", [2.0**-124], 2.0**124)[1] == [0x23]  # 0.1667 -> 0.171875
    assert encode("nvfp4:fast", [2.0**-124], 2.0**124)[1] == [0]


def test_a_global_scale_with_a_subnormal_reciprocal_saturates_its_blocks() -> None:
    """1 / 2**127 is flushed, so the multiplier is FLT_MAX instead of 2**127 / 22."""
    values = [2.0**-120, 2.0**-124]
    assert encode("nvfp4", values, 2.0**127)[0] == [7, 7]
    assert encode("nvfp4:compressed_tensors", values, 2.0**127)[0] == [7, 1]


def test_a_tiny_row_has_the_largest_finite_global_scale() -> None:
    assert token_global_scales(torch.tensor([[1e-37], [0.0]])).tolist() == [FLT_MAX, FLT_MAX]


def test_a_multiplier_does_not_overflow() -> None:
    scale = encode("fp8_token:humming", [1e-37])[1][0]
    assert scale == pytest.approx(1 / FLT_MAX, rel=1e-6, abs=0)
    assert encode("fp8_token:humming", [1.0, float("nan")])[0] == [0x7E, 0x7F]


def test_floors_are_the_stated_numbers() -> None:
    """Goldens share their constants with the rules; these do not."""
    floors = {
        "fp8_group": 1e-12,
        "fp8_group:deepgemm": 1e-4 / 448,
        "fp8_group:vllm": 1e-10 / 448,
        "fp8_group:trtllm": 2.0**-126,
        "fp8_token:vllm": 1 / 229376,
        "fp8_token:trtllm": 1 / 229376,
        "fp8_fnuz_channel:vllm_token": 1 / 114688,
        "int8_token:vllm": 1e-10 / 127,
        "int4_g32_zp": 2.0**-23,
        "int4_g32_zp:awq": 1e-5 / 15,
    }
    for name, floor in floors.items():
        assert encode(name, [0.0])[1] == [pytest.approx(floor, rel=1e-6, abs=0)], name


def test_zero_points_are_added_before_or_after_rounding() -> None:
    """1.5 with zero point -7: rint(1.5) - 7 = -5 in AutoAWQ, rint(-5.5) = -6 in compressed-tensors."""
    values = [-1.0, 14.0, 1.5]
    assert encode("int4_g32_zp:awq", values) == ([8, 7, 0x10 - 5], [1.0])
    assert encode("int4_g32_zp", values) == ([8, 7, 0x10 - 6], [1.0])


def test_a_quotient_of_subnormals_clamps_the_zero_point() -> None:
    """-22 ulp / 15 rounds to a scale of 1 ulp, so min / s is -22; -7 ulp / 15 to 0, so it is infinite. 7 is the last code."""
    ulp = 2.0**-149
    assert encode("int4_g32_zp", [-22 * ulp, -8 * ulp, 0.0]) == ([8, 0xF, 7], [ulp])
    q = get("int4_g32_zp").encode(torch.tensor([[-7 * ulp, 0.0]]))
    assert q.zeros is not None
    assert (q.zeros.tolist(), q.codes.tolist()) == ([[7]], [[7, 7]])


@pytest.mark.parametrize(("sign", "zero"), [(1.0, 8), (-1.0, 7)])
def test_a_block_on_one_side_of_zero_holds_zero(sign: float, zero: int) -> None:
    """All 32 columns are given: padding, which is 0, would hide a range that starts at the smallest value."""
    q = get("int4_g32_zp").encode(torch.linspace(0.25, 0.5, 32)[None] * sign)
    assert q.scales is not None
    assert q.zeros is not None
    assert (q.scales.item(), q.zeros.item()) == (pytest.approx(0.5 / 15), zero)


def test_an_infinite_maximum_flushes_the_reciprocal() -> None:
    """2**-127 is subnormal: 0, and 0 times infinity is NaN, which fmax turns into +448."""
    assert encode("mxfp8", [-torch.inf, -1.0, torch.inf]) == ([0x7E, 0x80, 0x7E], [254])


def test_zero_points_decode_to_the_values() -> None:
    fmt, x = get("int4_g32_zp"), torch.tensor([[-1.0, 14.0, 2.0, 0.0]])
    assert fmt.decode(fmt.encode(x)).tolist() == x.tolist()


def test_eight_sevenths_in_one_or_two_roundings_moves_few_codes() -> None:
    x = torch.randn(2000, 640, generator=torch.Generator().manual_seed(2))
    one, two = get("mxint4").encode(x), get("mxint4:flat_test").encode(x)
    assert one.scales is not None
    assert torch.equal(one.scales, two.scales)  # type: ignore[arg-type]
    assert 0 < (one.codes != two.codes).double().mean() < 2e-3


def test_an_fn_checkpoint_read_as_fnuz_has_the_same_values() -> None:
    codes = torch.tensor([[c for c in range(256) if c not in (0x7F, 0xFF)]], dtype=torch.uint8)
    q = Quantized(get("fp8_tensor"), codes, torch.tensor([[0.5]]))
    moved = from_e4m3(q, get("fp8_fnuz_tensor"))
    assert torch.equal(get("fp8_fnuz_tensor").decode(moved), get("fp8_tensor").decode(q))
    assert moved.scales is not None
    assert moved.scales.tolist() == [[1.0]]


@pytest.mark.parametrize("name", ["fp8_group", "fp8_block", "int8_tensor", "mxfp4", "nvfp4", "nvfp4_4over6", "int4_g128_zp"])
def test_bf16_and_its_float32_copy_encode_alike(name: str) -> None:
    x: Tensor = torch.randn(130, 200, generator=torch.Generator().manual_seed(3)).bfloat16()
    fmt = get(name)
    a, b = fmt.encode(x, fmt.fit_global_scale(x)), fmt.encode(x.float(), fmt.fit_global_scale(x.float()))
    assert torch.equal(a.codes, b.codes)
    assert a.codes.shape == (130, 200)
    assert torch.equal(a.scales, b.scales)  # type: ignore[arg-type]


def test_unknown_rules_name_the_known_ones() -> None:
    with pytest.raises(KeyError, match="triton_up"):
        get("mxfp4:triton")
    with pytest.raises(KeyError, match="known: none"):
        get("bf16:fast")


KEEPS_NAN = {  # scale byte and codes of [NaN, -3, 1, ...]: 255 poisons the block; Triton's rounding up wraps NaN to byte 0
    **dict.fromkeys([f"mxfp4:{rule}" for rule in ("ocp", "even", "torchao_ceil", "rceil")], (255, [7, 7, 7])),
    **dict.fromkeys(["mxfp4:triton_down", "mxfp4:triton_down_v1"], (255, [7, 7, 7])),
    **dict.fromkeys([f"mxfp4:triton_{rule}" for rule in ("up", "away", "lost_sticky")], (0, [7, 8, 0])),
    **dict.fromkeys([f"mxfp8:{rule}" for rule in ("ocp", "even", "compressed_tensors", "torchao_ceil")], (255, [127] * 3)),
    **dict.fromkeys([f"mxfp8:{rule}" for rule in ("rceil", "vllm", "vllm_v1", "triton_down")], (255, [127] * 3)),
    "mxfp8:triton_up": (0, [127, 128, 0]),
    "mxfp8_e5m2": (0, [126, 128, 0]),
    "mxfp8_e5m2:ocp": (255, [126] * 3),
}
FLUSHED = {"mxfp4", "mxfp4:cute_dsl", "mxfp8", "nvfp4", "nvfp4:fast", "nvfp4:vllm", "nvfp4_token", "nvfp4_token:trtllm"}
RULES = {rule.name: rule for fmt in all_formats().values() for rule in fmt.rules() if rule.scaling is not None}


def with_global(name: str, x: Tensor, scale: float) -> Quantized:
    scaling = RULES[name].scaling
    assert scaling is not None
    return RULES[name].encode(x, torch.tensor([scale]) if scaling.global_scale else None)


@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(("mx", "nv", "int8", "fp8"))])
def test_a_nan_counts_in_the_maximum_or_does_not(name: str) -> None:
    """By the library: those whose maximum propagates NaN are listed, all others find the scale among the numbers."""
    row = torch.ones(1, 128)
    row[0, :2] = torch.tensor([float("nan"), -3.0])
    got = with_global(name, row, 1.0)
    assert got.scales is not None
    if name in KEEPS_NAN:
        byte, codes = KEEPS_NAN[name]
        assert (got.scales[0, 0].item(), got.codes[0, :3].tolist()) == (byte, codes)
    else:
        without = with_global(name, row.nan_to_num(0.0), 1.0)
        assert torch.equal(got.scales, without.scales)
        assert torch.equal(got.codes[0, 1:], without.codes[0, 1:])


@pytest.mark.parametrize("name", [n for n in RULES if n.startswith(("mxfp", "nv")) and n != "mxfp4:deepgemm"])
def test_subnormal_inputs_are_flushed_where_the_kernel_flushes(name: str) -> None:
    """The scale is normal, a negative subnormal is large enough for a code of its own: kept, or 0 (and NaN, hence positive,
    where the fast reciprocal is infinite). DeepGEMM's scale never gets this small."""
    row = torch.zeros(1, 128)
    row[0, 0] = {"mxfp8": 2.0**-117, "mxfp4": 2.0**-123}.get(name.split(":")[0].removesuffix("_e5m2"), 2.0**-126 * 1.5)
    row[0, 1] = -1.5 * 2.0**-127
    code = with_global(name, row, 4 * 2.0**126).codes[0, 1].item()
    flushed = name in FLUSHED or name.startswith("nvfp4_4over6")
    assert (code > 1 << (RULES[name].element.bits - 1)) == (not flushed)


LEAST = {  # the scale of a block of the smallest subnormals: what each rule clamps it, or the maximum, to
    "int8_token:vllm": 1e-10 / 127,
    "int8_group:vllm": 1e-10 / 127,
    "int8_group:cutile": 1e-10 / 127,
    "fp8_token:vllm": 1 / (448 * 512),
    "fp8_token:trtllm": 1 / (448 * 512),
    "fp8_group": 1e-12,
    "fp8_group:deepgemm": 1e-4 / 448,
    "fp8_group:deepgemm_ue8m0": 2.0**-22,
    "fp8_group:vllm": 1e-10 / 448,
    "fp8_group:vllm_ue8m0": 2.0**-33,
    "fp8_group:vllm_triton": 1e-10 / 448,
    "fp8_group:cutile": 1e-10 / 448,
    "fp8_group:trtllm": 2.0**-126,
    "fp8_block": 1e-12,
    "fp8_block:deepgemm": 1e-4 / 448,
    "fp8_block:deepgemm_ue8m0": 2.0**-22,
    "fp8_fnuz_channel:vllm_token": 1 / (224 * 512),
}


@pytest.mark.parametrize("name", LEAST)
def test_a_block_of_almost_nothing_has_the_least_scale(name: str) -> None:
    scales = with_global(name, torch.full((128, 128), 2.0**-149), 1.0).scales
    assert scales is not None
    assert scales.flatten().tolist() == pytest.approx([LEAST[name]] * scales.numel(), rel=1e-6, abs=0)


@pytest.mark.parametrize("name", ["fp8_group:vllm_ue8m0", "fp8_group:deepgemm_ue8m0"])
def test_a_power_of_two_scale_stays_finite(name: str) -> None:
    scales = with_global(name, torch.full((1, 128), float("inf")), 1.0).scales
    assert scales is not None
    assert scales.tolist() == [[2.0**127]]


@pytest.mark.parametrize("name", RULES)
def test_scaled_formats_say_that_they_saturate(name: str) -> None:
    assert RULES[name].saturates


@pytest.mark.parametrize("name", ["mxfp4:deepgemm", "mxfp8:vllm_v1"])
def test_an_infinite_maximum_has_the_last_finite_scale(name: str) -> None:
    scales = with_global(name, torch.full((1, 32), float("inf")), 1.0).scales
    assert scales is not None
    assert scales.tolist() == [[254]]


@pytest.mark.parametrize("name", [name for name, fmt in all_formats().items() if fmt.scaling is None])
def test_a_plain_format_says_that_it_saturates_and_does(name: str) -> None:
    """A torch cast of 1e38 to fp16 gives inf."""
    fmt = get(name)
    assert fmt.saturates
    assert fmt.encode(torch.tensor([[1e39, -1e39]], dtype=torch.float64)).codes.isfinite().all()


def test_a_floor_scale_stays_below_just_under_a_power_of_two() -> None:
    """No bf16 value comes that close: only a float32 amax of all ones tells a floor from a rounding up."""
    x = torch.zeros(1, 32)
    x[0, 0] = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0))
    scales = get("mxfp4:ocp").encode(x).scales
    assert scales is not None
    assert scales.tolist() == [[127]]  # floor(log2 amax) - 2 = 0
