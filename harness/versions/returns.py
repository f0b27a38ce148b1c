"""The form of what a function returns, by its return expressions: annotations lie, and modules are built at run time.

`value` is one object (an argument, a subscript, what torch or a method of a tensor makes); `list[2]`, `tuple[3]`, `none` and
the name of a class speak for themselves; `?List[int]` is a call that leads out of sight, into C++ or a callable that was handed
in, from a function annotated so.
`get_module().op(...)`, as JIT libraries write it, leads to what `get_module` returns as `op` in a SimpleNamespace.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from harness.versions.source import Function, Sources, statements

MAX_DEPTH = 8  # calls followed: four are the most seen in a release of FlashInfer
UNSEEN = "?"
CONTAINERS = {"list", "tuple", "dict"}
OF_TENSORS = {"view", "reshape", "to", "contiguous", "transpose", "permute", "squeeze", "unsqueeze", "flatten", "clone", "item"}


@dataclass(frozen=True)
class Scope:
    """A function where it stands: its module and the functions around it, the innermost last."""

    node: Function
    module: str
    around: tuple[Function, ...] = ()


def forms(sources: Sources, scope: Scope, depth: int = MAX_DEPTH) -> tuple[str, ...]:
    """The distinct forms of the return values of a function, sorted; a function without a value returns `none`."""
    reader = _Reader(sources, scope, depth)
    found = {form for value in _returned(scope.node) for form in reader.of(value)}
    if UNSEEN in found and scope.node.returns is not None:
        found = found - {UNSEEN} | {UNSEEN + ast.unparse(scope.node.returns)}
    return tuple(sorted(found or {"none"}))


def kinds(returns: tuple[str, ...]) -> tuple[str, ...]:
    """The forms without their lengths, the annotation believed where nothing else is seen: `value`, `list`, `tuple`, ...

    `?` alone stays: nothing is known of it.
    """
    return tuple(sorted({kind for form in returns for kind in _kinds(form)}))


def _kinds(form: str) -> set[str]:
    if not form.startswith(UNSEEN) or form == UNSEEN:
        return {form.partition("[")[0]}
    return _annotated(ast.parse(form.removeprefix(UNSEEN), mode="eval").body)


def _annotated(node: ast.expr) -> set[str]:
    if isinstance(node, ast.Constant):
        return _annotated(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else {"none"}
    if isinstance(node, ast.BinOp):
        return _annotated(node.left) | _annotated(node.right)
    if isinstance(node, ast.Subscript):
        head = ast.unparse(node.value).rpartition(".")[2]
        if head == "Optional":
            return _annotated(node.slice)
        if head == "Union" and isinstance(node.slice, ast.Tuple):
            return {kind for element in node.slice.elts for kind in _annotated(element)}
        return _annotated(node.value)
    name = ast.unparse(node).rpartition(".")[2].lower()
    return {name if name in CONTAINERS else "value"}


def _returned(function: Function) -> Iterator[ast.expr]:
    for node in own(function):
        if isinstance(node, ast.Return):
            yield node.value or ast.Constant(value=None)


def own(function: Function) -> Iterator[ast.stmt]:
    """The statements of a function without those of functions and classes inside it."""
    yield from statements(function.body)


class _Reader:
    def __init__(self, sources: Sources, scope: Scope, depth: int) -> None:
        self._sources, self._scope, self._depth = sources, scope, depth
        self._busy: set[str] = set()

    def of(self, value: ast.expr) -> set[str]:
        if isinstance(value, ast.Constant) and value.value is None:
            return {"none"}
        if isinstance(value, ast.List | ast.Tuple):
            starred = any(isinstance(e, ast.Starred) for e in value.elts)
            return {f"{type(value).__name__.lower()}[{'*' if starred else len(value.elts)}]"}
        if isinstance(value, ast.ListComp):
            return {"list[*]"}
        if isinstance(value, ast.Dict | ast.DictComp):
            return {"dict"}
        if isinstance(value, ast.IfExp):
            return self.of(value.body) | self.of(value.orelse)
        if isinstance(value, ast.Name):
            return self._name(value.id)
        if isinstance(value, ast.Call):
            return self._call(value)
        return {"value"}

    def _name(self, name: str) -> set[str]:
        """Whatever the function assigns to this local name."""
        if name in self._busy:
            return set()
        self._busy.add(name)
        found: set[str] = set()
        for node in own(self._scope.node):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                found |= self.of(node.value)
        self._busy.discard(name)
        return found - {"none"} or {"value"}  # an argument, or `None` until a branch fills it

    def _call(self, call: ast.Call) -> set[str]:
        if isinstance(call.func, ast.Name) and call.func.id in ("list", "tuple", "dict"):
            return {call.func.id if call.func.id == "dict" else f"{call.func.id}[*]"}
        target = self._target(call.func)
        if isinstance(target, str):
            return {target}
        if target is None or self._depth <= 0:
            return {"value" if _of_torch(call.func) else UNSEEN}
        return set(forms(self._sources, target, self._depth - 1))

    def _target(self, func: ast.expr) -> Scope | str | None:
        """The function that is called, the name of the class that is built, or None."""
        if isinstance(func, ast.Name):
            return self._by_name(func.id)
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Call):
            maker = self._target(func.value.func)
            return _member(self._sources, maker, func.attr) if isinstance(maker, Scope) else None
        return None

    def _by_name(self, name: str) -> Scope | str | None:
        around = (*self._scope.around, self._scope.node)
        for level in range(len(around), 0, -1):
            for node in own(around[level - 1]):
                if isinstance(node, Function) and node.name == name:
                    return Scope(node, self._scope.module, around[:level])
        found = self._sources.lookup(self._scope.module, name)
        if found is None:
            return None
        if isinstance(found.node, ast.ClassDef):
            return found.node.name
        return Scope(found.node, found.module) if isinstance(found.node, Function) else None


def _of_torch(func: ast.expr) -> bool:
    """`torch.empty` and the like, or a method of tensors."""
    return isinstance(func, ast.Attribute) and (func.attr in OF_TENSORS or ast.unparse(func).startswith("torch."))


def _member(sources: Sources, maker: Scope, name: str) -> Scope | None:
    """The function that `maker` returns under `name` in a SimpleNamespace."""
    reader = _Reader(sources, maker, 1)
    for value in _returned(maker.node):
        if isinstance(value, ast.Call):
            for keyword in value.keywords:
                if keyword.arg == name and isinstance(keyword.value, ast.Name):
                    target = reader._by_name(keyword.value.id)
                    return target if isinstance(target, Scope) else None
    return None
