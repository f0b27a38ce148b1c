"""Finds backends: the files of this folder, the entry-point group `moecheck.backends`, and plugin files by path."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from harness import paths
from harness.backends.base import Backend, always
from harness.case import AXES, BIASES, OPS, WEIGHTINGS, Recipe
from harness.errors import MoecheckError, PluginError, UnknownName
from reference.activation import ACTIVATIONS
from reference.routing import RULES


def discover(plugins: Iterable[str] = ()) -> dict[str, Backend]:
    """Every backend by name. PluginError names the file that fails to import, declares nothing or reuses a name."""
    found: dict[str, Backend] = {}
    for origin, module in _modules(plugins):
        for backend in with_twins(_declared(origin, module)):
            if backend.name in found:
                raise PluginError(f"{origin}: backend {backend.name!r} is already defined elsewhere; choose another name")
            found[backend.name] = backend
    return found


def files(plugins: Iterable[str] = ()) -> dict[str, Path]:
    """Backend -> the file that declares it."""
    modules = [(origin, module) for origin, module in _modules(plugins) if module.__file__]
    return {b.name: Path(str(module.__file__)) for origin, module in modules for b in with_twins(_declared(origin, module))}


def with_twins(declared: Iterable[Backend]) -> Iterable[Backend]:
    """Each backend, and after one that is `twinned` the same adapter over its library's twin, a subject on the CPU."""
    for backend in declared:
        yield backend
        if backend.twinned:
            summary = f"{backend.name} over the twin of its library: the adapter is judged, no kernel"
            yield replace(
                backend,
                name=f"{backend.name}_twin",
                library="torch",
                archs=("cpu",),
                probe=always,
                summary=summary,
                script=None,
                twin_of=backend.name,
            )


def _modules(plugins: Iterable[str]) -> Iterable[tuple[str, ModuleType]]:
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if info.name != "base" and not info.name.startswith("_"):
            yield info.name, importlib.import_module(f"{__name__}.{info.name}")
    for entry in entry_points(group=paths.GROUP):
        yield f"entry point {entry.name}", _guarded(f"entry point {entry.name}", entry.load)
    for path in plugins:
        yield path, load_file(path)


def load_file(path: str) -> ModuleType:
    """Import a plugin, a FILE.py or a dotted module name; PluginError if it is missing or raises."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path) and not path.endswith(".py"):
        return _guarded(f"plugin {path}", lambda: importlib.import_module(path))
    file = Path(path)
    if not file.is_file():
        raise PluginError(f"plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"moecheck_plugin_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    def run() -> ModuleType:
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return module

    return _guarded(f"plugin {path}", run)


def _guarded(origin: str, load: object) -> ModuleType:
    try:
        module = load()  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        raise PluginError(f"{origin}: does not import: {type(error).__name__}: {error}") from error
    if not isinstance(module, ModuleType):
        raise PluginError(f"{origin}: wanted a module that defines BACKENDS, got {type(module).__name__}")
    return module


def _declared(origin: str, module: ModuleType) -> tuple[Backend, ...]:
    declared = getattr(module, "BACKENDS", ())
    faults = getattr(module, "FAULTS", ())
    if not isinstance(declared, tuple) or not isinstance(faults, tuple) or not (declared or faults):
        raise PluginError(f"{origin}: declares no backends; wanted BACKENDS = (Backend(...), ...), got {declared!r:.80}")
    declared = (*declared, *(getattr(fault, "backend", fault) for fault in faults))
    if not all(isinstance(b, Backend) for b in declared):
        raise PluginError(f"{origin}: declares no backends; wanted BACKENDS = (Backend(...), ...), got {declared!r:.80}")
    for backend in declared:
        _check_names(origin, backend)
    return declared


def _check_names(origin: str, backend: Backend) -> None:
    """What a backend says it takes must exist: a typo would silently plan nothing."""
    try:
        if backend.op not in OPS:
            raise UnknownName("op", backend.op, OPS)
        for recipe in backend.recipes:
            Recipe.parse(recipe)
        for kind, given, known in (
            ("activation", backend.activations, tuple(ACTIVATIONS)),
            ("routing", backend.routings, tuple(RULES)),
            ("bias", backend.biases, BIASES),
            ("weighting", backend.weightings, WEIGHTINGS),
            ("axis of a limit", tuple(a for limit in backend.limits for a in limit.axes), AXES),
        ):
            for name in given:
                if name not in known:
                    raise UnknownName(kind, name, known)
    except MoecheckError as error:
        raise PluginError(f"{origin}: backend {backend.name}: {error}") from error
    if not re.fullmatch(r"[A-Za-z]\w*", backend.name, re.ASCII):
        raise PluginError(f"{origin}: backend name {backend.name!r} must be letters, digits and _: it is typed in commands")
    if not backend.recipes or ("activation" in OPS[backend.op].axes and not backend.activations):
        raise PluginError(f"{origin}: backend {backend.name}: takes no recipe or no activation; it could never run")
