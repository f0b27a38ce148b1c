"""configs/platforms: every fact names a source and something that exists, and is what it says where that can be asked."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from harness import config, plan
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.hardware import Integers, ScaleShape
from harness.select import TEMPLATE, plan_backend
from reference.bitmatrix import bitmatrix

NAMES = config.names("platforms")
PLATFORMS = {name: config.platform(name) for name in NAMES}
BACKENDS = discover()
ENTRIES = {c.entry for p in PLATFORMS.values() for c in p.contracts} | {e for b in BACKENDS.values() for e in b.entries}
FOLDERS = ("fused_moe", "gemm", "quantization", "grouped_mm")  # of FlashInfer: all its source takes minutes to parse
MODELS = ("mixtral_8x7b", "deepseek_v3", "qwen3_30b_a3b", "qwen3_235b_a22b", "gpt_oss_20b", "gpt_oss_120b", "llama4_scout")
MODELS += ("llama4_maverick", "kimi_k2", "minimax_m2", "deepseek_v3_shared", "kimi_k2_shared")


@pytest.fixture(params=NAMES)
def platform(request: pytest.FixtureRequest) -> config.Platform:
    return PLATFORMS[request.param]


@cache
def flashinfer() -> dict[str, list[set[str]]]:
    """Function -> the parameters of each definition of that name in the installed wheel, those our files name. Its source is
    read: importing it would initialise CUDA."""
    wanted = {name.rsplit(".", 1)[1] for name in (*ENTRIES, *named()) if name.startswith("flashinfer.")}
    found: dict[str, list[set[str]]] = {}
    spec = find_spec("flashinfer")
    for root in spec.submodule_search_locations or () if spec else ():
        files = [p for folder in FOLDERS for p in (Path(root) / folder).rglob("*.py")] + sorted(Path(root).glob("*.py"))
        for path in files:
            text = path.read_text(errors="replace")
            if wanted & set(re.findall(r"^def (\w+)\(", text, re.MULTILINE)):
                for node in (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)):
                    arguments = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
                    found.setdefault(node.name, []).append(arguments)
    return found


def named(*some: config.Platform) -> set[str]:
    """Every backend and library function that facts of these platforms (default: all) speak about."""
    found: set[str] = set()
    for p in some or PLATFORMS.values():
        found |= {w.backend for w in p.widths} | set(p.top_k) | {s.backend for s in p.scale_shapes}
        found |= {name for hazard in p.hazards for name in hazard.backends}
    return found


def test_what_it_names_exists(platform: config.Platform) -> None:
    """A misspelt backend has facts that nobody reads. A library function is a contract, or what a backend calls, or a
    quantiser or router beside the layer."""
    for name in named(platform):
        if "." not in name:
            assert name in BACKENDS, name
        elif not name.startswith("flashinfer."):
            assert name in ENTRIES or name.rsplit(".", 1)[0] in {e.rsplit(".", 1)[0] for e in ENTRIES}, name
        elif flashinfer():
            assert name.rsplit(".", 1)[1] in flashinfer(), name
    assert {*platform.padding_alignment, *platform.backends} <= set(BACKENDS)


def test_it_says_what_integers_do(platform: config.Platform) -> None:
    assert platform.integers is not None
    assert platform.hazards


@pytest.mark.parametrize("name", NAMES)
def test_a_sentinel_sets_a_bit_only_where_shifts_are_masked(name: str) -> None:
    """vllm#38504: word = -1 / 32, bit = 1 << -1 % 32. On CUDA the shift leaves nothing, on HIP it is bit 31 of word 0."""
    integers = PLATFORMS[name].integers
    assert integers is not None
    word = integers.quotient(-1, 32)
    remainder = -1 - 32 * word
    words = [integers.shifted(1, remainder) if i == word else 0 for i in range(2)]
    hip = name.startswith("gfx")
    assert words == ([1 << 31, 0] if hip else [0, 0])
    if hip:
        assert words == bitmatrix(torch.tensor([[-1]]), 40, "c")[0].tolist()


def test_the_cpus_integers_are_torchs() -> None:
    integers = PLATFORMS["cpu"].integers
    assert integers is not None
    for value in (-33, -32, -1, 0, 31, 33):
        assert integers.quotient(value, 32) == (torch.tensor(value) // 32).item()
    one = torch.ones((), dtype=torch.int32)
    for by in (0, 5, 31, 32, 33, -1):
        assert integers.shifted(1, by) == (one << torch.tensor(by, dtype=torch.int32)).item() & 0xFFFFFFFF


def test_integers_of_c() -> None:
    c = Integers(division="truncate", shift="masked", source="an example")
    assert [c.quotient(n, 32) for n in (-33, -32, -1, 0, 33)] == [-1, -1, 0, 0, 1]
    assert [c.shifted(1, by) for by in (31, 32, 33, -1)] == [1 << 31, 1, 2, 1 << 31]


def test_every_width_has_a_level_on_and_one_off_it(platform: config.Platform) -> None:
    """A kernel that pads wrongly is right on its own grid; one that refuses must say so off it."""
    levels = platform.axes.levels()
    for width in platform.widths:
        for axis, multiple, of in (("hidden", width.hidden, 1), ("inter", width.inter, 1), ("inter", width.gate_up, 2)):
            sizes = [of * int(size) for size in levels[axis]]
            assert multiple is None or any(size % multiple == 0 for size in sizes), f"{width.backend}: {axis} {multiple}"
            assert multiple is None or multiple <= 32 or any(size % multiple for size in sizes), f"{width.backend}: {axis}"


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_shape_evaluates(name: str) -> None:
    case = TEMPLATE.vary(tokens=3, hidden=256, inter=64, experts=5, top_k=2)
    for stated in PLATFORMS[name].scale_shapes:
        assert all(size > 0 for size in stated.at(case.vary(recipe=stated.recipe))), stated


def shape(*factors: int | str, release: str = "") -> ScaleShape:
    return ScaleShape(backend="b", recipe="bf16", buffer="s", shape=factors, release=release, source="an example")


def test_a_stated_factor_is_evaluated_as_it_reads() -> None:
    case = TEMPLATE.vary(hidden=100, inter=48)
    stated = shape(2, "experts", "2 * inter", "hidden / 16", "2 * inter / 32", "pad(2 * inter, 128)", "pad(hidden / 16, 4) / 4")
    assert stated.at(case) == (2, 8, 96, 7, 3, 128, 2)
    assert shape().at(case) == ()


@pytest.mark.parametrize("factor", ["width", "hidden // 16", "pad(hidden, inter)", "pad(pad(hidden, 4), 4)", "hidden / inter"])
def test_a_factor_that_cannot_be_read_is_refused(factor: str) -> None:
    with pytest.raises(ValidationError, match="is no factor"):
        shape(factor)


def test_a_release_is_a_range_of_versions() -> None:
    assert [shape(1, release=">=0.6.11").holds(v) for v in ("0.6.8.post1", "0.6.11rc1", "0.6.11", "0.6.11.post2")] == [
        0,
        0,
        1,
        1,
    ]
    assert shape(1).holds("0.1")
    with pytest.raises(ValidationError, match="wanted e"):
        shape(1, release="0.6.11+")


def test_a_folded_scale_has_one_form_in_each_release() -> None:
    """FlashInfer's SM90 interleave was 3-D, 5-D, 3-D and 5-D again: the same call, other bytes."""
    entry = "flashinfer.fused_moe.cutlass_fused_moe"
    forms = [
        s for s in PLATFORMS["sm90"].scale_shapes if (s.backend, s.recipe, s.buffer) == (entry, "mxfp4", "quant_scales[0]")
    ]
    releases = ("0.6.10", "0.6.15.post1", "0.6.16", "0.6.16.post3", "0.6.17", "0.6.18", "0.7.2.post1")
    assert [[len(s.shape) for s in forms if s.holds(release)] for release in releases] == [[3], [3], [5], [3], [3], [5], [5]]
    case = TEMPLATE.vary(hidden=256, inter=64)
    assert len({torch.tensor(s.at(case)).prod().item() for s in forms}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_library_has_the_named_parameters(name: str) -> None:
    """A renamed parameter makes its scale shape a fact about nothing."""
    try:
        installed = version("flashinfer-python")
    except PackageNotFoundError:
        pytest.skip("flashinfer-python is not installed")
    for stated in (s for s in PLATFORMS[name].scale_shapes if s.backend.startswith("flashinfer.") and s.holds(installed)):
        parameter = re.sub(r"\[\d+\]$", "", stated.buffer)
        assert any(parameter in names for names in flashinfer()[stated.backend.rsplit(".", 1)[1]]), stated
    for contract in (c for c in PLATFORMS[name].contracts if c.entry.startswith("flashinfer.")):
        assert contract.entry.rsplit(".", 1)[1] in flashinfer(), contract.entry


def test_a_twin_can_be_planned_with_all_that_its_kernel_can() -> None:
    """What only an accelerator's file offered would never be asked of the adapter on a CPU."""
    cpu = PLATFORMS["cpu"].axes
    for loaded in PLATFORMS.values():
        for axis in ("recipe", "activation"):
            assert set(getattr(loaded.axes, axis)) <= set(getattr(cpu, axis)), f"{loaded.name}: {axis}"
        for contract in loaded.contracts:
            assert set(contract.recipes) <= set(loaded.axes.recipe or ()), f"{loaded.name}: {contract.entry}"


def ranged() -> list[tuple[str, Backend, config.Platform]]:
    """(what the range is of, backend, platform) of every backend that a top-k range speaks about."""
    return [
        (name, backend, loaded)
        for loaded in PLATFORMS.values()
        for name in loaded.top_k
        for backend in BACKENDS.values()
        if (backend.name == name or name in backend.entries) and (not backend.archs or loaded.arch in backend.archs)
    ]


def test_no_plan_leaves_a_range_of_top_k() -> None:
    for name, backend, loaded in ranged():
        axes = {**plan.platform_axes(loaded, config.tier("smoke"), backend.name), "top_k": [1, 8, 9, 16, 33, 64]}
        cases = plan_backend({**axes, "experts": [128]}, backend, plan.device_named(loaded), 1)
        beyond = [case.id for case in cases if not loaded.top_k[name].least <= case.shape.top_k <= loaded.top_k[name].most]
        assert not beyond, f"{backend.name} takes {beyond[0]}, {name} does not"


def test_what_holds_on_a_sibling_is_in_front() -> None:
    ultra, base = PLATFORMS["sm103"], PLATFORMS["sm100"]
    assert ultra.contracts == base.contracts
    assert len(ultra.hazards) > len(base.hazards)
    assert ultra.top_k == base.top_k


@pytest.mark.parametrize("model", MODELS)
def test_a_model_can_be_cut_for_eight_ranks(model: str) -> None:
    loaded = config.production(model)
    assert all(loaded.inter % tp == 0 for tp in (1, 2, 4, 8))
    assert "config.json" in loaded.source


@pytest.mark.parametrize("name", ["sm90", "sm100"])
def test_every_model_is_in_the_nightly(name: str) -> None:
    """And every production case can exist: an impossible one would end the first run on a machine nobody has here."""
    rows = config.tier("nightly").production[name]
    assert {row.model for row in rows} == set(MODELS) == set(config.names("models"))
    assert {row.tp for row in rows} == {1, 2, 4, 8}


@pytest.mark.parametrize("tier", config.names("tiers"))
def test_every_production_case_can_exist(tier: str) -> None:
    takes_all = BACKENDS["torch_grouped_mm"]  # cases are checked before the backend is asked
    for name in config.tier(tier).production:
        found: list[Case] = plan._production(
            name, config.tier(tier), takes_all, plan.device_named(PLATFORMS[name]), config.ROOT
        )
        assert isinstance(found, list)
