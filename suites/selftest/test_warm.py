"""`moecheck warm` with a FlashInfer and an nvcc of our own: no unit is compiled twice, nothing half-built is kept."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.errors import UnknownName, WarmError
from harness.warm import specs
from harness.warm.build import Built, build
from harness.warm.link import absent
from harness.warm.module import Made, make, narrowed
from harness.warm.pack import manifest, pack
from harness.warm.recipes import RECIPES, chosen
from harness.warm.specs import Spec
from harness.warm.units import Unit, instances

pytestmark = pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs a C++ compiler and nm")

ROOT = Path(__file__).resolve().parents[2]
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && echo "Build cuda_13.0.r13.0/compiler.0" && exit
for word; do [ "$last" = -c ] && source="$word"; last="$word"; done
basename "$source" >> {here}/compiled
[ -e {here}/hang ] && case "$source" in *binding*) echo half > "$last"; exec sleep 60;; esac
[ -e {here}/fail ] && . {here}/fail
exec c++ -x c++ "$@"
"""
FLASHINFER = """
import os, pathlib
HERE = pathlib.Path(__file__).parent.parent.parent / "csrc"
class Spec:
    name, extra_ldflags, needs_device_linking = "fused_moe_90", [], False
    def get_compile_commands(self):
        nvcc = os.environ["CUDA_HOME"] + "/bin/nvcc"
        return [dict(file=str(f), command=f"{nvcc} -c {f} -fPIC -I{HERE} -o {f.stem}.o") for f in sorted(HERE.glob("*.cu"))]
def gen_cutlass_fused_moe_sm90_module():
    return Spec()
"""
LAUNCH = "template void {name}<__nv_bfloat16, {weights}, __nv_bfloat16,\n  {shape}, {schedule}> (\nInputs inputs);\n"
SHAPE = "cute::Shape<cute::Int<{}>, cute::Int<{}>, cute::Int<{}>>, cute::Shape<cute::Int<{}>, cute::Int<1>, cute::Int<1>>"
HEADER = """
namespace cute { template <int> struct Int {}; template <class...> struct Shape {}; }
struct __nv_bfloat16 {}; struct SafeFP4 {}; struct Fp8 {}; struct Inputs {};
struct KernelTmaWarpSpecializedPingpong {}; struct KernelTmaWarpSpecializedCooperative {};
namespace tensorrt_llm { template <class...> void launch(Inputs); }
"""
BINDING = """
#include "launch.h"
#include <stdexcept>
#include <string>
namespace tensorrt_llm { void fp4(); void fp8(); }
extern "C" char const* ask(int which) {
  static std::string said;
  try { which ? tensorrt_llm::fp8() : tensorrt_llm::fp4(); said = "ran"; } catch (std::exception& e) { said = e.what(); }
  return said.c_str();
}
"""


def launch(m: int, n: int, k: int, cluster: int = 1, weights: str = "SafeFP4") -> str:
    """An instantiation as FlashInfer's generator writes it, with the schedule that a tactic names."""
    schedule = "KernelTmaWarpSpecialized" + ("Cooperative" if m >= 128 else "Pingpong")
    return LAUNCH.format(name="launch", weights=weights, shape=SHAPE.format(m, n, k, cluster), schedule=schedule)


@dataclass(frozen=True)
class World:
    """A folder with a FlashInfer of four units, a toolkit, and the list of what was compiled."""

    here: Path

    @property
    def out(self) -> Path:
        return self.here / "out"

    def compiled(self) -> list[str]:
        log = self.here / "compiled"
        return log.read_text().split() if log.exists() else []

    def spec(self) -> Spec:
        spec = specs.read(["fused_moe_90"], "9.0a", self.out)["fused_moe_90"]
        assert isinstance(spec, Spec), spec
        return spec

    def make(self, *names: str, jobs: int = 2) -> tuple[Spec, Made]:
        recipes = chosen(list(names), "fused_moe_90")
        spec = narrowed(self.spec(), recipes, self.out)
        return spec, make(spec, recipes, self.out, jobs, lambda *_: None)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    package, source, toolkit = tmp_path / "site/flashinfer/jit", tmp_path / "site/csrc", tmp_path / "cuda/bin"
    for folder in (package, source, toolkit):
        folder.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("__version__ = '9.9'")
    (package / "__init__.py").touch()
    (package / "cpp_ext.py").write_text("import os\ndef get_cuda_path(): return os.environ['CUDA_HOME']")
    (package / "fused_moe.py").write_text(FLASHINFER)
    (source / "launch.h").write_text(HEADER)
    (source / "a_binding.cu").write_text(BINDING)
    calls = "void {0}() {{ launch<__nv_bfloat16, SafeFP4, __nv_bfloat16, {1}, KernelTmaWarpSpecializedPingpong>(Inputs()); }}"
    call = calls.format("fp4", SHAPE.format(64, 16, 128, 1))
    (source / "moe_gemm_kernels_bf16_fp4.cu").write_text(f'#include "launch.h"\nnamespace tensorrt_llm {{ {call} }}')
    (source / "moe_gemm_kernels_fp8_fp8.cu").write_text("namespace tensorrt_llm { void fp8() {} }")
    texts = [launch(64, 16, 128), launch(128, 64, 256), launch(64, 16, 128, 2), launch(64, 16, 128, weights="Fp8")]
    text = '#include "launch.h"\nnamespace tensorrt_llm {\ntemplate <class...> void launch(Inputs) {}\n'
    (source / "g_Mixed_group0.generated.cu").write_text(text + "\n".join(texts) + "}\n")
    (toolkit / "nvcc").write_text(NVCC.format(here=tmp_path))
    (toolkit / "nvcc").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent))
    return World(tmp_path)


def test_a_whole_module_is_built_loads_and_is_not_built_again(world: World) -> None:
    """A cache that asks for dates instead of contents rebuilds after every fresh checkout."""
    _, made = world.make()
    assert len(world.compiled()) == 4
    assert not any(one.kept for one in made.objects)
    assert made.stubs == 0
    library = ctypes.CDLL(str(made.library))
    library.ask.restype = ctypes.c_char_p
    assert library.ask(1) == b"ran"
    (world.here / "site/csrc/a_binding.cu").touch()
    _, again = world.make()
    assert len(world.compiled()) == 4
    assert all(one.kept for one in again.objects)
    assert [one.seconds for one in again.objects] == [one.seconds for one in made.objects]


def test_activations_share_a_generator_and_have_a_module_each(world: World) -> None:
    """One function describes all three, by its argument."""
    text = "from flashinfer.jit.fused_moe import Spec\nclass Named(Spec):\n"
    text += "    def __init__(self, which): self.name = which + '_and_mul'\n"
    text += "gen_act_and_mul_module = Named\n"
    (world.here / "site/flashinfer/jit/activation.py").write_text(text)
    names = [name for name in specs.GENERATORS if name.endswith("_and_mul")]
    found = specs.read(names, "9.0a", world.out)
    assert len(names) == 3
    assert {name: spec.module for name, spec in found.items() if isinstance(spec, Spec)} == {name: name for name in names}


@pytest.mark.parametrize("what", ["source", "flag", "compiler"])
def test_only_what_changed_is_built_again(world: World, what: str) -> None:
    """A key without the flags or the compiler's version links yesterday's objects into today's library."""
    spec, _ = world.make()
    if what == "source":
        file = world.here / "site/csrc/moe_gemm_kernels_fp8_fp8.cu"
        file.write_text(file.read_text() + "// another\n")
    elif what == "flag":
        spec = replace(spec, units=(replace(spec.units[0], argv=(*spec.units[0].argv, "-DX")), *spec.units[1:]))
    else:
        spec = replace(spec, toolchain="another")
    make(spec, [], world.out, 2, lambda *_: None)
    assert len(world.compiled()) == 4 + (4 if what == "compiler" else 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_where_it_was(world: World, number: signal.Signals) -> None:
    """An object file that is written in place would be taken for a whole one the next time."""
    (world.here / "hang").touch()
    code = "import typer; from harness.cli_warm import command; typer.run(command)"
    command = [sys.executable, "-c", code, "--out", str(world.out), "--jobs", "1"]
    paths = os.pathsep.join((str(ROOT), os.environ["PYTHONPATH"]))
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in patience():
        if "a_binding.cu" in world.compiled() or child.poll() is not None:
            break
    assert child.poll() is None
    os.killpg(child.pid, number)
    child.communicate(timeout=20)
    (world.here / "hang").unlink()
    before = world.compiled()
    assert before[-1] == "a_binding.cu"
    world.make(jobs=1)
    now = world.compiled()[len(before) :]
    assert sorted({*before, *now}) == sorted({*before[:-1], *now})
    assert not {*before[:-1]} & {*now}
    assert "a_binding.cu" in now


def patience(seconds: float = 20) -> Iterator[None]:
    """Looks again every 20 ms."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


def test_what_a_recipe_leaves_out_says_so_and_the_rest_runs(world: World) -> None:
    """A stub that returns, or a library that does not load, would be a kernel's fault in the verdict."""
    spec, made = world.make("w4a16")
    assert "moe_gemm_kernels_fp8_fp8.cu" not in world.compiled()
    assert made.stubs == 1
    library = ctypes.CDLL(str(made.library))
    library.ask.restype = ctypes.c_char_p
    assert library.ask(0) == b"ran"
    assert library.ask(1) == b"not built for this recipe (w4a16): tensorrt_llm::fp8()"
    about = manifest(spec, made.library, "9.0a", ["w4a16"])
    assert len(about["instances"]) == 2
    assert about["instances"][0].startswith("__nv_bfloat16, SafeFP4, __nv_bfloat16, Shape<128, 64, 256>, Shape<1, 1, 1>")


def test_a_second_recipe_keeps_what_the_first_has_built(world: World) -> None:
    world.make("w4a16")
    before = len(world.compiled())
    spec, made = world.make("w4a16", "w4a16_all")
    assert len(world.compiled()) == before + 1
    assert sum(len(instances(unit.source.read_text())) for unit in spec.units if "instances" in unit.name) == 3
    assert sum(not one.kept for one in made.objects) == 2  # the new instantiation, and the stub with the recipes' names


def test_the_tar_unpacks_to_where_flashinfer_looks(world: World) -> None:
    spec, made = world.make("w4a16")
    about = manifest(spec, made.library, "9.0a", ["w4a16"])
    file = world.here / "warm.tar.xz"
    pack(made.library, about, file)
    with tarfile.open(file) as tar:
        tar.extractall(world.here / "gpu", filter="data")
    folder = world.here / "gpu/flashinfer/data/aot/fused_moe_90"
    assert json.loads((folder / "moecheck.json").read_text()) == about
    assert ctypes.CDLL(str(folder / "fused_moe_90.so")).ask


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'x.cu:3:10: fatal error: cublasLt.h: No such file or directory' >&2; exit 1", "pip install nvidia-cublas"),
        ("echo 'fatal error: curand_kernel.h: No such file' >&2; exit 1", "pip install nvidia-curand"),
        ("echo 'fatal error: strange.h: No such file' >&2; exit 1", "no wheel is known for strange.h"),
        ("echo 'cannot write: No space left on device' >&2; exit 1", "the disk is full"),
        ("kill -9 $$", "fewer --jobs"),
        ("echo 'x.cu(7): error: no operator' >&2; exit 2", "the compiler ended with 2: x.cu(7): error: no operator"),
        ("exit 0", "the compiler ended with 0"),
    ],
)
def test_a_failing_compiler_is_told_with_its_remedy(world: World, script: str, says: str) -> None:
    (world.here / "fail").write_text(script + "\n")
    source = world.here / "site/csrc/moe_gemm_kernels_fp8_fp8.cu"
    unit = Unit(source, (str(world.here / "cuda/bin/nvcc"),))
    with pytest.raises(WarmError) as caught:
        build([unit], "", world.out, 1, lambda *_: None)
    assert says in str(caught.value)
    assert str(caught.value).startswith("moe_gemm_kernels_fp8_fp8: ")
    assert not list(world.out.iterdir())
    (world.here / "fail").unlink()
    assert not build([unit], "", world.out, 1, lambda *_: None)[0].kept


def test_no_compiler_no_flashinfer_no_such_module_or_recipe(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="fused_moe_90"):
        specs.read(["fused_moe_9"], "9.0a", world.out)
    with pytest.raises(UnknownName, match="w4a16"):
        chosen(["w4a61"], "fused_moe_90")
    with pytest.raises(WarmError, match="not of monomoe"):
        chosen(["w4a16"], "monomoe")
    assert "this release has no flashinfer.jit.monomoe" in str(specs.read(["monomoe"], "9.0a", world.out)["monomoe"])
    monkeypatch.setenv("CUDA_HOME", str(world.here))
    with pytest.raises(WarmError, match=r"no nvcc: .*bin/nvcc"):
        world.spec()
    (world.here / "site/flashinfer/__init__.py").write_text("raise ImportError('no tvm_ffi')")
    with pytest.raises(WarmError, match="no tvm_ffi"):
        world.spec()


def test_a_table_that_is_missing_is_no_function_to_stub() -> None:
    """A vtable in the place of which stands a function would jump into code that was read as an address."""
    assert absent({"_ZN12tensorrt_llm3fp8Ev", "_ZN3tvm3ffiEv", "cudaMalloc"}, "12tensorrt_llm") == ["_ZN12tensorrt_llm3fp8Ev"]
    with pytest.raises(WarmError, match="_ZTVN12tensorrt_llm6RunnerE"):
        absent({"_ZTVN12tensorrt_llm6RunnerE"}, "12tensorrt_llm")


def test_a_unit_that_fails_stops_the_rest(world: World) -> None:
    (world.here / "fail").write_text("exit 1\n")
    with pytest.raises(WarmError):
        world.make(jobs=1)
    assert len(world.compiled()) == 1


def test_progress_counts_every_unit_once(world: World) -> None:
    seen: list[tuple[int, int, Built]] = []
    make(world.spec(), [], world.out, 3, lambda *line: seen.append(line))
    assert [(done, total) for done, total, _ in seen] == [(i, 4) for i in range(1, 5)]
    assert all(one.size > 0 and one.peak_mib > 0 for *_, one in seen)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs flashinfer-python")
def test_the_recipes_fit_the_installed_flashinfer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that writes its instantiations in other words would give an empty recipe, or one of too many tactics."""
    monkeypatch.delenv("PYTHONPATH")
    spec = world.spec()
    found = {}
    for name, recipe in RECIPES.items():
        units = narrowed(spec, [recipe], world.here / name).units
        found[name] = sum(len(instances(unit.source.read_text())) for unit in units if "regrouped" in unit.source.parts)
    assert found == {"w4a16_default": 2, "w4a16": 12, "w4a16_all": 116, "bf16_default": 4, "bf16": 24, "bf16_all": 72}
    short = manifest(narrowed(spec, [RECIPES["bf16_default"]], world.here / "m"), Path(__file__), "9.0a", [])["instances"]
    assert short[0].startswith(
        "Sm90, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, void, EpilogueOpDefault, FINALIZE, 128, 16, 64, 1,"
    )
