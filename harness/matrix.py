"""What runs where: every backend x recipe of a platform, and the entry points that no backend calls yet. Computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from harness.backends.base import Backend
from harness.config import Platform


class Way(StrEnum):
    """How a cell of the matrix is judged."""

    NATIVE = "native"  # the kernel itself, on the platform's device
    TWIN = "twin"  # the kernel there, and its adapter over a torch twin on the CPU
    CONTRACT = "contract only"  # its shapes, ranges and signature are stated; nothing runs


@dataclass(frozen=True)
class Cell:
    """One recipe of one subject. ways: how it is judged; routings: the rules it computes by itself, none for a kernel that is
    handed top-k ids; padding: rows of its token tile and what its widths are multiples of, in words."""

    subject: str
    library: str
    recipe: str
    ways: tuple[Way, ...]
    activation_format: str
    routings: tuple[str, ...]
    padding: str


def matrix(platform: Platform, backends: Mapping[str, Backend]) -> list[Cell]:
    """The cells of a platform: of a backend one for each recipe that both it and the platform's plans take, then those of
    contracts that no backend stands for."""
    cells = [cell for backend in backends.values() for cell in _of_backend(platform, backend, backends)]
    called = [(entry, cell.recipe) for cell in cells for entry in backends[cell.subject].entries]
    for contract in platform.contracts:
        routings = ("logits",) if contract.routing == "logits" else ()
        for recipe in contract.recipes:
            if not any(recipe == other and same(contract.entry, entry) for entry, other in called):
                padding = padding_of(platform, (contract.entry,), recipe)
                about = (contract.activation_format, routings, padding)
                cells.append(Cell(contract.entry, contract.library, recipe, (Way.CONTRACT,), *about))
    return sorted(cells, key=lambda cell: (Way.CONTRACT in cell.ways, cell.subject, cell.recipe))


def same(one: str, other: str) -> bool:
    """Two names of one thing: equal, or a function by two of its library's paths (flashinfer.fused_moe.f, flashinfer.f)."""
    ends = [(name.split(".")[0], name.rsplit(".", 1)[-1]) for name in (one, other)]
    return one == other or ("." in one and "." in other and ends[0] == ends[1])


def _of_backend(platform: Platform, backend: Backend, backends: Mapping[str, Backend]) -> Iterable[Cell]:
    if backend.archs and platform.arch not in backend.archs:
        return
    twin = platform.device != "cpu" and f"{backend.name}_twin" in backends
    ways = (Way.NATIVE, Way.TWIN) if twin else (Way.TWIN if _is_twin(backend, backends) else Way.NATIVE,)
    of_op = platform.ops.get(backend.op)
    planned = (of_op.recipe if of_op is not None else None) or platform.axes.recipe or ()
    for recipe in (r for r in backend.recipes if r in planned):
        padding = padding_of(platform, (backend.name, *backend.entries), recipe)
        yield Cell(backend.name, backend.library, recipe, ways, backend.activation_format, backend.routings, padding)


def _is_twin(backend: Backend, backends: Mapping[str, Backend]) -> bool:
    original = backends.get(backend.name.removesuffix("_twin"))
    return backend.name.endswith("_twin") and original is not None and original.twinned


def padding_of(platform: Platform, names: Iterable[str], recipe: str) -> str:
    """What the platform file says of a backend and the functions it calls."""
    names, said = tuple(names), []
    said += [f"rows {platform.padding_alignment[n].value}" for n in names if n in platform.padding_alignment]
    for width in platform.widths:
        if any(same(width.backend, name) for name in names) and recipe in (width.recipes or (recipe,)):
            sizes = (("hidden", width.hidden), ("w13 rows", width.gate_up), ("inter", width.inter))
            said += [f"{name} {size}" for name, size in sizes if size is not None]
    return ", ".join(dict.fromkeys(said))
