"""One property of one entry's contract, as `ENTRY:property` names it: `flashinfer.fp4_quantize:returns`."""

from __future__ import annotations

from collections.abc import Callable

from harness.errors import MoecheckError, UnknownName
from harness.versions.contracts import Contract, Entry, Parameter
from harness.versions.diff import positions
from harness.versions.returns import UNSEEN, kinds

Reader = Callable[[Entry, str], str | None]


def _parameter(entry: Entry, name: str) -> Parameter | None:
    return next((p for p in entry.parameters if p.name == name), None)


def _default(entry: Entry, name: str) -> str | None:
    found = _parameter(entry, name)
    return None if found is None else found.default or "required"


def _annotation(entry: Entry, name: str) -> str | None:
    found = _parameter(entry, name)
    return None if found is None else found.annotation


def _position(entry: Entry, name: str) -> str | None:
    found = _parameter(entry, name)
    return None if found is None else str(positions(entry).get(name, found.kind))


def _returns(entry: Entry, _: str) -> str | None:
    found = kinds(entry.returns)
    return None if UNSEEN in found else " or ".join(found)


def _archs(entry: Entry, backend: str) -> str:
    if backend:
        return ", ".join(map(str, entry.archs.get(backend, ()))) or "none"
    return "; ".join(f"{b or 'all'} {', '.join(map(str, c))}" for b, c in entry.archs.items()) or "none"


READERS: dict[str, Reader] = {
    "signature": lambda entry, _: entry.signature,
    "returns": _returns,
    "forms": lambda entry, _: " or ".join(entry.returns),
    "annotation": lambda entry, name: _annotation(entry, name) if name else entry.annotation,
    "parameter": lambda entry, name: "there" if _parameter(entry, name) else "not there",
    "position": _position,
    "default": _default,
    "archs": _archs,
    "value": lambda entry, member: str(entry.values[member]) if member in entry.values else None,
    "member": lambda entry, member: "there" if member in entry.values else "not there",
    "check": lambda entry, text: "there" if any(text in sentence for sentence in entry.checks) else "not there",
    "body": lambda entry, _: entry.body or None,
    "at": lambda entry, _: entry.at,
}


def split(question: str) -> tuple[str, str]:
    """(entry, property) of `ENTRY[:property]`; without one the signature is meant. MoecheckError for an unknown property."""
    entry, _, wanted = question.partition(":")
    wanted = wanted or "signature"
    name = wanted.partition(".")[0]
    if name not in (*READERS, "exists"):
        raise UnknownName("property", name, (*READERS, "exists"))
    if name in ("parameter", "position", "default", "value", "member", "check") and "." not in wanted:
        raise MoecheckError(f"the property {name!r} is of something: write {name}.NAME")
    return entry, wanted


def read_property(contract: Contract, entry: str, wanted: str) -> str | None:
    """What the contract says, as text; None where it cannot tell: no such entry, or no such parameter or member."""
    name, _, of = wanted.partition(".")
    found = contract.entries.get(entry)
    if name == "exists":
        return "not there" if found is None else "there"
    return None if found is None else READERS[name](found, of)
