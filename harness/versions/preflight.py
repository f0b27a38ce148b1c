"""Would another release still take the calls of our adapters? Each call of a small case is bound to the other signature.

No kernel of the other release runs and nothing of it is imported: the adapter runs over its twin, which stands in for the
library, and every call it makes is compared with the stored contract: names, order, what is required.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.backends.base import Backend
from harness.case import Case
from harness.entry import planting, twins
from harness.errors import MoecheckError
from harness.inputs import make_inputs
from harness.versions.contracts import Contract, Entry, Parameter

KINDS = {
    "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "*": inspect.Parameter.VAR_POSITIONAL,
    "**": inspect.Parameter.VAR_KEYWORD,
}


@dataclass(frozen=True)
class Refusal:
    """A call that the other release would not take, or an adapter that fails by itself."""

    backend: str
    case: str
    entry: str
    text: str


def preflight(contract: Contract, subjects: Iterable[tuple[Backend, Case]]) -> Iterator[Refusal]:
    """The refusals of each backend on its case, one at most per backend, case and entry; backends without entries have none."""
    for backend, case in subjects:
        found: dict[str, str] = {}
        functions = {name: _recorded(name, contract, found) for name in backend.entries if name in twins()}
        try:
            with planting(functions):
                backend.prepare(case, make_inputs(case)).call()
        except MoecheckError as error:
            found.setdefault("", f"the adapter does not run: {error}")
        yield from (Refusal(backend.name, case.id, name, text) for name, text in found.items())


def signature(entry: Entry) -> inspect.Signature:
    """As inspect has it; the default of every optional parameter is None."""
    return inspect.Signature([_parameter(p) for p in entry.parameters])


def _parameter(parameter: Parameter) -> inspect.Parameter:
    default = inspect.Parameter.empty if parameter.default is None or "*" in parameter.kind else None
    return inspect.Parameter(parameter.name, KINDS[parameter.kind], default=default)


def _recorded(name: str, contract: Contract, found: dict[str, str]) -> Callable[..., Any]:
    """The twin of `name`, whose calls are bound to the contract's signature; what does not bind is written to `found`."""
    twin, entry = twins()[name], contract.find(name)
    if inspect.isclass(twin):
        return twin
    if entry is None:
        found[name] = f"{contract.package} {contract.version} has no {name}"

    @functools.wraps(twin)
    def call(*arguments: Any, **named: Any) -> Any:
        if entry is not None:
            try:
                theirs = signature(entry).bind(*arguments, **named).arguments
            except TypeError as error:
                found.setdefault(name, str(error))
            else:
                ours = zip(inspect.signature(twin).parameters, arguments, strict=False)  # what is passed by position
                if moved := [n for n, value in ours if theirs.get(n) is not value]:
                    found.setdefault(name, f"by position {', '.join(moved)} would get another argument")
        return twin(*arguments, **named)

    return call
