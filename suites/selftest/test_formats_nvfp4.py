"""NVFP4 beyond its goldens: the public dequantiser and what it refuses, global scales of every kind, four over six."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.formats import get
from reference.formats.nvfp4 import (
    dequantize_nvfp4_to_dtype,
    encode_experts,
    encode_sense,
    shared_global_scale,
    token_global_scales,
)

FLT_MAX = torch.finfo(torch.float32).max


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def packed(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q = get("nvfp4").encode(x, torch.tensor(global_scale))
    assert q.scales is not None
    return q.codes[:, 0::2] | (q.codes[:, 1::2] << 4), q.scales, torch.tensor([global_scale])


def test_the_worked_example_unpacks_from_its_bytes() -> None:
    codes = torch.tensor([[0x00, 0x19, 0xA2, 0x33, 0x5C, 0xD5, 0x76, 0x78]], dtype=torch.uint8)
    value = dequantize_nvfp4_to_dtype(codes, torch.tensor([[0x7E]], dtype=torch.uint8), torch.tensor([384.0]), torch.float32)
    third = 7 / 12
    wanted = [0, 0, -1, 1, 2, -2, 3, 3, -4, 6, 6, -6, 8, 12, 0, 12]
    assert torch.allclose(value, torch.tensor([wanted]) * third, rtol=1e-7)
    assert torch.signbit(value[0, 14])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dequantised_values_are_the_decoded_ones_rounded_once(dtype: torch.dtype) -> None:
    x = noise(5, 64)
    codes, scales, global_scale = packed(x, 700.0)
    exact = get("nvfp4").decode(get("nvfp4").encode(x, global_scale))
    value = dequantize_nvfp4_to_dtype(codes, scales.view(torch.float8_e4m3fn), global_scale.reshape(()), dtype)
    assert value.dtype == dtype
    assert torch.equal(value, exact.to(dtype))


def test_a_global_scale_per_expert_is_refused_with_the_way_out() -> None:
    codes, scales, _ = packed(noise(4, 32), 700.0)
    with pytest.raises(ValueError, match=r"shape \(8,\).*\[1\] or \[\].*expert by expert.*range\(8\)"):
        dequantize_nvfp4_to_dtype(codes, scales, torch.ones(8), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 32}, "one scale per 16 elements, got block_size=32"),
        ({"codes": torch.zeros(4, 16)}, "wanted uint8 .* got torch.float32"),
        ({"codes": torch.zeros(2, 4, 16, dtype=torch.uint8)}, r"got torch.uint8 \(2, 4, 16\).*expert by expert"),
        ({"codes": torch.zeros(4, 15, dtype=torch.uint8)}, "K must be a multiple of 16"),
        ({"scales": torch.zeros(4, 4, dtype=torch.uint8)}, r"= \[4, 2\] in linear order.*got \(4, 4\); unswizzle"),
        ({"scales": torch.zeros(128, 4, dtype=torch.uint8)}, "unswizzle padded"),
        ({"scales": torch.ones(4, 2)}, "a cast is not a view"),
        ({"global_scale": torch.ones(1, dtype=torch.bfloat16)}, "wanted float32, got torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    codes, scales, global_scale = packed(noise(4, 32), 700.0)
    given = {"codes": codes, "scales": scales, "global_scale": global_scale, "dtype": torch.bfloat16, **change}
    with pytest.raises(ValueError, match=message):
        dequantize_nvfp4_to_dtype(**given)  # type: ignore[arg-type]


def test_the_fitted_global_scale_uses_the_whole_range() -> None:
    x = torch.tensor([[7.0, -3.0], [0.0, 1.0], [0.0, 0.0]])
    assert get("nvfp4").fit_global_scale(x) == 384.0
    assert get("nvfp4").fit_global_scale(x[2:]) == FLT_MAX
    assert get("nvfp4_4over6_256").fit_global_scale(x) == 1536 / 7
    token = get("nvfp4_token").fit_global_scale(x)
    assert token is not None
    assert token.tolist() == [384.0, 2688.0, FLT_MAX]
    assert get("mxfp4").fit_global_scale(x) is None


def test_token_scales_are_the_worked_example() -> None:
    """Row maximum 7: perTok .0026041667, enc 384."""
    x = torch.tensor([[7.0, -3.0], [0.0, -0.0], [float("nan"), 7.0]])
    assert token_global_scales(x).tolist() == [384.0, FLT_MAX, 384.0]
    assert token_global_scales(x, fast=True).tolist() == [384.0, 0.0, 384.0]


def test_every_row_is_quantised_with_its_own_global_scale() -> None:
    x = noise(4, 32) * torch.tensor([[1.0], [1e-3], [50.0], [0.0]])
    fmt, scales = get("nvfp4_token"), token_global_scales(x)
    q = fmt.encode(x, scales)
    rows = [get("nvfp4").encode(x[i : i + 1], scales[i]) for i in range(4)]
    assert torch.equal(q.codes, torch.cat([r.codes for r in rows]))
    assert torch.equal(fmt.decode(q), torch.cat([get("nvfp4").decode(r) for r in rows]))


def test_experts_are_quantised_one_by_one() -> None:
    x, scales = noise(3, 4, 32), torch.tensor([300.0, 600.0, 900.0])
    for e, q in enumerate(encode_experts(get("nvfp4"), x, scales)):
        assert torch.equal(q.codes, get("nvfp4").encode(x[e], scales[e]).codes)
        assert q.global_scale == scales[e]
    with pytest.raises(ValueError, match="each of 3 experts"):
        encode_experts(get("nvfp4"), x, scales[:2])
    with pytest.raises(ValueError, match="expert by expert"):
        get("nvfp4").encode(x[0], scales)
    assert shared_global_scale(scales) == 300.0


def test_the_inverse_convention_is_not_always_bit_equal() -> None:
    """1 / f32(amax / 2688) differs from f32(2688 / amax) by an ulp for about a quarter of all maxima: compare with care."""
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + 0.5
    encode, through_decode = torch.full_like(amax, 2688.0) / amax, encode_sense(amax / 2688)
    assert 0.1 < (encode != through_decode).double().mean() < 0.5
    assert ((encode - through_decode).abs() <= 2 * torch.finfo(torch.float32).eps * encode).all()


def test_a_global_scale_too_large_clips_and_one_too_small_underflows() -> None:
    x = torch.tensor([[6.0] * 16])
    clipped = get("nvfp4").encode(x, torch.tensor(4480.0))
    assert clipped.scales is not None
    assert (clipped.scales.item(), clipped.codes[0, 0].item()) == (0x7E, 7)
    assert get("nvfp4").decode(clipped)[0, 0] == pytest.approx(0.6)
    gone = get("nvfp4").encode(x, torch.tensor(2.0**-11))
    assert gone.scales is not None
    assert (gone.scales.item(), float(get("nvfp4").decode(gone).abs().max())) == (0, 0.0)


def test_four_over_six_errs_no_more_than_either_candidate() -> None:
    """Measured in float64: by the rule's own penalty, no block is worse than under the plain recipe."""
    x = noise(64, 64)
    for name, power in (("nvfp4_4over6", 1), ("nvfp4_4over6:mse", 2)):
        fmt, plain = get(name), get("nvfp4")
        gs = fmt.fit_global_scale(x)
        error = ((fmt.decode(fmt.encode(x, gs)) - x).abs() ** power).unflatten(1, (-1, 16)).sum(-1)
        baseline = ((plain.decode(plain.encode(x, gs)) - x).abs() ** power).unflatten(1, (-1, 16)).sum(-1)
        assert (error <= baseline * (1 + 1e-5)).all()
        assert (error < baseline * 0.99).double().mean() > 0.2


def test_four_over_six_does_not_choose_four_on_equal_errors() -> None:
    """Both candidates hold this block exactly: 6 * 128 = 4 * 192."""
    x = torch.tensor([[0.0] * 15 + [6.0]])
    q = get("nvfp4_4over6").encode(x, torch.tensor(128.0))
    assert q.scales is not None
    assert (q.codes[0, 15].item(), q.scales.item()) == (7, 0x70)


@pytest.mark.parametrize("name", ["nvfp4_4over6", "nvfp4_4over6_256"])
@pytest.mark.parametrize(("rule", "code"), [("", 0), (":mse", 0), (":one_thread", 0), (":fast", 7), (":fast_mse", 7)])
def test_a_zero_times_an_infinite_reciprocal_is_nan_in_the_fast_rules_only(name: str, rule: str, code: int) -> None:
    x = torch.tensor([[1e-6, -1e-6] + [0.0] * 14])
    assert get(name + rule).encode(x, torch.tensor(1.0)).codes.tolist() == [[7, 15] + [code] * 14]


@pytest.mark.parametrize("cached", [1, 100, 10**9])
def test_four_over_six_is_the_same_however_many_rows_at_a_time(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = noise(13, 72), torch.tensor(300.0)
    rows = [get("nvfp4_4over6").encode(row, scale) for row in x.split(1)]
    monkeypatch.setattr("reference.formats.nvfp4_4over6.CACHED", cached)
    q = get("nvfp4_4over6").encode(x, scale)
    assert q.scales is not None
    assert torch.equal(q.codes, torch.cat([r.codes for r in rows]))
    assert torch.equal(q.scales, torch.cat([r.scales for r in rows if r.scales is not None]))
    assert get("nvfp4_4over6").encode(x[:0], scale).shape == (0, 72)
