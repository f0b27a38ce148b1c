"""Every registered format against its own worked examples and against what any block format must do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from reference.format import WHOLE, Format, Golden, Scaling, block_amax, expand_blocks
from reference.formats import all_formats, get
from reference.grid import E4M3, E8M0, ElementType, PowerOfTwoType

FORMATS = list(all_formats().values())
SCALED = [f for f in FORMATS if f.scaling is not None]
RULES = [rule for f in FORMATS for rule in f.rules()]
GOLDENS = [(f, g) for f in RULES for g in f.goldens]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
each_rule = pytest.mark.parametrize("fmt", [r for r in RULES if r.scaling is not None], ids=lambda f: f.name)
each_scaled = pytest.mark.parametrize("fmt", SCALED, ids=lambda f: f.name)


def gs_for(fmt: Format, x: Tensor) -> Tensor | None:
    """The global scale that uses the whole range, or None where the format has none."""
    return fmt.fit_global_scale(x)


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("fmt", "golden"), GOLDENS, ids=lambda p: p.name if isinstance(p, Format) else "")
def test_goldens_encode_to_the_stated_codes_and_scales(fmt: Format, golden: Golden) -> None:
    gs = None if golden.global_scale is None else torch.tensor([golden.global_scale])
    q = fmt.encode(torch.tensor([golden.values]).float(), gs)
    assert q.scales is not None
    assert golden.zeros == (None if q.zeros is None else tuple(q.zeros.flatten().tolist()))
    assert tuple(q.codes[0].tolist()) == golden.codes
    assert tuple(q.scales.flatten().tolist()) == golden.scales


@each_rule
def test_every_rule_has_a_golden_and_a_source(fmt: Format) -> None:
    assert fmt.goldens
    assert fmt.source
    assert get(fmt.name) is fmt


def test_nvfp4_decodes_the_worked_example() -> None:
    fmt = get("nvfp4")
    values = torch.tensor([fmt.goldens[0].values])
    third = 7 / 12
    wanted = [0, 0, -third, third, 2 * third, -2 * third, 3 * third, 3 * third, -4 * third, 6 * third, 6 * third]
    wanted += [-6 * third, 8 * third, 7, 0, 7]
    decoded = fmt.decode(fmt.encode(values, torch.tensor(384.0)))
    assert torch.allclose(decoded, torch.tensor([wanted], dtype=torch.float64), rtol=1e-12)


@each_format
def test_encoding_a_decoded_matrix_changes_nothing(fmt: Format) -> None:
    """Values are a fixed point where the block maximum maps to the grid's maximum again: all formats with their own
    amax in the scale. E8M0 and E4M3 scales are coarse: the second pass may pick a smaller scale, so the peak of every
    block is put on the grid's maximum first."""
    assert isinstance(fmt.element.max, float)
    x = noise(8, 96)
    if fmt.scaling is not None and fmt.scaling.group[1] != WHOLE:
        x[:, :: fmt.scaling.group[1]] = fmt.element.max
    once = fmt.decode(fmt.encode(x, gs_for(fmt, x)))
    twice = fmt.decode(fmt.encode(once.float(), gs_for(fmt, x)))
    assert torch.allclose(once, twice, rtol=2e-7, atol=0)


@each_scaled
def test_decoding_is_code_times_scale_for_every_code(fmt: Format) -> None:
    """All codes with one scale per block; a table that is off by one entry survives random data of small codes."""
    assert fmt.scaling is not None
    columns = 2**fmt.element.bits
    blocks = fmt.scaling.scale_shape(1, columns)
    x = torch.full((1, columns), 3.0)
    q = fmt.encode(x, gs_for(fmt, x))
    assert q.scales is not None
    assert q.scales.shape == blocks
    q = dataclasses.replace(q, codes=torch.arange(columns, dtype=torch.uint8)[None])
    scale = float(fmt.scale_values(q)[0, 0]) / (1.0 if q.global_scale is None else float(q.global_scale))
    zero = 0.0 if q.zeros is None else float(fmt.element.decode(q.zeros)[0, 0])
    wanted = (fmt.element.decode(torch.arange(columns)) - zero) * scale
    assert torch.equal(fmt.decode(q)[0].nan_to_num(7e9), wanted.nan_to_num(7e9))


@each_scaled
@pytest.mark.parametrize("columns", [64, 49, 1])
def test_each_block_is_decoded_with_its_own_scale(fmt: Format, columns: int) -> None:
    """Ragged last blocks included. With equal scales a transposed or shifted scale tensor would decode right."""
    assert fmt.scaling is not None
    x = noise(3, columns)
    q = fmt.encode(x, gs_for(fmt, x))
    assert q.scales is not None
    assert tuple(q.scales.shape) == fmt.scaling.scale_shape(3, columns)
    values = fmt.element.decode(q.codes)
    global_scales = (torch.ones(1) if q.global_scale is None else q.global_scale.flatten()).double().expand(3)
    zeros = torch.zeros_like(q.scales) if q.zeros is None else fmt.element.decode(q.zeros)
    scales, (down, right) = fmt.scale_values(q), fmt.scaling.group
    decoded = fmt.decode(q)
    for row in range(3):
        for column in range(columns):
            block = (0 if down == WHOLE else row // down, 0 if right == WHOLE else column // right)
            scale = scales[block] / global_scales[row]
            assert decoded[row, column] == (values[row, column] - zeros[block]) * scale


def test_scale_shapes_count_ragged_blocks() -> None:
    assert Scaling(E4M3, (1, 16)).scale_shape(3, 33) == (3, 3)
    assert Scaling(E8M0, (128, 128)).scale_shape(129, 256) == (2, 2)
    assert Scaling(E8M0, (1, WHOLE)).scale_shape(5, 7) == (5, 1)
    assert Scaling(E8M0, (WHOLE, WHOLE)).scale_shape(5, 7) == (1, 1)


def test_expand_and_amax_agree_on_two_dimensional_blocks() -> None:
    x = torch.arange(35.0).reshape(5, 7)
    amax = block_amax(x, (2, 3))
    assert amax.tolist() == [[9, 12, 13], [23, 26, 27], [30, 33, 34]]
    wide = expand_blocks(amax, (5, 7), (2, 3))
    assert wide.shape == (5, 7)
    assert wide[3, 5] == 26
    assert wide[4, 6] == 34


def test_block_maximum_ignores_nan_and_keeps_infinity() -> None:
    x = torch.tensor([[0.5, float("nan"), -3.0, float("-inf")]])
    assert block_amax(x, (1, 2)).tolist() == [[0.5, float("inf")]]


@each_format
def test_zero_blocks_decode_to_zero(fmt: Format) -> None:
    """A scale of amax / max without a guard makes 0 / 0."""
    x = noise(4, 64)
    x[:, :32], x[2] = 0, 0
    decoded = fmt.decode(fmt.encode(x, gs_for(fmt, x)))
    assert (decoded[:, :32] == 0).all()
    assert (decoded[2] == 0).all()


def test_a_zero_block_of_nvfp4_has_scale_zero_and_signed_codes() -> None:
    q = get("nvfp4").encode(torch.tensor([[0.0, -0.0] * 8]), torch.tensor(384.0))
    assert q.scales is not None
    assert q.scales.tolist() == [[0]]
    assert q.codes.tolist() == [[0, 8] * 8]


def test_a_block_of_mxfp4_with_scale_byte_zero_stays_unscaled() -> None:
    """2**-126 would become code 4 by 2**(127 - byte); the CUDA kernel multiplies such blocks by 1."""
    q = get("mxfp4").encode(torch.tensor([[2.0**-126] + [0.0] * 31]))
    assert q.scales is not None
    assert q.scales.tolist() == [[0]]
    assert q.codes.tolist() == [[0] * 32]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        *[(name, (1, 16)) for name in ("nvfp4", "nvfp4_token", "nvfp4_4over6", "nvfp4_4over6_256")],
        *[(name, (1, 32)) for name in ("mxfp4", "mxfp8", "mxfp8_e5m2", "mxint4", "int4_g32", "int4_g32_zp")],
        *[(name, (1, 64)) for name in ("int4_g64", "int4_g64_zp")],
        *[(name, (1, 128)) for name in ("fp8_group", "int8_group", "int4_g128", "int4_g128_zp")],
        *[(name, (1, 0)) for name in ("int8_channel", "int4_channel", "fp8_channel", "fp8_token", "int8_token")],
        *[(name, (0, 0)) for name in ("fp8_tensor", "int8_tensor", "fp8_fnuz_tensor")],
        ("fp8_block", (128, 128)),
        ("fp8_fnuz_channel", (1, 0)),
    ],
)
def test_those_share_a_scale_who_should(name: str, group: tuple[int, int]) -> None:
    """All other tests read the group from the format, and would follow a wrong one."""
    scaling = get(name).scaling
    assert scaling is not None
    assert scaling.group == group


def test_every_scaled_format_is_in_that_list() -> None:
    assert {f.name for f in SCALED} == {name for name, _ in test_those_share_a_scale_who_should.pytestmark[0].args[1]}


def test_nvfp4_saturates_when_a_scale_underflows() -> None:
    """sf rounds to 0 though the block is not zero: the exact path writes +-6 codes, which decode to 0 all the same."""
    fmt = get("nvfp4")
    q = fmt.encode(torch.tensor([[1e-6, -1e-6, 0.0] + [0.0] * 13]), torch.tensor(1.0))
    assert q.codes[0, :3].tolist() == [7, 15, 0]
    assert (fmt.decode(q) == 0).all()


@each_format
def test_relative_error_is_half_an_ulp_of_the_block_maximum(fmt: Format) -> None:
    """|x - decode(encode(x))| <= (half a spacing at the block's largest code) * scale, plus what rounding the scale adds."""
    x = noise(32, 128, seed=3)
    q = fmt.encode(x, gs_for(fmt, x))
    error = (fmt.decode(q) - x).abs()
    if fmt.scaling is None:
        assert isinstance(fmt.element, ElementType)
        assert (error <= fmt.element.ulp(x) / 2).all()
        return
    amax = expand_blocks(block_amax(x, fmt.scaling.group), (32, 128), fmt.scaling.group)
    grows = {"e8m0": 2.0, "e4m3": 1 + 2**-4, "fp32": 1.0}[fmt.scaling.element.name]
    half_ulp = float(fmt.element.ulp(torch.tensor([fmt.element.max]))) / 2 / fmt.element.max
    stored = 0.0 if fmt.scaling.stored is None else 2.0 ** -(fmt.scaling.stored.mantissa_bits + 1)
    assert (error <= 1.0001 * (grows * half_ulp + stored) * amax).all()


@each_scaled
def test_the_block_maximum_uses_the_top_of_the_grid(fmt: Format) -> None:
    """A scale twice too large passes any loose error bound; the largest code of a block says it is not."""
    x = noise(32, 128, seed=4)
    q = fmt.encode(x, gs_for(fmt, x))
    top = block_amax(fmt.element.decode(q.codes), fmt.scaling.group)  # type: ignore[union-attr]
    slack = 2.01 if isinstance(fmt.scaling.element, PowerOfTwoType) else 1.01  # type: ignore[union-attr]
    four_is_enough = fmt.element.bits == 4 and (slack > 2 or "4over6" in fmt.name)
    assert (top >= fmt.element.max / slack / (1.5 if four_is_enough else 1)).all()


@each_format
def test_a_missing_or_unwanted_global_scale_is_refused(fmt: Format) -> None:
    wants = fmt.scaling is not None and fmt.scaling.global_scale
    with pytest.raises(ValueError, match="global_scale must"):
        fmt.encode(noise(2, 32), None if wants else torch.tensor(1.0))


@each_format
def test_a_vector_is_refused(fmt: Format) -> None:
    x = noise(1, 32)
    with pytest.raises(ValueError, match="got shape"):
        fmt.encode(x[0], gs_for(fmt, x))


@each_format
def test_an_empty_matrix_survives(fmt: Format) -> None:
    x = torch.zeros(0, 32)
    q = fmt.encode(x, gs_for(fmt, x))
    assert q.shape == (0, 32)
    assert fmt.decode(q).shape == (0, 32)


def test_plain_formats_saturate_instead_of_making_infinities() -> None:
    assert get("fp16").encode(torch.tensor([[1e9, -1e9]])).codes.tolist() == [[65504.0, -65504.0]]


@each_format
def test_names_and_sources_are_given(fmt: Format) -> None:
    assert get(fmt.name) is fmt
    assert fmt.source


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="nvfp4"):
        get("nvfp5")
