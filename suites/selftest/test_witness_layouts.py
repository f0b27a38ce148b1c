"""Layouts against the libraries' own helpers: executed from the installed packages, on CPU tensors.

Helpers that a package cannot import without a GPU stack are lifted out of its files, one function at a time; the three
SM90 weight kernels are plain integer C++ and run on the host through the compiler.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.util
import itertools
import math
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.layouts import get
from reference.layouts.linear import unpack_nibbles
from reference.layouts.marlin_weight import padded_nk
from reference.layouts.trtllm_row_shuffle import block_rows, row_shuffle

NEEDS_FLASHINFER = "FlashInfer's helpers: pip install --no-deps flashinfer-python==0.7.2.post1, and what it imports (dev extra)"
NEEDS_VLLM = "vLLM's helpers: put a folder with vllm/ of the vllm==0.33.0 wheel on the path (pip download --no-deps; unzip)"
ROWS, COLUMNS = (1, 127, 128, 129, 300), (1, 4, 5, 8)


def package(name: str, reason: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(reason)
    return Path(next(iter(spec.submodule_search_locations)))


def lifted(path: Path, *names: str, **given: Any) -> types.SimpleNamespace:
    """Functions `names` of a source file, executed without their decorators and without the rest of the file."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in found} == set(names)
    for node in found:
        node.decorator_list = []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    scope: dict[str, Any] = {"torch": torch, "math": math, **given}
    exec(compile(ast.fix_missing_locations(ast.Module([future, *found], [])), str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(math.prod(shape)))


@pytest.fixture(scope="module")
def flashinfer() -> types.ModuleType:
    return pytest.importorskip("flashinfer", reason=NEEDS_FLASHINFER)


@pytest.fixture(scope="module")
def wheel() -> Path:
    return package("flashinfer", NEEDS_FLASHINFER)


@pytest.fixture(scope="module")
def b12x(wheel: Path) -> types.SimpleNamespace:
    """The byte-preserving torch twin of block_scale_interleave that ships inside FlashInfer."""
    return lifted(
        wheel / "experimental/b12x/moe/_shared/kernels/reference_flashinfer.py", "_block_scale_interleave_128x4_torch"
    )


@pytest.mark.parametrize(("m", "n"), list(itertools.product(ROWS, COLUMNS)))
def test_128x4_is_flashinfers(wheel: Path, b12x: types.SimpleNamespace, m: int, n: int) -> None:
    x = random_bytes(m, n)
    flat = get("swizzle_128x4").pack(x)
    assert torch.equal(flat, b12x._block_scale_interleave_128x4_torch(x))
    trace = lifted(wheel / "trace/templates/gemm.py", "_unswizzle_batched_sf_128x4", "_unswizzle_sf_128x4")
    assert torch.equal(trace._unswizzle_sf_128x4(flat, m, n), x)
    size = lifted(
        wheel / "quantization/fp4_quantization.py",
        "_compute_swizzled_layout_sf_size",
        round_up=lambda a, b: (a + b - 1) // b * b,
    )
    assert size._compute_swizzled_layout_sf_size(m, n) == flat.numel()


@pytest.mark.parametrize(("m", "n"), list(itertools.product(ROWS, COLUMNS)))
def test_128x4_is_torchaos(m: int, n: int) -> None:
    utils = pytest.importorskip(
        "torchao.prototype.mx_formats.utils", reason="torchao's to_blocked: pip install torchao==0.18.0"
    )
    x = random_bytes(m, n)
    flat = get("swizzle_128x4").pack(x)
    assert torch.equal(flat, utils.to_blocked(x, use_triton_kernel=False))
    assert torch.equal(utils.from_blocked(flat, m, n), x)


@pytest.mark.parametrize(("m", "n"), [(96, 5), (128, 4), (300, 8)])
def test_a_stack_is_swizzled_expert_by_expert(b12x: types.SimpleNamespace, m: int, n: int) -> None:
    x = random_bytes(3, m, n)
    assert torch.equal(get("swizzle_128x4_per_expert").pack(x).flatten(), b12x._block_scale_interleave_128x4_torch(x))
    joint = get("swizzle_128x4_joint").pack(x)
    assert torch.equal(joint, b12x._block_scale_interleave_128x4_torch(x.flatten(0, 1)))


@pytest.mark.parametrize(("kind", "tile"), [("128x4", 128), ("8x4", 8)])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 5), (129, 8), (200, 13)])
def test_the_offsets_of_flashinfers_quantiser_kernels(wheel: Path, kind: str, tile: int, m: int, n: int) -> None:
    """The device functions of the CuTe-DSL quantisers, run with Python integers."""
    name = f"compute_sf_index_swizzled_{kind}_gpu"
    offset = getattr(lifted(wheel / "quantization/quantization_cute_dsl_utils.py", name, Int32=int), name)
    x = torch.arange(1, m * n + 1).view(m, n)
    flat = get(f"swizzle_{kind}").pack(x)
    assert flat.numel() == -(-m // tile) * tile * -(-n // 4) * 4
    assert all(flat[offset(r, c, -(-n // 4) * 4)] == x[r, c] for r in range(m) for c in range(n))


@pytest.mark.parametrize("shape", [(1, 128, 4), (3, 200, 5), (2, 256, 16)])
def test_the_mma_view_is_flashinfers(wheel: Path, shape: tuple[int, int, int]) -> None:
    names = ("convert_sf_to_mma_layout", "convert_sf_from_mma_layout", "get_mma_sf_shape")
    utils = lifted(wheel / "cute_dsl/utils.py", *names, ceil_div=lambda a, b: -(-a // b), Tuple=tuple)
    x = random_bytes(*shape)
    groups, m, columns = shape
    swizzled = get("swizzle_128x4_per_expert").pack(x).flatten()
    want = utils.convert_sf_to_mma_layout(swizzled, m, 16 * columns, groups)
    got = get("mma_6d_view").pack(x)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()
    assert tuple(got.shape) == utils.get_mma_sf_shape(m, 16 * columns, groups)
    assert torch.equal(utils.convert_sf_from_mma_layout(got, m, 16 * columns, groups).flatten(), swizzled)


@pytest.mark.parametrize("tile", [8, 16, 64, 128, 192, 256])
def test_the_row_shuffle_is_flashinfers(flashinfer: types.ModuleType, tile: int) -> None:
    assert block_rows(tile) == flashinfer.utils.get_shuffle_block_size(tile)
    x = random_bytes(192, 5)
    assert torch.equal(row_shuffle(block_rows(tile)).pack(x), flashinfer.shuffle_matrix_a(x, tile))


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("shape", [(128, 4), (256, 5), (384, 1)])
def test_the_scale_shuffle_is_flashinfers(
    flashinfer: types.ModuleType,
    b12x: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tile: int,
    shape: tuple[int, int],
) -> None:
    """Its last step is a CUDA kernel; the torch twin stands in for that one call."""
    module = importlib.import_module("flashinfer.quantization.fp4_quantization")
    monkeypatch.setattr(module, "block_scale_interleave", b12x._block_scale_interleave_128x4_torch)
    x = random_bytes(*shape)
    want = flashinfer.shuffle_matrix_sf_a(x, tile, num_elts_per_sf=32)
    assert torch.equal(get(f"trtllm_scale_shuffle_{block_rows(tile)}").pack(x), want)


@pytest.mark.parametrize("rows", [64, 128, 192])
def test_the_gated_reorder_is_flashinfers(flashinfer: types.ModuleType, rows: int) -> None:
    core = importlib.import_module("flashinfer.fused_moe.core")
    x = random_bytes(rows, 7)
    reordered = get("gated_reorder").pack(x)
    assert torch.equal(reordered, core.reorder_rows_for_gated_act_gemm(x))
    for tile in (64, 128):
        order = core._maybe_get_cached_w3_w1_permute_indices({}, x, tile)
        assert torch.equal(row_shuffle(block_rows(tile)).pack(reordered), x[order])
        order = core.get_w2_permute_indices_with_cache({}, x, tile)
        assert torch.equal(row_shuffle(block_rows(tile)).pack(x), x[order])


@pytest.mark.parametrize("g", [8, 16, 32, 64])
def test_the_gated_interleave_is_flashinfers(wheel: Path, g: int) -> None:
    prepare = lifted(wheel / "fused_moe/prepare.py", "_interleave_linear_and_gate")
    x = random_bytes(2, 6 * g, 5)
    got = torch.stack([get(f"gated_interleave_{g}").pack(one) for one in x])
    assert torch.equal(got, prepare._interleave_linear_and_gate(x, group_size=g, dim=1))


def test_the_other_interleaves_are_the_same_layout(wheel: Path) -> None:
    x = random_bytes(2, 128, 5)
    swapped = torch.cat((x[:, 64:], x[:, :64]), 1)

    def ours(g: int, x: Tensor) -> Tensor:
        return torch.stack([get(f"gated_interleave_{g}").pack(one) for one in x])

    path = "fused_moe/cute_dsl/sm90_contiguous_gather_grouped_gemm_act_fusion.py"
    sm90 = lifted(wheel / path, "interleave_up_gate_sm90", "_interleave_gated_halves")
    assert torch.equal(ours(32, swapped), sm90.interleave_up_gate_sm90(x))  # its input is gate-first, its output up-first
    alpha = lifted(wheel / "fused_moe/alphamoe_sm100.py", "_interleave_gated_rows")
    assert torch.equal(ours(8, x), alpha._interleave_gated_rows(x, rep=8))
    mega = lifted(wheel / "experimental/cake_mxfp8_megamoe_ep16/backend.py", "_interleave_gate_up_16")
    assert torch.equal(ours(16, x), mega._interleave_gate_up_16(x))


@pytest.mark.parametrize("width", [64, 128])
def test_block_major_k_is_flashinfers(flashinfer: types.ModuleType, width: int) -> None:
    core = importlib.import_module("flashinfer.fused_moe.core")
    x = random_bytes(33, 3 * width)
    assert torch.equal(get(f"block_major_k_{width}").pack(x), core.convert_to_block_layout(x, width))


@pytest.mark.parametrize(("name", "dtype", "group"), [("g32_b1", torch.uint8, 32), ("g128_b2", torch.bfloat16, 128)])
def test_the_sm90_scale_fold_is_flashinfers(flashinfer: types.ModuleType, name: str, dtype: torch.dtype, group: int) -> None:
    prepare = importlib.import_module("flashinfer.fused_moe.prepare")
    x = torch.arange(3 * 128 * 8).remainder(251).view(3, 128, 8).to(dtype)
    want = prepare.interleave_moe_scales_for_sm90_mixed_gemm(x, group)
    got = torch.stack([get(f"sm90_scale_fold_{name}").pack(one) for one in x])
    assert torch.equal(got, want)


HOST = """
#include <cstdint>
#define __global__
#define __device__
#define __forceinline__ inline
struct Dim { int x, y; };
static Dim threadIdx{0, 0}, blockIdx{0, 0}, blockDim{16, 1}, gridDim{1, 1};
%s
#define RUN(name) extern "C" void name(uint8_t* in, uint8_t* out, int rows, int cols) { \\
  for (threadIdx.x = 0; threadIdx.x < 16; ++threadIdx.x) \\
    interleave_##name##_weights_for_sm90_mixed_gemm_kernel(in, out, rows, cols); }
RUN(int4) RUN(fp4) RUN(fp4_fp8)
"""


@pytest.fixture(scope="module")
def kernels(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The three device kernels of FlashInfer's SM90 weight interleave, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("FlashInfer's SM90 weight kernels on the host: needs a C++ compiler")
    folder = wheel / "data/csrc/nv_internal/tensorrt_llm/kernels/cutlass_kernels/moe_gemm"
    text = (folder / "moe_gemm_mixed_utils.cu").read_text()
    first, last = text.index("__global__"), text.index("\nvoid interleave_fp4_weights_for_sm90_mixed_gemm(")
    work = tmp_path_factory.mktemp("sm90")
    (work / "host.cpp").write_text(HOST % text[first:last])
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", work / "host.so", work / "host.cpp"], check=True)
    return ctypes.CDLL(str(work / "host.so"))


@pytest.mark.parametrize("kind", ["int4", "fp4", "fp4_fp8"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (128, 64)])
def test_the_sm90_weights_are_flashinfers(kernels: ctypes.CDLL, kind: str, shape: tuple[int, int]) -> None:
    x, want = random_bytes(*shape), torch.zeros(shape, dtype=torch.uint8)
    rows, width = shape
    getattr(kernels, kind)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(want.data_ptr()), rows, 2 * width)
    assert torch.equal(get(f"sm90_weight_{kind}").pack(x), want)


@pytest.fixture(scope="module")
def vllm() -> Path:
    return package("vllm", NEEDS_VLLM)


@pytest.fixture
def triton_kernels(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loader of the layout modules of the triton_kernels that vLLM ships (an early version: less padding)."""
    if not (vllm / "third_party/triton_kernels").is_dir():
        pytest.skip(NEEDS_VLLM)
    pytest.importorskip("triton", reason="the layout files of triton_kernels import triton")
    monkeypatch.syspath_prepend(str(vllm / "third_party"))
    return lambda name: importlib.import_module(f"triton_kernels.tensor_details.layout_details.{name}")


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (128, 90), (257, 4), (640, 7)])
def test_hopper_scale_is_triton_kernels(triton_kernels: Any, warps: int, shape: tuple[int, int]) -> None:
    x = random_bytes(*shape)
    theirs = triton_kernels("hopper_scale").HopperMXScaleLayout(x.mT.shape, mx_axis=0, num_warps=warps)
    assert torch.equal(get(f"hopper_scale_w{warps}_k2").pack(x), theirs.swizzle_data(x.mT).mT)


@pytest.mark.parametrize("mma", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 33), (320, 90)])
def test_hopper_value_is_triton_kernels(triton_kernels: Any, mma: int, shape: tuple[int, int]) -> None:
    """All three padding rules: this version's own, and the others' by padding beforehand."""
    x = random_bytes(*shape)
    module = triton_kernels("hopper_value")
    for padding in ("first", "old", "new"):
        layout = get(f"hopper_value_mma{mma}_{padding}")
        high, wide = layout.padded_shape(shape)
        padded = torch.nn.functional.pad(x, (0, wide - shape[1], 0, high - shape[0]))
        theirs = module.HopperMXValueLayout(padded.mT.shape, mx_axis=0, mma_version=mma)
        assert torch.equal(layout.pack(x), theirs.swizzle_data(padded.mT).mT)
        if padding == "first":
            assert torch.equal(layout.pack(x), theirs.swizzle_data(x.mT).mT)


@pytest.mark.parametrize("shape", [(1, 1), (128, 8), (129, 90), (300, 5)])
def test_blackwell_layouts_are_triton_kernels(triton_kernels: Any, shape: tuple[int, int]) -> None:
    x = random_bytes(*shape)
    theirs = triton_kernels("blackwell_scale").BlackwellMXScaleLayout(x.mT.shape)
    assert torch.equal(get("blackwell_scale").pack(x), theirs.swizzle_data(x.mT))
    value = triton_kernels("blackwell_value").BlackwellMXValueLayout(x.mT.shape)
    assert torch.equal(get("blackwell_value").pack(x), value.swizzle_data(x.mT).mT)


@pytest.mark.parametrize("shape", [(32, 8), (64, 24), (96, 16)])
def test_cdna4_scale_is_triton_kernels(triton_kernels: Any, shape: tuple[int, int]) -> None:
    x = random_bytes(*shape)
    theirs = triton_kernels("cdna4_scale").CDNA4MXScaleLayout(x.mT.shape)
    want = theirs.swizzle_data(x.mT).mT
    assert torch.equal(get("cdna4_scale").pack(x), want)
    assert torch.equal(get("cdna4_scale_unpadded").pack(x), want)


@pytest.fixture(scope="module")
def marlin(vllm: Path) -> types.SimpleNamespace:
    """vLLM's Marlin helpers: the packed weight by permutation list (its tests' reference of the CUDA repack), the scales."""
    folder = vllm / "model_executor/layers/quantization/utils"
    numpy = importlib.import_module("numpy")
    scales = lifted(folder / "marlin_utils.py", "get_scale_perms", "marlin_permute_scales")
    pad = lifted(
        folder / "marlin_utils.py",
        "marlin_padded_nk",
        round_up=lambda a, b: (a + b - 1) // b * b,
        logger=types.SimpleNamespace(warning_once=lambda *_: None),
    )
    fp4 = lifted(
        folder / "marlin_utils_fp4.py",
        "_nvfp4_compute_scale_factor",
        "nvfp4_marlin_process_scales",
        "mxfp4_marlin_process_scales",
        logger=None,
    )
    weights = lifted(
        folder / "marlin_utils_test.py",
        "marlin_permute_weights",
        "marlin_weights",
        "get_weight_perm",
        np=numpy,
        GPTQ_MARLIN_TILE=16,
        get_pack_factor=lambda bits: 32 // bits,
    )
    return types.SimpleNamespace(**vars(scales), **vars(pad), **vars(fp4), **vars(weights))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 64), (192, 256)])
def test_marlin_weights_are_vllms(marlin: types.SimpleNamespace, small: bool, n: int, k: int) -> None:
    x = random_bytes(n, k // 2)
    perm = marlin.get_weight_perm(4, small)
    want = marlin.marlin_weights(unpack_nibbles(x).T.contiguous().long(), k, n, 4, perm, is_a_8bit=small)
    got = get("marlin_weight_a8" if small else "marlin_weight_a16").pack(x).view(torch.int32)
    assert got.shape == (k // 16, 2 * n) == want.shape
    assert torch.equal(got, want)


def test_marlin_padding_is_vllms(marlin: types.SimpleNamespace) -> None:
    for n, k, group in itertools.product((1, 64, 100, 128, 320, 2880), (32, 64, 192, 256, 2880), (16, 32, 64, 128)):
        assert padded_nk(n, k, group) == marlin.marlin_padded_nk(n, k, group)


def test_marlin_scales_are_vllms(marlin: types.SimpleNamespace) -> None:
    """Scales of [n, k / 32] with every e4m3 code from 8 up, or every e8m0 code in reach of bfloat16."""
    n, groups = 128, 4
    x = torch.arange(n * groups).view(n, groups)
    grouped = marlin.marlin_permute_scales(x.T.contiguous(), 32 * groups, n, 32)
    assert torch.equal(get("marlin_scale_grouped").pack(x), grouped)
    for single in (
        marlin.marlin_permute_scales(x.T.contiguous(), 32 * groups, n, -1),
        marlin.marlin_permute_scales(x.T.contiguous(), 32 * groups, n, 32, is_a_8bit=True),
    ):
        assert torch.equal(get("marlin_scale_single").pack(x), single)
    e8m0 = x.remainder(254).add(1).to(torch.uint8)
    permuted = marlin.marlin_permute_scales(e8m0.view(torch.float8_e8m0fnu).bfloat16().T.contiguous(), 128, n, 32)
    mxfp4 = marlin.mxfp4_marlin_process_scales(permuted).view(torch.uint8)
    assert torch.equal(get("marlin_scale_fp4").pack(e8m0), mxfp4)
    e4m3 = x.remainder(126 - 8).add(8).to(torch.uint8)
    permuted = marlin.marlin_permute_scales(e4m3.view(torch.float8_e4m3fn).half().T.contiguous(), 64, n, 16)
    nvfp4, factor = marlin.nvfp4_marlin_process_scales(permuted)
    assert factor == 1.0
    assert torch.equal(get("marlin_scale_fp4").pack(e4m3) + 120, nvfp4.view(torch.uint8))
