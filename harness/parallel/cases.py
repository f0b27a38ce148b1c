"""Which cases are judged on several ranks, as a plan of its own: `BACKEND_epN` on what a host can get wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.backends.base import Backend, Device
from harness.case import Case
from harness.errors import SelectionError
from harness.parallel.part import by_slots
from harness.select import Item, plan_backend

SUFFIX = re.compile(r"(?P<backend>.+)_ep(?P<ranks>\d+)")
STRENGTH = {"smoke": 1, "ci": 2, "nightly": 3}
EDGES: dict[str, dict[str, list[int | str]]] = {
    # no token, fewer than ranks, a tile and a row; the smallest sizes that every layout packs (harness/backends/_packing.py)
    "cpu": {"tokens": [0, 1, 33], "hidden": [256], "inter": [128], "top_k": [1, 2]},
    # several tiles and one row; off a power of two
    "cuda": {"tokens": [0, 1, 33, 257], "hidden": [512, 1536], "inter": [256, 768], "top_k": [1, 2, 8]},
}
COMMON: dict[str, list[int | str]] = {
    "routing": ["renormalize"],
    "fill": ["exact", "real"],
    "bias": ["nobias", "bias"],
    "skew": ["uniform", "hot", "half"],  # half: ranks that receive nothing; hot with top_k 1: everything goes to one rank
}
EACH = {"cpu": 4, "cuda": 16}  # experts of a rank; one more makes the ranks uneven


def name_of(backend: str, ranks: int) -> str:
    """The subject of a backend on so many ranks."""
    return f"{backend}_ep{ranks}"


def split(subject: str) -> tuple[str, int]:
    """(backend, ranks) of such a subject; SelectionError for another."""
    found = SUFFIX.fullmatch(subject)
    if found is None:
        raise SelectionError(f"subject {subject!r} is none of several ranks; wanted e.g. triton_moe_ep2")
    return found["backend"], int(found["ranks"])


def plan(backends: Iterable[Backend], device: Device, ranks: int, tier: str) -> list[Item]:
    """The items of a tier, grouped by case."""
    if tier not in STRENGTH:
        raise SelectionError(f"tier {tier!r}: there is no such tier of several ranks; wanted {', '.join(STRENGTH)}")
    items = []
    for backend in backends:
        if refuses(backend) is not None:
            continue
        axes = {**EDGES[device.kind], **COMMON, **_of(backend, ranks, EACH[device.kind])}
        items += [Item(case.id, name_of(backend.name, ranks)) for case in plan_backend(axes, backend, device, STRENGTH[tier])]
    return sorted(items)


def _of(backend: Backend, ranks: int, each: int) -> dict[str, list[int | str]]:
    activation = "swiglu" if "swiglu" in backend.activations else backend.activations[0]
    experts: Sequence[int | str] = (each * ranks, each * ranks + 1)
    return {"experts": list(experts), "recipe": list(backend.recipes), "activation": [activation]}


def refuses(backend: Backend) -> str | None:
    """Why a backend is not for several ranks, or None."""
    if backend.op != "moe":
        return f"it answers {backend.op}, not a layer"
    if backend.routings:
        return "it routes by itself; a rank is handed ids and weights"
    if backend.recorded is not None:
        return "its one case is somebody's recording"
    return None


def indivisible(backend: Backend, case: Case) -> str | None:
    """Why a case cannot be taken apart into packets, or None."""
    rounding = backend.rounding(case)
    if by_slots(backend) and case.weighting == "oninput":
        return "the routing weights are on the input; a slot is sent without its weight"
    if rounding is not None and rounding.spans_rows:
        how = "slot" if by_slots(backend) else "token"
        return f"a scale is fitted to the whole batch; a rank that receives a {how} of it would fit another"
    return None
