"""One JIT module from its spec to its library: narrowed to recipes, compiled, linked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import WarmError
from harness.warm.build import Built, Report, build
from harness.warm.link import absent, link, stubs, undefined
from harness.warm.recipes import Recipe
from harness.warm.specs import Spec
from harness.warm.units import Unit, regroup

# The mangled name of the namespace that a recipe may leave parts of undefined.
_OURS = "12tensorrt_llm"


@dataclass(frozen=True, slots=True)
class Made:
    """A linked module: its library, its object files, and how many functions are stubs."""

    library: Path
    objects: tuple[Built, ...]
    stubs: int


def narrowed(spec: Spec, recipes: Sequence[Recipe], out: Path) -> Spec:
    """`spec` with the units that `recipes` need; generated units are written anew under `out`/regrouped. No recipe: `spec`."""
    if not recipes:
        return spec
    generated = [unit for unit in spec.units if unit.source.name.endswith(".generated.cu")]
    if len({unit.argv for unit in generated}) != 1:
        raise WarmError(f"{spec.module} of FlashInfer {spec.version} has no generated units, or several commands for them")
    kernels = {recipe.kernels for recipe in recipes}
    kept = [unit for unit in spec.units if unit not in generated and _needed(unit, kernels)]
    files = _regrouped([unit.source for unit in generated], recipes, out / "regrouped")
    return replace(spec, units=(*kept, *(Unit(file, generated[0].argv) for file in files)))


def _regrouped(sources: list[Path], recipes: Sequence[Recipe], folder: Path) -> list[Path]:
    """Each recipe's instantiations in files of their own, without those that an earlier recipe has."""
    files: list[Path] = []
    for at, recipe in enumerate(recipes):

        def wanted(text: str, recipe: Recipe = recipe, earlier: Sequence[Recipe] = recipes[:at]) -> bool:
            return recipe.wanted(text) and not any(other.wanted(text) for other in earlier)

        found = regroup(sources, wanted, folder, recipe.group)
        if not found and not recipes[:at]:
            raise WarmError(f"the generated units hold no instantiation that recipe {recipe.name} wants")
        files += found
    return files


def _needed(unit: Unit, kernels: set[str]) -> bool:
    """The kernels of other weights are most of the time; FP8 block scales have a unit of their own."""
    if unit.name.startswith("moe_gemm_kernels_"):
        return unit.name.removeprefix("moe_gemm_kernels_") in kernels
    return unit.name != "fp8_blockscale_gemm"


def make(spec: Spec, recipes: Sequence[Recipe], out: Path, jobs: int, report: Report) -> Made:
    """Compiles what is missing under `out`/objects and links `out`/NAME/NAME.so. `spec` is narrowed already."""
    ordered = sorted(spec.units, key=lambda unit: (unit.source.suffix != ".cu", "instances" in unit.name))
    built = build(ordered, spec.toolchain, out / "objects", jobs, report)
    objects = [Path(one.path) for one in built]
    missing = absent(undefined(objects), _OURS) if recipes else []
    if missing:
        built.append(stubs(spec, missing, ", ".join(recipe.name for recipe in recipes), out))
        objects.append(Path(built[-1].path))
    library = out / spec.module / f"{spec.module}.so"
    link(spec, objects, library)
    return Made(library, tuple(built), len(missing))
