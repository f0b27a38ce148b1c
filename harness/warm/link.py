"""Object files to one shared library; what a recipe left out becomes a function that says so."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.errors import WarmError
from harness.warm.build import Built, build
from harness.warm.explain import explain
from harness.warm.specs import Spec
from harness.warm.units import Unit

# Prefixes of the functions of a library that may be missing here and is there on the GPU machine; its soname there.
_ELSEWHERE = {
    "cudart": (re.compile(r"cuda[A-Z]|__cuda"), "libcudart.so.{major}"),
    "cuda": (re.compile(r"cu[A-Z]"), "libcuda.so.1"),
    "nvrtc": (re.compile(r"nvrtc[A-Z]"), "libnvrtc.so.{major}"),
}
_TLLM = 'tensorrt_llm::common::TllmException("moecheck warm", 0, text.c_str())'
_STUBS = """\
#include <cxxabi.h>
#include <cstdlib>
#include <string>
{include}
[[noreturn]] __attribute__((cold)) static void not_built(char const* symbol) {{
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
  std::string text = std::string("not built for this recipe ({recipe}): ") + (name ? name : symbol);
  std::free(name);
  throw {raised};
}}
#define STUB(symbol) extern "C" void symbol() {{ not_built(#symbol); }}
{stubs}
"""


def undefined(objects: Sequence[Path]) -> set[str]:
    """The symbols that some object wants and none has. Weak references are not wanted."""
    wants, has = set[str](), set[str]()
    # One line a symbol: name, type, value, size; a new object starts with "path:" (POSIX format of nm).
    for line in _run(["nm", "--format=posix", *map(str, objects)], "nm").splitlines():
        words = line.split()
        if len(words) >= 2:
            (wants if words[1] == "U" else has).add(words[0])
    return wants - has


def absent(symbols: set[str], ours: str) -> list[str]:
    """Those of the module's own namespace (`ours`, as it is mangled). Raises WarmError where a stub cannot stand for one."""
    found = sorted(s for s in symbols if s.startswith("_Z") and ours in s)
    if data := [s for s in found if re.match(r"_ZT[VIS]", s)]:
        raise WarmError(f"a recipe left out the unit that defines {', '.join(data[:3])}: tables, which no stub replaces")
    return found


def stubs(spec: Spec, names: Sequence[str], recipe: str, folder: Path) -> Built:
    """An object file with a function for each of `names` that throws, with the recipe and the function's name."""
    host = next((unit for unit in spec.units if unit.source.suffix == ".cpp"), None)
    known = any("tllmException" in unit.source.name for unit in spec.units)
    text = _STUBS.format(
        include='#include "tensorrt_llm/common/tllmException.h"' if known else "#include <stdexcept>",
        # What the library catches where it sizes workspaces and offers tactics: a missing one is then not offered.
        raised=_TLLM if known else "std::runtime_error(text)",
        recipe=recipe,
        stubs="\n".join(f"STUB({name})" for name in names),
    )
    source = folder / "stubs.cpp"
    source.write_text(text)
    argv = host.argv if host is not None else ("c++", "-std=c++17", "-fPIC", "-O2")
    return build([Unit(source, argv)], spec.toolchain, folder / "objects", 1, lambda *_: None)[0]


def link(spec: Spec, objects: Sequence[Path], target: Path) -> None:
    """Links `target`, stripped. A library that only the GPU machine has is named in it and not needed here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = undefined(objects)
    flags, elsewhere, folder = list[str](), list[str](), target.parent / "elsewhere"
    for flag in spec.ldflags:
        calls, soname = _ELSEWHERE.get(flag.removeprefix("-l"), (None, ""))
        if calls is None:
            flags.append(flag)
        elif any(calls.match(symbol) for symbol in needed):
            elsewhere += [_empty(folder, flag, soname.format(major=_major(spec))), flag]
    part = target.with_suffix(".part")
    try:
        _run([spec.linker, *map(str, objects), "-Wl,--no-as-needed,-s", *flags, *elsewhere, "-o", str(part)], target.name)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _empty(folder: Path, flag: str, soname: str) -> str:
    """The option for a folder with a library of this soname and nothing in it; the toolkit's own is found before it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "empty.c"
    source.write_text("")
    library = folder / f"lib{flag.removeprefix('-l')}.so"
    _run(["c++", "-shared", f"-Wl,-soname,{soname}", str(source), "-o", str(library)], library.name)
    return f"-L{folder}"


def _major(spec: Spec) -> str:
    """CUDA's major version, from nvcc's build line: "Build cuda_13.0.r13.0/compiler.36424714_0"."""
    found = re.search(r"cuda_(\d+)\.", spec.toolchain)
    if found is None:
        raise WarmError(f"CUDA's version is not in nvcc's answer: {spec.toolchain}")
    return found[1]


def _run(command: list[str], what: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise WarmError(f"{what}: {error}\n  the package binutils or a C++ compiler is missing") from error
    if ended.returncode:
        raise WarmError(explain(what, ended.returncode, ended.stderr))
    return ended.stdout
