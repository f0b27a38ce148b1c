"""Which compute capabilities the decorators of an entry point allow: FlashInfer's two, as text."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from harness.versions.source import Function, Sources

SUPPORTED = "supported_compute_capability"  # (list of capabilities), on a function or on the check of a backend
REQUIREMENT = "backend_requirement"  # ({backend: check}, common_check=check)


def archs(sources: Sources, function: Function, module: str) -> dict[str, tuple[int, ...]]:
    """Capabilities (90 for 9.0) by backend of the function; "" is the function itself. Empty without such decorators."""
    found: dict[str, tuple[int, ...]] = {}
    for call in _decorators(function):
        name = ast.unparse(call.func).rpartition(".")[2]
        if name == SUPPORTED and call.args:
            found[""] = _numbers(sources, call.args[0], module)
        elif name == REQUIREMENT:
            for backend, check in _checks(call):
                if (allowed := _of_check(sources, check, module)) is not None:
                    found[backend] = allowed
    return dict(sorted(found.items()))


def _decorators(function: Function) -> Iterator[ast.Call]:
    yield from (d for d in function.decorator_list if isinstance(d, ast.Call))


def _checks(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    for value in [*call.args, *(k.value for k in call.keywords)]:
        if isinstance(value, ast.Dict):
            for key, check in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), check
    yield from (("", k.value) for k in call.keywords if k.arg == "common_check")


def _of_check(sources: Sources, check: ast.expr, module: str) -> tuple[int, ...] | None:
    found = sources.lookup(module, check.id) if isinstance(check, ast.Name) else None
    if found is None or not isinstance(found.node, Function):
        return None
    return archs(sources, found.node, found.module).get("")


def _numbers(sources: Sources, node: ast.expr, module: str) -> tuple[int, ...]:
    if isinstance(node, ast.Name) and (found := sources.lookup(module, node.id)) and isinstance(found.node, ast.expr):
        node = found.node
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return tuple(sorted(e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, int)))
    return ()
