"""The twins of FlashInfer's CuTe-DSL functions: signatures, physical layouts, undefined rows, what they raise."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends import flashinfer_cutedsl_masked as masked
from harness.backends.base import CPU, YES, Device, Support
from harness.backends.flashinfer_b12x import B12X
from harness.backends.flashinfer_cutedsl_masked import dispatch
from harness.case import Case
from harness.entry import planted, resolve, twins
from harness.memory import HUGE, NAN, poisoned
from harness.pipeline import run
from harness.twins.libs import _cutedsl as dsl
from reference.batched import to_batched
from reference.formats import get
from reference.layouts import get as layout
from reference.layouts.linear import pack_nibbles

NVFP4 = get("nvfp4")
FILES = {
    "scaled_fp4_grouped_quantize": "quantization/fp4_quantization.py",
    "silu_and_mul_scaled_nvfp4_experts_quantize": "activation.py",
    "grouped_gemm_nt_masked": "gemm/kernels/grouped_gemm_masked_wrapper.py",
    "convert_sf_to_mma_layout": "cute_dsl/utils.py",
    "cute_dsl_fused_moe": "fused_moe/cute_dsl/fused_moe.py",
    "cute_dsl_fused_moe_nvfp4": "fused_moe/cute_dsl/fused_moe.py",
    "b12x_fused_moe": "fused_moe/cute_dsl/b12x_moe.py",
}
PLACES = ("flashinfer", "flashinfer.gemm", "flashinfer.cute_dsl.utils", "flashinfer.fused_moe")
EXPERTS, ROWS, K, N = 4, 5, 96, 64
LIVE = torch.tensor([0, ROWS, 1, 3], dtype=torch.int32)  # none, full, one, some


def twin(name: str) -> Any:
    found = [f"{place}.{name}" for place in PLACES]
    return resolve(next(f for f in found if f in twins()), "cpu")


@pytest.fixture(scope="module")
def wheel() -> Path:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps flashinfer-python==0.7.2.post1 (dev extra)")
    return Path(next(iter(spec.submodule_search_locations)))


def definition(path: Path, name: str) -> ast.FunctionDef:
    return next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name)


def lifted(path: Path, name: str, **given: object) -> Any:
    """One function of the wheel, executed without its decorators and annotations' imports."""
    node = definition(path, name)
    node.decorator_list = []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    scope: dict[str, Any] = {"torch": torch, **given}
    exec(compile(ast.fix_missing_locations(ast.Module([future, node], [])), str(path), "exec"), scope)
    return scope[name]


def described(node: ast.FunctionDef) -> tuple[object, ...]:
    """Names in order, which have defaults, and the defaults that are literals."""
    arguments = node.args
    defaults = [None if d is None else ast.unparse(d) for d in (*arguments.defaults, *arguments.kw_defaults)]
    names = [[a.arg for a in group] for group in (arguments.args, arguments.kwonlyargs)]
    plain = ("None", "True", "False", "'w4a4'", "'silu'")
    literal = [d if d is None or d in plain or d[0].isdigit() else "?" for d in defaults]
    return names, literal, arguments.kwarg is not None


@pytest.mark.parametrize("name", FILES)
def test_the_signature_is_the_wheels(wheel: Path, name: str) -> None:
    ours = Path(twin(name).__code__.co_filename)
    want, got = described(definition(wheel / FILES[name], name)), described(definition(ours, name))
    assert got[0] == want[0]
    assert got[2] == want[2]
    for mine, theirs in zip(got[1], want[1], strict=True):  # type: ignore[call-overload]
        assert mine == theirs or "?" in (mine, theirs)


@pytest.mark.parametrize("shape", [(1, 128, 64), (3, 129, 80), (2, 300, 16)])
def test_the_scale_view_is_the_wheels_and_comes_back(wheel: Path, shape: tuple[int, int, int]) -> None:
    """vllm#38251: the kernels read 6-D strided views; odd shapes are padded to whole tiles."""
    groups, m, k = shape
    bytes_ = torch.arange(groups * m * (k // 16)).remainder(251).to(torch.uint8).view(groups, m, k // 16)
    swizzled = layout("swizzle_128x4_per_expert").pack(bytes_).flatten()
    theirs = lifted(wheel / "cute_dsl/utils.py", "convert_sf_to_mma_layout", ceil_div=lambda a, b: -(-a // b))
    want, got = theirs(swizzled, m, k, groups), twin("convert_sf_to_mma_layout")(swizzled, m, k, groups)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert torch.equal(dsl.mma_scales(got, m, k // 16), bytes_)
    for convert in (theirs, twin("convert_sf_to_mma_layout")):
        with pytest.raises(ValueError, match=f"Scale factor tensor has {len(swizzled) - 16} elements, expected"):
            convert(swizzled[:-16], m, k, groups)


@pytest.mark.parametrize("inter", [64, 192])
def test_the_interleave_is_the_wheels_and_comes_back(wheel: Path, inter: int) -> None:
    theirs = lifted(wheel / "fused_moe/prepare.py", "_interleave_linear_and_gate")
    halves = torch.arange(2 * inter * 3).view(2 * inter, 3)
    ours = layout("gated_interleave_64")
    assert torch.equal(ours.pack(halves), theirs(halves, 64, 0))
    assert torch.equal(ours.unpack(ours.pack(halves), (2 * inter, 3)), halves)
    assert torch.equal(ours.pack(halves), halves) == (inter == 64), "one block a half needs no interleave"


def slabs(columns: int) -> Tensor:
    return torch.randn(EXPERTS, ROWS, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()


@pytest.mark.parametrize("byte", [NAN, HUGE])
@pytest.mark.parametrize("fused", [False, True])
def test_only_live_rows_are_quantised_each_by_its_experts_scale(byte: int, fused: bool) -> None:
    a, scales = slabs(2 * K if fused else K), torch.tensor([1.0, 2.0, 64.0, 8.0])
    name = "silu_and_mul_scaled_nvfp4_experts_quantize" if fused else "scaled_fp4_grouped_quantize"
    with poisoned(byte, CPU):
        codes, stored = twin(name)(a, LIVE, scales)
    assert codes.shape == (ROWS, K // 2, EXPERTS)
    assert stored.shape == (32, 4, 1, 4, 2, EXPERTS)
    assert stored.dtype == torch.float8_e4m3fn
    found = dsl.mma_scales(stored, ROWS, K // 16)
    for expert, live in enumerate(LIVE.tolist()):
        rows = a[expert, :live].float()
        if fused:
            rows = (torch.nn.functional.silu(rows[:, :K]) * rows[:, K:]).bfloat16().float()
        q = NVFP4.encode(rows, scales[expert])
        assert torch.equal(codes[:live, :, expert], pack_nibbles(q.codes))
        assert torch.equal(found[expert, :live], q.scales)  # type: ignore[arg-type]
        assert (codes[live:, :, expert] == byte).all()
        assert (found[expert, live:] == byte).all()


def test_a_quantiser_wants_a_global_scale_of_every_expert() -> None:
    """vllm#41711: its docstring says [1], its C++ counts experts by it."""
    with pytest.raises(RuntimeError, match=r"n_experts \(4 vs\. 1\)"):
        twin("scaled_fp4_grouped_quantize")(slabs(K), LIVE, torch.ones(1))
    with pytest.raises(AssertionError, match="multiple of 16, but got 24"):
        twin("scaled_fp4_grouped_quantize")(slabs(24), LIVE, torch.ones(EXPERTS))


def operand(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed (rows, K / 2, experts), scales in the view, values [experts, rows, K])."""
    values = torch.randn(EXPERTS, rows, K, generator=torch.Generator().manual_seed(seed))
    q = [NVFP4.encode(v, torch.ones(())) for v in values]
    packed = torch.stack([pack_nibbles(one.codes) for one in q]).permute(1, 2, 0)
    scales = layout("mma_6d_view").pack(torch.stack([one.scales for one in q]))  # type: ignore[misc]
    return packed, scales.view(torch.float8_e4m3fn), torch.stack([NVFP4.decode(one, torch.float32) for one in q])


def test_the_gemm_writes_live_rows_in_place_and_nothing_else() -> None:
    (a, a_sf, av), (b, b_sf, bv) = operand(ROWS, 1), operand(N, 2)
    alpha = torch.tensor([1.0, 0.5, 3.0, 0.25]).view(1, 1, -1)
    held = torch.full((EXPERTS, ROWS, N), 7.0, dtype=torch.bfloat16)
    kinds = {"ab_dtype": "float4_e2m1fn", "sf_dtype": "float8_e4m3fn", "c_dtype": "bfloat16", "sf_vec_size": 16}
    gemm = twin("grouped_gemm_nt_masked")
    returned = gemm((a, a_sf), (b, b_sf), held.permute(1, 2, 0), LIVE, **kinds, alpha=alpha, alpha_dtype="float32")
    assert returned.data_ptr() == held.data_ptr()
    for expert, live in enumerate(LIVE.tolist()):
        want = (av[expert] @ bv[expert].T * alpha.flatten()[expert]).bfloat16()
        assert torch.equal(held[expert, :live], want[:live])
        assert (held[expert, live:] == 7).all()
    with pytest.raises(ValueError, match=r"must be a 3D \(m, n, l\) tensor that is contiguous"):
        gemm((a, a_sf), (b, b_sf), torch.empty(ROWS, N, EXPERTS, dtype=torch.bfloat16), LIVE, **kinds)
    with pytest.raises(AssertionError, match="Unsupported kwargs"):
        gemm((a, a_sf), (b, b_sf), held.permute(1, 2, 0), LIVE, **kinds, beta=1)


def test_the_adapter_dispatches_as_the_reference_does() -> None:
    ids = torch.tensor([[3, 1], [1, 1], [0, 3], [7, 1]])
    x = torch.arange(8.0).view(4, 2)
    placed = dispatch(ids, range(4))
    want = to_batched(x, torch.where(ids < 4, ids, -1), 4, placed.capacity)
    rows = torch.full_like(want.rows, torch.nan)
    rows[placed.owner, placed.row] = x[placed.slot // 2]
    assert torch.equal(placed.masked_m.long(), want.masked_m)
    assert torch.equal(rows.nan_to_num(-1), want.rows.nan_to_num(-1))
    assert placed.capacity == 4
    assert dispatch(ids, range(5, 6)).capacity == 1


def layer(hidden: int = 128, inter: int = 64, tokens: int = 6) -> SimpleNamespace:
    """A small layer in the fused entry points' physical form; every alpha and scale is 1."""
    g = torch.Generator().manual_seed(3)

    def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        q = [NVFP4.encode(torch.randn(rows, columns, generator=g) / 8, torch.ones(())) for _ in range(EXPERTS)]
        view = layout("mma_6d_view").pack(torch.stack([one.scales for one in q]))  # type: ignore[misc]
        return torch.stack([pack_nibbles(one.codes) for one in q]), view

    x = NVFP4.encode(torch.randn(tokens, hidden, generator=g), torch.ones(()))
    ids = torch.rand(tokens, EXPERTS, generator=g).argsort(1)[:, :2].to(torch.int32)
    (w1, w1_sf), (w2, w2_sf), one = packed(2 * inter, hidden), packed(hidden, inter), torch.ones(EXPERTS)
    weights = {"w1_weight": w1, "w1_weight_sf": w1_sf, "w1_alpha": one, "w2_weight": w2, "w2_weight_sf": w2_sf, "w2_alpha": one}
    routing = {"token_selected_experts": ids, "token_final_scales": torch.rand(tokens, 2, generator=g), "top_k": 2}
    given = {**weights, **routing, "fc2_input_scale": torch.ones(1), "num_experts": EXPERTS}
    return SimpleNamespace(x=NVFP4.decode(x).bfloat16(), given=given, fp4={"x": pack_nibbles(x.codes), "x_sf": x.scales})


def test_the_fused_output_is_the_callers_and_dense() -> None:
    one, fused = layer(), twin("cute_dsl_fused_moe_nvfp4")
    out = torch.full((6, 128), torch.nan, dtype=torch.bfloat16)
    assert fused(**one.fp4, **one.given, moe_output=out) is out
    assert torch.equal(out, fused(**one.fp4, **one.given))
    wide = torch.empty(6, 136, dtype=torch.bfloat16)[:, :128]
    with pytest.raises(ValueError, match="out must be contiguous"):
        fused(**one.fp4, **one.given, moe_output=wide)
    with pytest.raises(ValueError, match="out must have shape"):
        fused(**one.fp4, **one.given, moe_output=out[:5])


@pytest.mark.parametrize("mode", [True, False])
def test_ranks_of_the_fused_layer_sum_to_the_whole(mode: bool) -> None:
    one, fused = layer(), twin("cute_dsl_fused_moe")
    whole = fused(**one.fp4, **one.given, use_fused_finalize=mode).float()
    parts = []
    for first, last in ((0, 1), (1, EXPERTS)):
        mine = {n: t[..., first:last] if n.endswith("_sf") else t[first:last] for n, t in one.given.items() if n[0] == "w"}
        rank = {**one.given, **mine, "num_local_experts": last - first, "local_expert_offset": first}
        parts.append(fused(**one.fp4, **rank, use_fused_finalize=mode).float())
    assert torch.allclose(sum(parts), whole, rtol=2**-6, atol=2**-6 * float(whole.abs().max()))
    assert all(float(part.abs().max()) > 0 for part in parts)


def test_the_fused_layer_says_what_it_refuses() -> None:
    one, fused = layer(), twin("cute_dsl_fused_moe")
    for change, says in (
        ({"fc2_input_scale": None}, "fc2_input_scale is required"),
        ({"x_sf": None}, "x_sf is required"),
        ({"quant_mode": "w4a8"}, "requires float8_e4m3fn input"),
        ({"activation_type": 5}, "Unsupported activation_type 5"),
        ({"w1_weight_sf": one.given["w1_weight_sf"].flatten()}, "are not the MMA layout"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            fused(**{**one.fp4, **one.given, **change})
    with pytest.raises(ValueError, match="GEMM1 output dim n=64 must be a multiple of 128"):
        fused(**layer(inter=32).fp4, **layer(inter=32).given)


def test_a_negative_id_is_an_unrouted_slot_of_b12x() -> None:
    one, b12x = layer(), twin("b12x_fused_moe")
    given = {**one.given, "token_selected_experts": one.given["token_selected_experts"].clone()}
    given["token_selected_experts"][0] = -1
    given["token_selected_experts"][1, 1] = -1
    found, whole = b12x(x=one.x, **given), b12x(x=one.x, **one.given)
    given["token_selected_experts"] = one.given["token_selected_experts"]
    given["token_final_scales"] = one.given["token_final_scales"].clone()
    given["token_final_scales"][1, 1] = 0
    assert not found[0].any()
    assert torch.equal(found[1], b12x(x=one.x, **given)[1])
    assert torch.equal(found[2:], whole[2:])
    assert whole[:2].any(1).all()


def test_b12x_says_what_it_refuses_and_folds_the_scale_of_x_into_alpha() -> None:
    one, b12x = layer(), twin("b12x_fused_moe")
    with pytest.raises(ValueError, match="fc2_input_scale is required"):
        b12x(x=one.x, **{**one.given, "fc2_input_scale": None})
    with pytest.raises(NotImplementedError, match="Expert Parallelism only for quant_mode='w4a16'"):
        b12x(x=one.x, **one.given, num_local_experts=2)
    with pytest.raises(ValueError, match="only supports output_dtype"):
        b12x(x=one.x, **one.given, output_dtype=torch.float16)
    whole = b12x(x=one.x, **one.given)
    finer = b12x(x=one.x, **one.given, input_global_scale=torch.tensor([0.5]))  # half the decode scale: other block scales
    assert torch.allclose(finer.float(), whole.float(), atol=2**-4 * float(whole.abs().max()))


def test_a_release_without_the_new_name_of_the_gemm_is_called_by_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def old(name: str, device: str) -> Any:
        asked.append(name)
        if name == masked.GEMMS[0]:
            raise AttributeError(name)
        return resolve(name, "cpu")

    def needs(*names: str) -> Any:
        return lambda device: Support.no("library", "no such name") if masked.GEMMS[0] in names else YES

    monkeypatch.setattr(masked, "resolve", old)
    monkeypatch.setattr(masked, "needs", needs)
    masked.Functions.of("cuda")
    assert asked[:2] == list(masked.GEMMS)
    assert masked.probe(Device("cuda", "sm100")).ok


def test_scales_cached_by_their_address_are_seen() -> None:
    """moe_dispatch._WEIGHT_CACHE holds copies of scales and alphas under data_ptr(): a reload in place leaves the old ones."""
    b12x, kept = twin("b12x_fused_moe"), {}

    def caching(**given: Any) -> Tensor:
        for name in ("w1_weight_sf", "w2_weight_sf", "w1_alpha", "w2_alpha"):
            given[name] = kept.setdefault(given[name].data_ptr(), given[name].clone())
        return b12x(**given)  # type: ignore[no-any-return]

    backend = discover()["flashinfer_b12x_twin"]
    case = Case.parse("moe.nvfp4-nvfp4.t9.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0")
    found = [run(case, planted(backend, "caching", {B12X: f}), CPU).findings for f in (caching, b12x)]
    assert [f.check for f in found[0]] == ["weights_in_place"]
    assert not found[1]
