"""What a release promises of its entry points, read from its wheel by AST: nothing is imported, nothing installed.

A contract holds, per public name, where it is defined, its signature, the form of what it returns (its annotation lies at
times: `returns.py`), the compute capabilities its decorators allow, the values of an enum, a hash of the body of a layout
helper, and the texts of the argument checks of a C++ source.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from harness.versions.gates import archs
from harness.versions.returns import Scope, forms
from harness.versions.source import Found, Function, Sources, bindings

CALLED = ("__call__", "run", "forward")  # of a class: what is called after it was built
CHECK = re.compile(r"ICHECK\w*\s*\((.*?)\)\s*<<(.*?);", re.DOTALL)  # TVM_FFI_ICHECK(...) << "text" << ...;
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry point; `default` None means required, the text "None" is the default None."""

    name: str
    kind: str  # "positional", "keyword", "*", "**"
    annotation: str
    default: str | None


@dataclass(frozen=True)
class Entry:
    """The contract of one name. Empty fields do not apply to it."""

    at: str
    signature: str = ""
    returns: tuple[str, ...] = ()
    archs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    body: str = ""
    seen: tuple[str, ...] = ()  # forms of what real runs returned, without sizes

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Of the signature, in order."""
        return _parameters(self._parsed.args) if self.signature else ()

    @cached_property
    def annotation(self) -> str:
        """Of what is returned; empty without one."""
        return ast.unparse(self._parsed.returns) if self.signature and self._parsed.returns else ""

    @cached_property
    def _parsed(self) -> ast.FunctionDef:
        node = ast.parse(f"def f{self.signature}: ...").body[0]
        assert isinstance(node, ast.FunctionDef)
        return node

    def to_json(self) -> dict[str, Any]:
        """Plain data without the empty fields."""
        return {name: value for name, value in vars(self).items() if value and name in self.__dataclass_fields__}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Entry:
        """The inverse of `to_json`."""
        lists = {name: tuple(data[name]) for name in ("returns", "checks", "seen") if name in data}
        gates = {backend: tuple(ccs) for backend, ccs in data.get("archs", {}).items()}
        return Entry(**{**data, **lists, "archs": gates})


@dataclass(frozen=True)
class Contract:
    """One release of one package: its wheel and what it promises, by public name. seen: what real runs got from names that are
    no entries, as `Entry.seen` has it."""

    package: str
    version: str
    wheel: str
    sha256: str
    entries: Mapping[str, Entry]
    seen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, name: str) -> Entry | None:
        """The entry of this name, or of another public path of the same package to a thing so called."""
        package, last = name.partition(".")[0], name.rpartition(".")[2]
        same = (e for n, e in sorted(self.entries.items()) if n.startswith(f"{package}.") and n.endswith(f".{last}"))
        return self.entries.get(name) or next(same, None)

    @cached_property
    def returns(self) -> dict[str, tuple[str, ...]]:
        """The forms that real runs got, without sizes, of every name that ran."""
        return {**self.seen, **{name: entry.seen for name, entry in self.entries.items() if entry.seen}}

    def with_returns(self, returns: Mapping[str, Iterable[str]]) -> Contract:
        """The same with these forms, too: of an entry with the entry, else in `seen`."""
        whole = {name: tuple(sorted({*self.returns.get(name, ()), *forms})) for name, forms in returns.items()}
        entries = {name: replace(entry, seen=whole.get(name, entry.seen)) for name, entry in self.entries.items()}
        others = {name: forms for name, forms in whole.items() if name not in entries}
        return replace(self, entries=entries, seen={**self.seen, **others})

    def to_json(self) -> str:
        """One line per entry, sorted: two releases compare well in any diff tool."""
        head = {"package": self.package, "version": self.version, "wheel": self.wheel, "sha256": self.sha256}
        lines = [f"{json.dumps(name)}:{_compact(entry.to_json())}" for name, entry in sorted(self.entries.items())]
        seen = [f"{json.dumps(name)}:{_compact(list(forms))}" for name, forms in sorted(self.seen.items())]
        more = ',"seen":{\n' + ",\n".join(seen) + "\n}" if seen else ""
        return _compact(head)[:-1] + ',"entries":{\n' + ",\n".join(lines) + "\n}" + more + "}\n"

    @staticmethod
    def from_json(text: str) -> Contract:
        """The inverse; ValueError, KeyError, TypeError or AttributeError for anything else."""
        data = json.loads(text)
        seen = {name: tuple(forms) for name, forms in data.get("seen", {}).items()}
        entries = {name: Entry.from_json(e) for name, e in data["entries"].items()}
        return Contract(**{**data, "entries": entries, "seen": seen})


@dataclass(frozen=True)
class Wanted:
    """What is read of a package: public names, the layout helpers among them, and globs of C++ sources."""

    entries: tuple[str, ...]
    helpers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def extract(archive: zipfile.ZipFile, wanted: Wanted) -> dict[str, Entry]:
    """The contracts of the wanted names that the open wheel has; what it lacks is missing from the answer."""
    sources = Sources(archive)
    found: dict[str, Entry] = {}
    for name in (*wanted.entries, *wanted.helpers):
        if (at := sources.find(name)) is not None:
            found |= _entries(sources, name, at, hashed=name in wanted.helpers)
    for member in wanted.sources:
        if (text := sources.text(member)) is not None:
            found[member] = Entry(member, checks=checks(text), body=_digest(_squeezed(text)))
    return found


def checks(text: str) -> tuple[str, ...]:
    """The sentences that the argument checks of a C++ source print, in order, once each."""
    said = ("".join(TEXT.findall(match[2])).strip() for match in CHECK.finditer(text))
    return tuple(dict.fromkeys(sentence for sentence in said if sentence))


def _entries(sources: Sources, name: str, at: Found, hashed: bool) -> dict[str, Entry]:
    where = sources.path(at.module) or ""
    node = at.node
    if isinstance(node, Function):
        body = _digest(_reached(sources, node, at.module)) if hashed else ""
        return {name: _function(sources, node, at.module, body)}
    if isinstance(node, ast.ClassDef):
        if any("Enum" in ast.unparse(base) for base in node.bases):
            return {name: Entry(where, values=_values(node))}
        return _class(sources, name, node, at.module)
    return {name: Entry(where)}


def _function(sources: Sources, node: Function, module: str, body: str = "", method: bool = False) -> Entry:
    arguments = node.args
    if method:
        arguments = ast.arguments(**{**vars(arguments), "args": arguments.args[1:]})
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    gates = archs(sources, node, module)
    returned = forms(sources, Scope(node, module))
    return Entry(sources.path(module) or "", f"({ast.unparse(arguments)}){result}", returned, gates, body=body)


def _class(sources: Sources, name: str, node: ast.ClassDef, module: str) -> dict[str, Entry]:
    members = dict(bindings(node.body))
    where = sources.path(module) or ""
    if isinstance(init := members.get("__init__"), Function):
        found = {name: Entry(where, _function(sources, init, module, method=True).signature)}
    else:
        fields = [(n, b) for n, b in members.items() if isinstance(b, ast.AnnAssign)]
        text = (f"{n}: {ast.unparse(b.annotation)}" + (f" = {ast.unparse(b.value)}" if b.value else "") for n, b in fields)
        found = {name: Entry(where, f"(*, {', '.join(text)})" if fields else "()")}
    for called in CALLED:
        if isinstance(method := members.get(called), Function):
            found[f"{name}.{called}"] = _function(sources, method, module, method=True)
    return found


def _values(node: ast.ClassDef) -> dict[str, Any]:
    """Members of an enum; `(3,)`, as a trailing comma leaves it, is 3 to IntEnum."""
    found: dict[str, Any] = {}
    for name, bound in bindings(node.body):
        if not isinstance(bound, ast.expr) or name.startswith("_"):
            continue
        try:
            value = ast.literal_eval(bound)
        except ValueError:
            value = ast.unparse(bound)
        found[name] = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _reached(sources: Sources, node: Function, module: str) -> str:
    """The code of a function and of the functions and constants of its module that it leads to."""
    seen: dict[str, str] = {}
    waiting: list[tuple[str, ast.AST]] = [(node.name, node)]
    while waiting:
        name, at = waiting.pop()
        if name not in seen:
            seen[name] = canonical(at)
            named = ((n.id, sources.lookup(module, n.id)) for n in ast.walk(at) if isinstance(n, ast.Name))
            waiting += [(n, f.node) for n, f in named if f and f.module == module and not isinstance(f.node, ast.ClassDef)]
    return "".join(text for _, text in sorted(seen.items()))


def canonical(node: ast.AST) -> str:
    """The structure of code, the same for every Python: no docstrings, annotations, positions or empty fields."""
    parts = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "ctx", "kind", "type_comment", "type_params", "decorator_list"):
            continue
        values = value if isinstance(value, list) else [value]
        if name == "body":
            values = [v for v in values if not (isinstance(v, ast.Expr) and isinstance(v.value, ast.Constant))]
        parts += [canonical(v) if isinstance(v, ast.AST) else repr(v) for v in values if v is not None]
    return f"({' '.join(parts)})"


def _parameters(arguments: ast.arguments) -> tuple[Parameter, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    rows: list[tuple[ast.arg, str, ast.expr | None]] = [
        (a, "positional", d) for a, d in zip(positional, [*missing, *arguments.defaults], strict=True)
    ]
    rows += [(arguments.vararg, "*", None)] if arguments.vararg else []
    rows += [(a, "keyword", d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    rows += [(arguments.kwarg, "**", None)] if arguments.kwarg else []
    return tuple(Parameter(a.arg, kind, _text(a.annotation) or "", _text(default)) for a, kind, default in rows)


def _text(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def _squeezed(text: str) -> str:
    """C++ without comments and white space."""
    return re.sub(r"\s+", "", re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _compact(data: object) -> str:
    return json.dumps(data, separators=(",", ":"))
