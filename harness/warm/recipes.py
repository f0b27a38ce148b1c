"""Parts of a JIT module that are enough for one kind of weights; what is left out answers "not built for this recipe"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import UnknownName, WarmError


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which units of `module` are compiled, and which instantiations of its generated units."""

    name: str
    module: str
    summary: str
    group: int  # instantiations a file: 2 of bf16 x FP4 take up to 7.5 GB of memory, 8 more than 10; 8 of bf16 x bf16 8.3
    kernels: str  # of the moe_gemm_kernels_<acts>_<weights>.cu, those whose last part this matches
    wanted: Callable[[str], bool]  # asked with the text of an explicit instantiation


def _shape(text: str) -> tuple[int, ...]:
    """Tile m, n, k and cluster m, n, k of a mixed-input instantiation."""
    return tuple(int(size) for size in re.findall(r"cute::Int<(\d+)>", text))


def _selectable(text: str) -> bool:
    """Is this bf16 x FP4 instantiation one that a tactic names? The generator makes 184, the tactics are 116.

    Source: cutlass_heuristic.cpp, sm90_supports_coop: one schedule a tile, the other is never asked for.
    """
    if re.search(r"__nv_bfloat16, (SafeFP4|__nv_fp4_e2m1), __nv_bfloat16", text) is None:  # the second name until 0.6.15
        return False
    tile = _shape(text)[:3]
    return ("KernelTmaWarpSpecializedCooperative" in text) == (tile[0] >= 128 and tile != (128, 128, 512))


def _default(text: str) -> bool:
    """The default tactic (the first: get_candidate_tiles_sm90), and the kernel that sizes the workspace
    (calcMaxWorkspaceSizeTmaWarpSpecializedMixedInput), which is a tactic too."""
    return _selectable(text) and _shape(text) in ((64, 16, 128, 1, 1, 1), (128, 64, 256, 1, 1, 1))


def _few(text: str) -> bool:
    """Those two, and every tile of 128 columns of K without a cluster."""
    return _default(text) or (_selectable(text) and _shape(text)[2:] == (128, 1, 1, 1))


def _bf16(text: str) -> bool:
    return "Sm90, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16" in text


def _bf16_default(text: str) -> bool:
    """The tile of the default tactic (the first: get_candidate_tiles_sm90), both epilogues, both orders of the operands."""
    return _bf16(text) and re.search(r"\s128, 16, 64, 1, 1, 1,", text) is not None


def _bf16_few(text: str) -> bool:
    """Every tile without a cluster, both epilogues, both orders of the operands: 24 of 72."""
    return _bf16(text) and re.search(r"\d+, \d+, \d+, 1, 1, 1,", text) is not None


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("w4a16_default", "fused_moe_90", "MXFP4 weights x bf16: 2 of 116 tactics", 2, "bf16_fp4", _default),
        Recipe("w4a16", "fused_moe_90", "MXFP4 weights x bf16: 12 of 116 tactics", 2, "bf16_fp4", _few),
        Recipe("w4a16_all", "fused_moe_90", "MXFP4 weights x bf16: every tactic", 2, "bf16_fp4", _selectable),
        Recipe("bf16_default", "fused_moe_90", "bf16 x bf16: 4 of 72 Hopper kernels", 8, "bf16_bf16", _bf16_default),
        Recipe("bf16", "fused_moe_90", "bf16 x bf16: the 24 Hopper kernels without a cluster", 8, "bf16_bf16", _bf16_few),
        Recipe("bf16_all", "fused_moe_90", "bf16 x bf16: the 72 Hopper kernels, none of Ampere's", 8, "bf16_bf16", _bf16),
    )
}


def chosen(names: list[str], module: str) -> list[Recipe]:
    """The recipes of these names. Raises UnknownName, and WarmError for a recipe of another module."""
    for name in names:
        if name not in RECIPES:
            raise UnknownName("recipe", name, RECIPES)
        if RECIPES[name].module != module:
            raise WarmError(f"recipe {name} is one of {RECIPES[name].module}, not of {module}")
    return [RECIPES[name] for name in names]
