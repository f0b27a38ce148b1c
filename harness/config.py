"""YAML -> typed objects, the only reader of configs/. A mistake names file, line, what was given and what was wanted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from harness import paths
from harness.case import ACTIVATION_FORMATS, AXES, BIASES, FILLS, MAX_ELEMENTS, OPS, SKEWS, WEIGHTINGS
from harness.errors import ConfigError, UnknownName
from harness.hardware import Contract, Hazard, Integers, Range, RecipeText, ScaleShape, Source, Sourced, Widths
from harness.hardware import Strict as Strict  # also what bundles are read with
from harness.known import KnownIssue
from harness.reading import MAX_DEPTH, MAX_INTEGER, printable, regular
from harness.verdict import Status
from reference.activation import ACTIVATIONS
from reference.routing import RULES

ROOT, names = paths.CONFIGS, paths.names
MAX_BYTES = 1 << 20  # of a YAML file: the largest here has 8 KiB
# an issue or a change at GitHub, GitLab, Gitea; Bugzilla; Jira
THREAD = re.compile(
    r"https://[\w.-]+/(?:[\w./-]+/(?:issues|pull|pulls|merge_requests|discussions)/\d+|show_bug\.cgi\?id=\d+|browse/[A-Z]\w*-\d+)"
    r"(?:[#?/]\S*)?"
)
MAX_LIMIT_S = 86400.0  # a case that takes a day hangs
SIZES = ("tokens", "hidden", "inter", "experts", "top_k")
NAMES: Mapping[str, tuple[str, ...]] = {
    "routing": tuple(RULES),
    "activation": tuple(ACTIVATIONS),
    "fill": FILLS,
    "skew": SKEWS,
    "activation_format": ACTIVATION_FORMATS,
    "bias": BIASES,
    "weighting": WEIGHTINGS,
}


Tool = Annotated[str, Field(pattern="^(memcheck|racecheck|initcheck|synccheck)$")]
Size = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]


class Sizes(Strict):
    """Values of a size axis; `around` adds n - 1, n, n + 1 for each n (tile edges)."""

    values: tuple[Size, ...] = ()
    around: tuple[Size, ...] = ()
    source: Source

    @property
    def all(self) -> list[int | str]:
        """The values in ascending order, without repetition."""
        return sorted({*self.values, *(n + d for n in self.around for d in (-1, 0, 1))})


class Axes(Strict):
    """The levels of every axis of a plan; None means: as the platform says."""

    tokens: Sizes | None = None
    hidden: Sizes | None = None
    inter: Sizes | None = None
    experts: Sizes | None = None
    top_k: Sizes | None = None
    recipe: tuple[RecipeText, ...] | None = None
    routing: tuple[str, ...] | None = None
    activation: tuple[str, ...] | None = None
    fill: tuple[str, ...] | None = None
    skew: tuple[str, ...] | None = None
    bias: tuple[str, ...] | None = None
    weighting: tuple[str, ...] | None = None

    @field_validator("routing", "activation", "fill", "skew", "bias", "weighting")
    @classmethod
    def known(cls, names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        """Names must be known; the error lists near ones."""
        axis = str(info.field_name)
        for name in names or ():
            if name not in NAMES[axis]:
                raise ValueError(str(UnknownName(axis, name, NAMES[axis])))
        return names

    def levels(self) -> dict[str, list[int | str]]:
        """Axis name -> values, of the axes that are given."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: v.all if isinstance(v, Sizes) else list(v) for name, v in given.items() if v is not None}


def _ops(ops: dict[str, Axes]) -> dict[str, Axes]:
    """Ops, and axes that they have, by name."""
    for op, axes in ops.items():
        for kind, names, known in (
            ("op", (op,), tuple(OPS)),
            (f"axis of {op}", axes.levels(), OPS[op].axes if op in OPS else ()),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(str(UnknownName(kind, name, known)))
    return ops


OpAxes = Annotated[dict[str, Axes], AfterValidator(_ops)]


class Platform(Strict):
    """One hardware platform: which values the axes take, and what harness/hardware.py has models of. padding_alignment: rows
    of the token tile a backend pads to; top_k: what a backend or an entry point takes; ops: other values for the questions
    beside the whole layer."""

    name: str
    arch: str
    device: str
    axes: Axes
    like: str = ""
    padding_alignment: dict[str, Sourced]
    widths: tuple[Widths, ...] = ()
    scale_shapes: tuple[ScaleShape, ...] = ()
    top_k: dict[str, Range] = Field(default_factory=dict)
    integers: Integers | None = None
    hazards: tuple[Hazard, ...] = ()
    contracts: tuple[Contract, ...] = ()
    backends: dict[str, Axes] = Field(default_factory=dict)
    ops: OpAxes = Field(default_factory=dict)


class Production(Strict):
    """A layer shape people serve. bias: its experts have biases; weight_on_input: the routing weight multiplies what they
    read. A backend that does not take these is asked without."""

    hidden: int
    inter: int
    experts: int
    top_k: int
    routing: str
    activation: str
    bias: bool = False
    weight_on_input: bool = False
    source: Source


class ProductionRow(Strict):
    """One production case of a tier: a model's layer at one tensor-parallel size; for all backends, or the named ones."""

    model: str
    tokens: tuple[Size, ...]
    tp: int = Field(default=1, ge=1)
    recipe: tuple[RecipeText, ...]
    fill: tuple[str, ...] = ("real",)
    experts: int | None = None
    backends: tuple[str, ...] = ()
    why: Source


class Tier(Strict):
    """How much of the space a run covers. twins: the strength for twins of libraries, None for the same; checks: how many
    relations are asked of each case, None for all that apply; repeats: bare calls at the end of each case, for the bits of
    the first; probes: fills in which some of the exact cases are planned once more; ops: levels of the questions beside the
    whole layer; replay_runs, replay_s: what it may cost to explain one death by running the case again, alone and after
    others; sanitizer: tool of compute-sanitizer -> cases of each subject that are run under it in the end."""

    name: str
    strength: int = Field(ge=1, le=3)
    twins: int | None = Field(default=None, ge=1, le=3)
    limit_s: float = Field(gt=0, le=MAX_LIMIT_S)
    checks: int | None = Field(default=None, ge=0)
    repeats: int = Field(default=0, ge=0)
    probes: tuple[str, ...] = ()
    replay_runs: int = Field(default=1, ge=0)
    replay_s: float = Field(default=10, ge=0)
    sanitizer: dict[Tool, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    axes: Axes = Axes()
    platforms: dict[str, Axes] = Field(default_factory=dict)
    ops: OpAxes = Field(default_factory=dict)
    production: dict[str, tuple[ProductionRow, ...]] = Field(default_factory=dict)

    @field_validator("probes")
    @classmethod
    def known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Fills, by name."""
        return Axes(fill=names).fill or ()


def _thread(link: str) -> str:
    """An issue, a change or a page of findings that exists, where this checkout has the page."""
    if match := re.fullmatch(r"docs/findings\.md#(\S+)", link):
        page = ROOT.parent / "docs" / "findings.md"
        if page.is_file() and f'id="{match[1]}"' not in page.read_text():
            raise ValueError(f"an anchor of docs/findings.md; it has no {match[1]}")
    elif not THREAD.fullmatch(link):
        raise ValueError(
            "docs/findings.md#ANCHOR, or the URL of an issue or a change, e.g. https://github.com/OWNER/REPO/issues/1"
        )
    return link


class _Issue(Strict):
    id: str
    link: Annotated[str, AfterValidator(_thread)]
    backend: str
    arch: str
    match: dict[str, tuple[int | str, ...]] = Field(min_length=1)
    status: Status
    text: str = Field(min_length=4)
    expires: Annotated[date, Field(strict=True)] | None = None
    quarantine: bool = False
    sometimes: bool = False

    @model_validator(mode="after")
    def for_a_time(self) -> _Issue:
        """A case that nobody launches is never seen to pass: that must end by itself, and only deaths deserve it."""
        if self.sometimes and self.expires is None:
            raise ValueError("sometimes: true only with expires: YYYY-MM-DD, since no pass ever says that it is gone")
        if self.quarantine and (self.expires is None or self.status not in (Status.CRASHED, Status.HUNG)):
            raise ValueError("quarantine: true only with expires: YYYY-MM-DD and status CRASHED or HUNG")
        return self

    @field_validator("match")
    @classmethod
    def known(cls, match: dict[str, tuple[int | str, ...]]) -> dict[str, tuple[int | str, ...]]:
        """A misspelt axis would match nothing and excuse nothing, silently."""
        for name in match:
            if name not in AXES:
                raise ValueError(str(UnknownName("axis", name, AXES)))
        return match


class _Issues(Strict):
    issues: tuple[_Issue, ...]


Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, model: type[Model], context: Mapping[str, Any] | None = None) -> Model:
    """Read one YAML file as `model`, whose validators see `context`; ConfigError says file, line, given and wanted."""
    text = _text(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(str(path), line, f"the character {error.character:#04x}", f"YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        wanted = f"YAML: {printable(str(error.problem or error.context))[:300]}"
        raise ConfigError(str(path), 1 if mark is None else mark.line + 1, "text that is not YAML", wanted) from error
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        first = error.errors()[0]
        given = printable(f"{'.'.join(map(str, first['loc']))} = {first['input']!r:.80}"[:300])
        raise ConfigError(str(path), _line(node, first["loc"]) or 1, given, printable(_wanted(first, model)[:500])) from error


def _text(path: Path) -> str:
    try:
        data = regular(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(str(path), None, "an unreadable file", f"YAML: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(str(path), None, f"a file that is not read: {error}", "YAML") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(str(path), line, f"the byte {data[error.start]:#04x}", "YAML in UTF-8") from error


class _Loader(yaml.SafeLoader):
    """Plain data only: no tags that build objects (SafeLoader), no aliases (nine lines of them unfold to gigabytes in a
    message), no nesting that the parser's recursion does not survive, no scalar that Python's own types refuse."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not taken here", event.start_mark)  # type: ignore[arg-type]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise yaml.constructor.ConstructorError(None, None, "an integer beyond 64 bits", node.start_mark)
        return value


def _wanted(error: Any, model: type[BaseModel]) -> str:
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    known = _keys(model, error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=3, cutoff=0.4)
    return f"a known key: {' or '.join(near) if near else ', '.join(known)}"


def _keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `location`, following pydantic's models down."""
    for part in location:
        if isinstance(part, int) or not hasattr(model, "model_fields") or part not in model.model_fields:
            continue
        found = [a for a in _arguments(model.model_fields[part].annotation) if hasattr(a, "model_fields")]
        model = found[0] if found else model
    return list(model.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation] if not inner else [leaf for a in inner for leaf in _arguments(a)]


def _line(node: Any, location: tuple[int | str, ...]) -> int | None:
    """1-based line of the deepest part of `location` that exists in the YAML tree."""
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if entry is None:
                break
            node = entry[1] if isinstance(entry[1], yaml.CollectionNode) else entry[0]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            break
    return None if node is None else node.start_mark.line + 1


def _named(kind: str, name: str, model: type[Model], root: Path) -> Model:
    if name not in names(kind, root):
        raise UnknownName(kind.removesuffix("s"), name, names(kind, root))
    return load(root / kind / f"{name}.yaml", model)


def platform(name: str, root: Path = ROOT) -> Platform:
    """configs/platforms/NAME.yaml, with what holds on the platform that it is `like` in front."""
    own = _named("platforms", name, Platform, root)
    if not own.like:
        return own
    try:
        base = _named("platforms", own.like, Platform, root)
    except UnknownName as error:
        path = root / "platforms" / f"{name}.yaml"
        line = _line(_Loader(_text(path)).get_single_node(), ("like",)) or 1
        raise ConfigError(str(path), line, f"like: {own.like}", str(error)) from error
    both = {key: getattr(base, key) + getattr(own, key) for key in ("widths", "scale_shapes", "hazards", "contracts")}
    return own.model_copy(update={**both, "top_k": {**base.top_k, **own.top_k}})


def tier(name: str, root: Path = ROOT) -> Tier:
    """configs/tiers/NAME.yaml."""
    return _named("tiers", name, Tier, root)


def production(name: str, root: Path = ROOT) -> Production:
    """configs/models/NAME.yaml."""
    return _named("models", name, Production, root)


def known_issues(root: Path = ROOT, today: date | None = None) -> tuple[KnownIssue, ...]:
    """configs/known_issues.yaml, as of a day of UTC; default: today."""
    loaded, today = load(root / "known_issues.yaml", _Issues).issues, today or datetime.now(UTC).date()
    return tuple(KnownIssue(**dict(i), expired=i.expires is not None and i.expires < today) for i in loaded)
