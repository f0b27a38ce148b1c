"""`moecheck warm`: FlashInfer's JIT modules built ahead of time; no GPU is needed. docs/warm.md."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.errors import WarmError
from harness.warm import specs
from harness.warm.build import Built
from harness.warm.module import make, narrowed
from harness.warm.pack import manifest, pack
from harness.warm.recipes import RECIPES, chosen
from harness.warm.specs import DOWNLOADS, GENERATORS, Spec

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
# The heaviest unit seen takes 8.3 GiB: eight bf16 kernels of fused_moe_90 (0.7.2.post1, nvcc 13.0).
_UNIT_GB = 9


def command(  # noqa: PLR0913 - typer turns parameters into options
    arch: Annotated[str, typer.Option(help="As FLASHINFER_CUDA_ARCH_LIST has it.")] = "9.0a",
    module: Annotated[str, typer.Option("--module", "-m", help="JIT module; --list names them.")] = "fused_moe_90",
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="Only what this needs; repeatable.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-n", help="Compilers at once; default: what the memory holds.", min=1)
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Object files, kept for the next time.")] = Path("runs/warm"),
    pack_file: Annotated[Path | None, typer.Option("--pack", help="Write a tar for the GPU runner.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Modules and recipes, and what each would compile.")] = False,
) -> None:
    """Build a FlashInfer JIT module ahead of time, or the part of it that a recipe needs."""
    folder = folder.resolve()
    try:
        if list_:
            out.print(_modules(arch, folder), _recipes())
            return
        _build(module, recipe or [], arch, folder, jobs or _fitting(), pack_file)
    except OSError as error:
        raise WarmError(f"{error}\n  what is built so far is kept in {folder}: run the same command again") from error


def _build(module: str, names: list[str], arch: str, folder: Path, jobs: int, file: Path | None) -> None:
    recipes = chosen(names, module)
    spec = specs.read([module], arch, folder)[module]
    if isinstance(spec, str):
        hint = "\n  it downloads headers from FlashInfer's vendor, which needs that network" if module in DOWNLOADS else ""
        raise WarmError(spec + hint)
    spec = narrowed(spec, recipes, folder)
    _compilers_are_here(spec)
    out.print(f"{spec.module}, {spec.toolchain}: {len(spec.units)} units, {jobs} at a time, object files in {folder}/objects")
    began = time.monotonic()
    made = make(spec, recipes, folder, jobs, _reporter(began))
    new = [one for one in made.objects if not one.kept]
    out.print(
        f"{made.library}: {_mib(made.library.stat().st_size)}, {made.stubs} functions not built; "
        f"{len(new)} units compiled now, {len(made.objects) - len(new)} kept; "
        f"{sum(one.seconds for one in made.objects):.0f} s of compilers in all, {time.monotonic() - began:.0f} s by the clock"
    )
    if file is not None:
        pack(made.library, manifest(spec, made.library, arch, names), file)
        out.print(f"{file}: {_mib(file.stat().st_size)}; on the GPU runner: tar -xf {file.name} -C SITE_PACKAGES")


def _reporter(began: float) -> Callable[[int, int, Built], None]:
    def report(done: int, total: int, one: Built) -> None:
        how = "kept" if one.kept else f"{one.seconds:.0f} s ({one.cpu:.0f} s of CPU), {one.peak_mib} MiB of memory"
        out.print(f"{done}/{total} {one.name}: {how}, object {_mib(one.size)} ({time.monotonic() - began:.0f} s)", markup=False)

    return report


def _compilers_are_here(spec: Spec) -> None:
    for compiler in sorted({unit.argv[0] for unit in spec.units} | {spec.linker}):
        if shutil.which(compiler) is None:
            raise WarmError(f"no compiler {compiler}: install the CUDA toolkit and a C++ compiler, set CUDA_HOME")


def _modules(arch: str, folder: Path) -> Table:
    asked = specs.read([name for name in GENERATORS if name not in DOWNLOADS], arch, folder)
    versions = {said.toolchain for said in asked.values() if isinstance(said, Spec)}
    table = Table("module", "units", "object files here", header_style="bold", title="; ".join(sorted(versions)))
    for name in GENERATORS:
        said = asked.get(name, "asked only when it is built: its generator downloads headers")
        if isinstance(said, str):
            table.add_row(name, "-", said)
        else:
            kept = sum((folder / "objects" / f"{unit.name}-{unit.key(said.toolchain)}.o").exists() for unit in said.units)
            table.add_row(name, str(len(said.units)), str(kept))
    return table


def _recipes() -> Table:
    table = Table("recipe", "module", "what is in it", header_style="bold")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.module, recipe.summary)
    return table


def _fitting() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / _UNIT_GB)))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
