"""The Python sources inside a wheel, read by name and never imported: where a dotted name leads, through re-exports."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_HOPS = 12  # re-exports followed for one name: five are the most seen in a release of FlashInfer
MAX_MEMBER = 16 << 20  # bytes of one source file: the largest seen has 0.4 MB

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Imported:
    """`from module import name`; without a name the module itself."""

    module: str
    name: str | None


Binding = ast.stmt | ast.expr | Imported


@dataclass(frozen=True)
class Found:
    """A definition and the module that holds it."""

    node: ast.stmt | ast.expr
    module: str


class Sources:
    """The modules of an open wheel (or of any zip with a package folder in it)."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._members = set(archive.namelist())
        self._modules: dict[str, dict[str, Binding]] = {}
        self._stars: dict[str, tuple[str, ...]] = {}

    def path(self, module: str) -> str | None:
        """The member that is this module, or None."""
        stem = module.replace(".", "/")
        return next((p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in self._members), None)

    def text(self, member: str) -> str | None:
        """The text of a member; None if there is none of this name."""
        if member not in self._members or self._archive.getinfo(member).file_size > MAX_MEMBER:
            return None
        return self._archive.read(member).decode("utf-8", errors="replace")

    def find(self, dotted: str) -> Found | None:
        """What `package.module.name` is defined as, in whatever module: a function, a class or a value."""
        module, _, name = dotted.rpartition(".")
        while module and self.path(module) is None:
            module, _, head = module.rpartition(".")
            name = f"{head}.{name}"
        return self.lookup(module, name) if module else None

    def lookup(self, module: str, name: str, hops: int = MAX_HOPS) -> Found | None:
        """What `name` (with dots for a member of a class or a submodule) means inside `module`."""
        first, _, rest = name.partition(".")
        found = self._first(module, first, hops)
        if not rest or found is None:
            return found
        if isinstance(found.node, ast.Module):
            return self.lookup(found.module, rest, hops - 1)
        if isinstance(found.node, ast.ClassDef):
            member = next((n for n in bindings(found.node.body) if n[0] == rest), None)
            return Found(member[1], found.module) if member and not isinstance(member[1], Imported) else None
        return None

    def _first(self, module: str, name: str, hops: int) -> Found | None:
        if hops <= 0 or self.path(module) is None:
            return None
        bound = self._names(module).get(name)
        if isinstance(bound, Imported):
            if bound.name is None:
                return None
            return self.lookup(bound.module, bound.name, hops - 1) or self._module(f"{bound.module}.{bound.name}")
        if isinstance(bound, ast.Name) and bound.id != name:
            return self.lookup(module, bound.id, hops - 1)
        if bound is not None:
            return Found(bound, module)
        for star in self._stars[module]:
            if found := self.lookup(star, name, hops - 1):
                return found
        return self._module(f"{module}.{name}")

    def _module(self, dotted: str) -> Found | None:
        return Found(ast.Module(body=[], type_ignores=[]), dotted) if self.path(dotted) else None  # type: ignore[arg-type]

    def _names(self, module: str) -> dict[str, Binding]:
        if module not in self._modules:
            member = self.path(module)
            assert member is not None
            try:
                tree = ast.parse(self.text(member) or "")
            except SyntaxError:  # a file for a newer Python than ours: nothing of it is known
                tree = ast.Module(body=[], type_ignores=[])
            package = module if member.endswith("/__init__.py") else module.rpartition(".")[0]
            self._stars[module] = tuple(
                _absolute(n, package) for n in statements(tree.body) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"
            )
            names: dict[str, Binding] = {}
            for name, bound in bindings(tree.body, package):
                if name not in names or not isinstance(bound, ast.expr):  # `f = None` after a failed import is no definition
                    names[name] = bound
            self._modules[module] = names
        return self._modules[module]


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and of the `if`, `try` and `with` blocks in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
            yield from statements(node.body)
            yield from statements(getattr(node, "orelse", []))
            yield from statements(getattr(node, "finalbody", []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def bindings(body: Iterable[ast.stmt], package: str = "") -> Iterator[tuple[str, Binding]]:
    """(name, what it is bound to) of every definition, import and plain assignment of a module or class body."""
    for node in statements(body):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, Imported(_absolute(node, package), alias.name)
        elif isinstance(node, Function | ast.ClassDef):
            if not any("overload" in ast.unparse(d) for d in node.decorator_list):
                yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])
