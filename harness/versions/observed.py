"""What entry points returned when they really ran: stored with the contract of their release, and compared with it.

`Verdict.returned` has it by entry; a contract keeps the forms without sizes (`seen`). A twin has none of its own: what it
promises is the annotation of its return.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from harness.entry import twins
from harness.errors import MoecheckError
from harness.returned import general, kind
from harness.verdict import Finding, Status, Verdict
from harness.versions import store
from harness.versions.contracts import Contract
from harness.versions.returns import UNSEEN, kinds

DECISIVE = {"list", "tuple", "value"}  # an adapter takes one of them apart, and breaks on another


def checked(verdict: Verdict, root: Path = store.ROOT) -> Verdict:
    """The verdict with a note for every return that neither its release nor its twin knows; CONTRACT where a list, a tuple or
    a tensor came instead of another of them."""
    notes, broken = list[Finding](), list[Finding]()
    for entry, form in verdict.returned.items():
        for whose, forms in _known(entry, verdict.environment, root):
            if forms and general(form) not in forms and kind(form) not in forms:
                text = f"{entry} returned {form}; {whose}: {' or '.join(sorted(forms))}"
                finding = Finding("returned", text, {"entry": entry, "returned": form, "known": sorted(forms)})
                other = {kind(f) for f in forms}
                (broken if kind(form) not in other and {kind(form), *other} <= DECISIVE else notes).append(finding)
    verdict = replace(verdict, notes=(*verdict.notes, *notes))
    if not broken:
        return verdict
    reason = "; ".join([*(f.text for f in broken), *([verdict.reason] if verdict.reason else [])])
    return replace(verdict, status=Status.CONTRACT, reason=reason, findings=(*broken, *verdict.findings))


def _known(entry: str, environment: Mapping[str, str], root: Path) -> Iterable[tuple[str, frozenset[str]]]:
    """(whose word, the forms it knows; a bare kind stands for all its forms)."""
    for package in store.packages(root):
        if (version := environment.get(package)) and (stored := _stored(package, version, root)) is not None:
            elsewhere = stored.find(entry)  # by another public path
            seen = stored.returns.get(entry, elsewhere.seen if elsewhere else ())
            yield f"what {package} {version} returned before", frozenset(seen)
    yield "its twin returns", _of_twin(entry)


@cache
def _stored(package: str, version: str, root: Path) -> Contract | None:
    try:
        return store.load(package, version, root)
    except MoecheckError:  # a release that nobody extracted says nothing
        return None


def _of_twin(entry: str) -> frozenset[str]:
    twin = twins().get(entry)
    if twin is None or isinstance(twin, type):
        return frozenset()
    annotation = inspect.signature(twin).return_annotation
    if annotation is inspect.Signature.empty:
        return frozenset()
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    ast.parse(text, mode="eval")  # ours, so it parses
    return frozenset(kinds((UNSEEN + text,)))


def record(verdicts: Iterable[Verdict], root: Path = store.ROOT) -> list[str]:
    """Add what these verdicts saw to the contracts of their releases; a line for each form that is new. What has no stored
    contract is left out."""
    seen: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for verdict in verdicts:
        for entry, form in verdict.returned.items():
            package = _package(entry, root)
            if package and (version := verdict.environment.get(package)):
                seen[package, version][entry].add(general(form))
    told: list[str] = []
    for (package, version), entries in sorted(seen.items()):
        if (stored := _stored(package, version, root)) is None:
            continue
        new = {name: sorted(forms - set(stored.returns.get(name, ()))) for name, forms in entries.items()}
        told += [f"{package} {version}: {name} returned {form}" for name, forms in sorted(new.items()) for form in forms]
        if any(new.values()):
            store.save(stored.with_returns({name: forms for name, forms in new.items() if forms}), root)
    _stored.cache_clear()
    return told


def _package(entry: str, root: Path) -> str | None:
    """The package with stored contracts whose module the name begins with."""
    top = entry.partition(".")[0]
    return next((package for package in store.packages(root) if top in store.modules(package, root)), None)


def kept(contract: Contract, root: Path = store.ROOT) -> Contract:
    """A contract that was read anew, with what real runs got of the stored one of its release."""
    stored = _stored(contract.package, contract.version, root)
    return contract if stored is None else contract.with_returns(stored.returns)
