"""Which function a backend calls: the library's own on an accelerator, its twin on the CPU.

A twin (harness/twins/libs) has the name and the signature of the library's function and reads the same physical buffers, so
that the whole adapter, from the packing of weights to the unwrapping of the result, runs where the kernel cannot.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, wraps
from types import MappingProxyType
from typing import Any

from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case
from harness.errors import PluginError, UnknownName
from harness.inputs import Inputs
from harness.returned import form
from harness.twins import libs

Function = Callable[..., Any]
_PLANTED: ContextVar[Mapping[str, Function]] = ContextVar("_PLANTED", default=MappingProxyType({}))
_RETURNED: ContextVar[dict[str, str] | None] = ContextVar("_RETURNED", default=None)


@cache
def twins() -> dict[str, Function]:
    """Every twin by the dotted name of what it stands for: the `ENTRIES` of the modules of harness/twins/libs."""
    found: dict[str, Function] = {}
    for info in pkgutil.iter_modules(libs.__path__):
        if info.name.startswith("_"):
            continue
        entries = importlib.import_module(f"{libs.__name__}.{info.name}").ENTRIES
        if again := found.keys() & entries.keys():
            raise PluginError(f"harness/twins/libs/{info.name}.py: {', '.join(sorted(again))} has a twin elsewhere already")
        found |= entries
    return found


def resolve(name: str, device: str) -> Function:
    """The function called `name` ("flashinfer.fused_moe.cutlass_fused_moe") for tensors on a device of this kind.

    UnknownName without a twin on the CPU; ImportError or AttributeError where the library lacks it on an accelerator, which
    `needs` says in advance. What a function of the library returns is told to `recording`.
    """
    if name in _PLANTED.get():
        return _PLANTED.get()[name]
    if device == "cpu":
        if name not in twins():
            raise UnknownName("twin", name, twins())
        return twins()[name]
    return observed(name, _imported(name))


def observed(name: str, function: Function) -> Function:
    """The same function, whose first return inside `recording` is told under this name; an enum as it is."""
    if isinstance(function, type) or not callable(function):
        return function

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        if (seen := _RETURNED.get()) is not None and name not in seen:
            seen[name] = form(result)
        return result

    return call


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Entry -> the form of what its first call inside returned (`harness.returned.form`), of functions resolved anywhere."""
    seen: dict[str, str] = {}
    token = _RETURNED.set(seen)
    try:
        yield seen
    finally:
        _RETURNED.reset(token)


def _imported(name: str) -> Function:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def needs(*names: str) -> Callable[[Device], Support]:
    """A probe: does the installed library have these functions? It imports the library, so it is asked in the child."""

    def probe(device: Device) -> Support:
        for name in names:
            try:
                _imported(name)
            except ImportError as error:
                return Support.no("library", f"{name.split('.')[0]} cannot be imported: {error}")
            except AttributeError:
                return Support.no("library", f"the installed {name.split('.')[0]} has no {name}")
        return YES

    return probe


@contextmanager
def planting(functions: Mapping[str, Function]) -> Iterator[None]:
    """Other functions in the place of entries and twins, for what is resolved inside."""
    token = _PLANTED.set({**_PLANTED.get(), **functions})
    try:
        yield
    finally:
        _PLANTED.reset(token)


def planted(backend: Backend, name: str, functions: Mapping[str, Function]) -> Backend:
    """A copy of `backend`, called `name`, whose `prepare` resolves `functions` instead of its own: a defect in a twin."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        with planting(functions):
            return backend.prepare(case, inputs)

    return replace(backend, name=name, prepare=prepare, script=None)
