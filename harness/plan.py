"""Platform + tier + backends + filters -> the plan of a run: a list of (case, subject), and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from harness import config, paths
from harness.backends.base import Backend, Device
from harness.case import Case, Recipe, Shape
from harness.errors import CaseError, RunFolderError, SelectionError, UnknownName
from harness.plan_files import MAX_BYTES
from harness.reading import parse_json, printable, regular
from harness.select import Cover, Grid, Item, cover, grid_of, plan_backend, probes
from harness.shard import Shard, assign, costs

NAME = "plan.json"
SCHEMA = 1
HINT = "give a folder made by moecheck run, or a file made by moecheck plan"


@dataclass(frozen=True)
class Request:
    """What the user asked for. cases: ids, or patterns with * over ids; backends: names or patterns, empty for all;
    limit_s: seconds a case may take, None for the tier's; soak: all in one child, which is never recycled."""

    platform: str
    tier: str
    backends: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    limit_s: float | None = None
    soak: bool = False


@dataclass(frozen=True)
class Plan:
    """A request and the items it means. checks: relations asked of each case, None for all that apply; repeats: bare calls
    at the end of each; replay: (fresh children, seconds) that the explanation of one death may cost; seconds: what each item
    is expected to take, by which shards are balanced; () for a run that nobody planned to share."""

    request: Request
    limit_s: float
    items: tuple[Item, ...]
    checks: int | None = None
    repeats: int = 0
    replay: tuple[int, float] = (0, 0.0)
    seconds: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        """Identifies the plan: two runs can share a folder only if theirs are equal."""
        return digest_of([vars(item) for item in self.items])

    def share(self, shard: Shard | None) -> Plan:
        """The plan of a shard's items alone; the whole for None."""
        if shard is None:
            return self
        seconds = self.seconds or costs(self.items, {})
        return replace(self, items=assign(self.items, seconds, shard.count)[shard.index - 1], seconds=())

    def save(self, folder: Path) -> None:
        """Write plan.json into the run folder."""
        self.write(folder / NAME)

    def write(self, path: Path) -> None:
        """Write the plan's file."""
        paths.put(path, self.text())

    def text(self) -> str:
        """The plan's file: JSON, an item a line."""
        data = {"schema": SCHEMA, "digest": self.digest, "limit_s": self.limit_s, "checks": self.checks}
        data |= {"repeats": self.repeats, "replay": self.replay}
        data["request"] = asdict(self.request)
        times = [{"seconds": s} for s in self.seconds] or [{}] * len(self.items)
        lines = [json.dumps(vars(item) | time) for item, time in zip(self.items, times, strict=True)]
        return json.dumps(data, indent=1)[:-2] + ',\n "items": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def digest_of(items: object) -> str:
    """Of plain data, the items as a plan's file has them."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def load(place: Path) -> Plan:
    """The plan of a run folder, or of a plan's file; RunFolderError if there is none or it is not ours."""
    path = place if place.is_file() else place / NAME
    try:
        data = parse_json(regular(path, MAX_BYTES))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r:.80}, this moecheck reads {SCHEMA}")
        plan = _plan(data)
        if plan.digest != data["digest"]:
            raise RunFolderError(f"{path}: its items do not match its digest; the file was edited, start a new run")
        for item in plan.items:
            Case.parse(item.case_id)
    except OSError as error:
        raise RunFolderError(f"{path}: not a moecheck plan ({error.strerror}); {HINT}") from error
    except (ValueError, KeyError, TypeError, CaseError, UnknownName) as error:
        raise RunFolderError(f"{path}: not a moecheck plan ({printable(str(error))[:500]}); {HINT}") from error
    return plan


def _plan(data: dict[str, Any]) -> Plan:
    """ValueError, KeyError or TypeError for a key too many, too few, or of another type."""
    seconds = tuple(item.pop("seconds") for item in data["items"] if "seconds" in item)
    items = tuple(Item(**item) for item in data["items"])
    settings = (data["limit_s"], items, data["checks"], data["repeats"], data["replay"], seconds)
    plan = TypeAdapter(Plan).validate_python(asdict(Plan(Request(**data["request"]), *settings)))
    if seconds and (len(seconds) < len(items) or min(plan.seconds) < 0):
        raise ValueError(f"{len(seconds)} of {len(items)} items with seconds, the least {min(plan.seconds)}")
    if not 0 < plan.limit_s <= config.MAX_LIMIT_S or (plan.checks or 0) < 0 or not plan.items:
        raise ValueError(f"limit_s {plan.limit_s}, checks {plan.checks}, {len(plan.items)} items")
    return plan


def make(
    request: Request,
    backends: Mapping[str, Backend],
    device: Device,
    root: Path = config.ROOT,
    rows: Cover = cover,
    partly: bool = False,
) -> Plan:
    """Expand a request; UnknownName for a wrong name, SelectionError when nothing is left. A case given by its id is
    planned for the backends that take it, or for the named ones whatever they say. rows: `cover` or its cached twin.
    partly: of several patterns or ops some may find nothing, as on one of all platforms."""
    tier = config.tier(request.tier, root)
    subjects = chosen(request.backends, backends)
    cases = [Case.parse(case) for case in request.cases if "*" not in case]
    named = bool(request.backends)
    items = [Item(c.id, b.name) for c in cases for b in subjects if named or b.supports(c, device).ok]
    if len(cases) < len(request.cases) or not cases:
        items += _planned(request, subjects, device, root, rows)
    items = [item for item in dict.fromkeys(items) if _wanted(item, request)]
    asked = [f"--case {text}" for text in request.cases if not any(fnmatchcase(i.case_id, text) for i in items)]
    asked += [f"--op {op}" for op in request.ops if not any(i.case_id.startswith(f"{op}.") for i in items)]
    if not items or (asked and not partly):  # one of several that finds nothing would be missed by nobody
        filters = [*asked, *(f"--backend {name}" for name in request.backends)]
        what = f"no case of tier {tier.name} on {request.platform} is what is asked for by {', '.join(filters) or 'the tier'}"
        raise SelectionError(f"nothing to run: {what}; moecheck list --cases prints those that there are")
    replay = (tier.replay_runs, tier.replay_s)
    return Plan(request, request.limit_s or tier.limit_s, tuple(items), tier.checks, tier.repeats, replay)


def known_backend(name: str, backends: Mapping[str, Backend]) -> Backend:
    """The backend called `name`, or UnknownName."""
    if name not in backends:
        raise UnknownName("backend", name, backends)
    return backends[name]


def device_named(platform: config.Platform) -> Device:
    """The device a platform file describes, whether or not it is here: enough to plan and list."""
    return Device(platform.device, platform.arch)


def chosen(wanted: Iterable[str], backends: Mapping[str, Backend]) -> list[Backend]:
    """The backends of names and patterns with *; all of them without any."""
    matched = [[n for n in backends if fnmatchcase(n, name)] or [known_backend(name, backends).name] for name in wanted]
    names = dict.fromkeys(name for group in matched for name in group)
    return [backends[name] for name in names or backends]


def _wanted(item: Item, request: Request) -> bool:
    if request.ops and item.case_id.split(".", 1)[0] not in request.ops:
        return False
    return not request.cases or any(fnmatchcase(item.case_id, pattern) for pattern in request.cases)


def _planned(request: Request, subjects: list[Backend], device: Device, root: Path, rows: Cover) -> list[Item]:
    """Grouped by case, so that neighbours share inputs and oracle."""
    platform, tier = config.platform(request.platform, root), config.tier(request.tier, root)
    items = []
    for backend in subjects:
        axes = platform_axes(platform, tier, backend.name, backend.op)
        strength = tier.twins if backend.twin_of and tier.twins else tier.strength
        cases = plan_backend(axes, backend, device, strength, rows)
        if backend.op == "moe":
            cases += probes(cases, tier.probes) + _production(platform.name, tier, backend, device, root)
        items += [Item(case.id, backend.name) for case in cases]
    return sorted(items)


def platform_axes(platform: config.Platform, tier: config.Tier, backend: str, op: str = "moe") -> dict[str, list[int | str]]:
    """The levels a backend is planned over: the platform's; an axis that the platform names for this op replaces it, then
    one that the tier names, then one that the platform names for this backend. The edges of the tile the backend pads to
    are always among the tokens."""
    levels = platform.axes.levels()
    for more in (
        *(platform.ops.get(op), tier.axes, tier.platforms.get(platform.name), tier.ops.get(op)),
        platform.backends.get(backend),
    ):
        levels |= {} if more is None else more.levels()
    if backend in platform.padding_alignment:
        tile = platform.padding_alignment[backend].value
        levels["tokens"] = sorted({*levels["tokens"], tile - 1, tile, tile + 1}, key=int)
    return levels


def grid(request: Request, backend: Backend, root: Path = config.ROOT) -> Grid | None:
    """What a backend is planned over when all of it is asked for; None if nothing is left of some axis."""
    platform, tier = config.platform(request.platform, root), config.tier(request.tier, root)
    return grid_of(platform_axes(platform, tier, backend.name), backend)


def _production(platform: str, tier: config.Tier, backend: Backend, device: Device, root: Path) -> list[Case]:
    cases = []
    for row in tier.production.get(platform, ()):
        if row.backends and backend.name not in row.backends:
            continue
        model = config.production(row.model, root)
        experts = row.experts or model.experts
        for tokens, recipe, fill in ((t, r, f) for t in row.tokens for r in row.recipe for f in row.fill):
            shape = Shape(tokens, model.hidden, model.inter // row.tp, experts, model.top_k)
            case = Case("moe", shape, model.routing, model.activation, Recipe.parse(recipe), fill)
            case = replace(case, activation_format=backend.activation_format)
            if problem := case.problem():
                raise CaseError(f"tier {tier.name}, production row {row.model}: case {case.id} is impossible: {problem}")
            cases += [c for c in (_as_served(case, model), case) if c.problem() is None and backend.supports(c, device).ok][:1]
    return cases


def _as_served(case: Case, model: config.Production) -> Case:
    """With the model's biases, and its weights where it applies them."""
    if model.bias:
        case = replace(case, bias="bias")
    return replace(case, weighting="oninput") if model.weight_on_input else case
