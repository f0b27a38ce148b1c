"""What changed between two releases for those who call them, and whether it breaks our backends."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from harness.backends.base import Backend
from harness.returned import kind
from harness.versions.contracts import Contract, Entry, Parameter
from harness.versions.returns import UNSEEN, kinds

ALIKE = 0.6  # share of parameter names in common from which a removed and a new entry count as one renamed


class Effect(StrEnum):
    """Of a change on our backends."""

    BREAKS = "breaks us"
    CHECK = "check"
    HARMLESS = "harmless"


class Kind(StrEnum):
    """What changed."""

    REMOVED = "removed"
    RENAMED = "renamed"
    ADDED = "added"
    NEW_REQUIRED = "new required parameter"
    NEW_DEFAULT = "new parameter with default"
    GONE = "removed parameter"
    PARAMETER_RENAMED = "renamed parameter"
    MOVED = "moved position"
    PASSED = "changed way to pass"
    DEFAULT = "changed default"
    ANNOTATION = "changed annotation"
    RETURN = "changed return"
    RETURN_ANNOTATION = "changed return annotation"
    ARCHS = "changed arch gate"
    ARCHS_MORE = "more archs"
    VALUE = "changed enum value"
    MEMBER_GONE = "removed enum member"
    MEMBER = "new enum member"
    BODY = "changed body"
    CHECKS = "changed argument checks"
    PLACE = "moved module"


# what a change does to who is touched by it; without a user every change is harmless
_BREAKING = {Kind.REMOVED, Kind.RENAMED, Kind.NEW_REQUIRED, Kind.GONE, Kind.PARAMETER_RENAMED, Kind.RETURN}
_BREAKING |= {Kind.VALUE, Kind.MEMBER_GONE}
_HARMLESS = {Kind.ADDED, Kind.NEW_DEFAULT, Kind.MEMBER, Kind.PLACE, Kind.ARCHS_MORE}


@dataclass(frozen=True)
class Change:
    """One change of one entry, the backends it touches and what it does to them."""

    entry: str
    kind: Kind
    text: str
    backends: tuple[str, ...] = ()
    sure: bool = True  # False where the sources do not show it all: worth a look, never a break

    @property
    def effect(self) -> Effect:
        """On our backends; on nobody without one."""
        if not self.backends or self.kind in _HARMLESS:
            return Effect.HARMLESS
        return Effect.BREAKS if self.kind in _BREAKING and self.sure else Effect.CHECK


def diff(old: Contract, new: Contract, backends: Iterable[Backend] = ()) -> tuple[Change, ...]:
    """The changes from `old` to `new`, those that break us first."""
    others = sorted({*old.seen, *new.seen})
    users = touched(backends, (*old.entries.items(), *new.entries.items(), *((name, Entry("")) for name in others)))
    found: list[Change] = []
    for name in sorted({*old.entries, *new.entries, *others}):
        for what, text, sure in (*_of_entry(name, old, new), *_of_seen(old.returns.get(name, ()), new.returns.get(name, ()))):
            found.append(Change(name, what, text, users.get(name, ()), sure))
    return tuple(sorted(found, key=lambda c: (list(Effect).index(c.effect), c.entry, list(Kind).index(c.kind))))


def touched(backends: Iterable[Backend], entries: Iterable[tuple[str, Entry]]) -> dict[str, tuple[str, ...]]:
    """Entry -> the backends that call it, pass its enum, or run through its C++ source."""
    all_entries = tuple(entries)
    users: dict[str, set[str]] = {}
    for backend in backends:
        called = {name for name, _ in all_entries if _calls(backend, name)}
        signatures = " ".join(entry.signature for name, entry in all_entries if name in called)
        for name, entry in all_entries:
            enum = bool(entry.values) and _mentions(signatures, name.rpartition(".")[2])
            if name in called or enum or (entry.checks and called):
                users.setdefault(name, set()).add(backend.name)
    return {name: tuple(sorted(who)) for name, who in users.items()}


def _calls(backend: Backend, name: str) -> bool:
    """By its name, by another public path of it, or as a method of a class that it builds."""
    return any(e == name or name.startswith(f"{e}.") or _same(e, name) for e in backend.entries)


def _same(one: str, other: str) -> bool:
    return one.rpartition(".")[2] == other.rpartition(".")[2] and one.partition(".")[0] == other.partition(".")[0]


def _mentions(signatures: str, enum: str) -> bool:
    """By its own name, or by a parameter named after it: RoutingMethodType -> routing_method_type."""
    return re.search(rf"\b({enum}|{re.sub(r'(?<!^)(?=[A-Z])', '_', enum).lower()})\b", signatures) is not None


Told = tuple[Kind, str, bool]


def _of_entry(name: str, old: Contract, new: Contract) -> Iterator[Told]:
    was, now = old.entries.get(name), new.entries.get(name)
    if was is None and now is None:  # only what it returned is known
        return
    if now is None:
        assert was is not None
        heir = _heir(was, old, new)
        yield (Kind.RENAMED, f"now {heir}", True) if heir else (Kind.REMOVED, "gone", True)
    elif was is None:
        yield Kind.ADDED, now.signature, True
    else:
        yield from _of_signature(was, now)
        yield from _of_returns(was, now)
        yield from _of_archs(was.archs, now.archs)
        yield from _of_values(was.values, now.values)
        yield from _of_checks(was, now)
        if was.at != now.at:
            yield Kind.PLACE, f"{was.at} -> {now.at}", True


def _heir(was: Entry, old: Contract, new: Contract) -> str | None:
    """The new entry whose parameters resemble most those of one that is gone, or whose name is the same elsewhere."""
    names = {p.name for p in was.parameters}
    likely = []
    for name, entry in new.entries.items():
        others = {p.name for p in entry.parameters}
        if name not in old.entries and len(names) > 2 and others:
            likely.append((len(names & others) / len(names | others), name))
    share, best = max(likely, default=(0.0, ""))
    return best if share >= ALIKE else None


def _of_signature(was: Entry, now: Entry) -> Iterator[Told]:
    before, after = {p.name: p for p in was.parameters}, {p.name: p for p in now.parameters}
    renamed = dict(_renamed(was.parameters, now.parameters))
    for name in before:
        if name in renamed:
            yield Kind.PARAMETER_RENAMED, f"{name} -> {renamed[name]}", True
        elif name not in after:
            yield Kind.GONE, name, True
    for name, parameter in after.items():
        if name not in before and name not in renamed.values() and parameter.kind in ("positional", "keyword"):
            required = parameter.default is None
            yield (Kind.NEW_REQUIRED, name, True) if required else (Kind.NEW_DEFAULT, f"{name}={parameter.default}", True)
    yield from _of_order(was, now)
    for name in before.keys() & after.keys():
        yield from _of_parameter(before[name], after[name])


def _of_parameter(was: Parameter, now: Parameter) -> Iterator[Told]:
    if was.kind != now.kind:
        yield Kind.PASSED, f"{was.name}: {was.kind} -> {now.kind}", True
    if was.default != now.default:
        if now.default is None:
            yield Kind.NEW_REQUIRED, f"{was.name} lost its default {was.default}", True
        else:
            yield Kind.DEFAULT, f"{was.name}: {was.default or 'required'} -> {now.default}", True
    if was.annotation != now.annotation and was.annotation:
        yield Kind.ANNOTATION, f"{was.name}: {was.annotation} -> {now.annotation or 'none'}", True


def _of_order(was: Entry, now: Entry) -> Iterator[Told]:
    """Positional parameters that a caller by position now misses."""
    before, after = (positions(entry) for entry in (was, now))
    shifted = [name for name, place in before.items() if name in after and after[name] != place]
    if shifted:
        first = shifted[0]
        others = f" and {len(shifted) - 1} more" if len(shifted) > 1 else ""
        yield Kind.MOVED, f"{first} ({before[first]} -> {after[first]}){others}; wrong for a caller by position", True


def positions(entry: Entry) -> dict[str, int]:
    """Place of every positional parameter, from 0."""
    names = [p.name for p in entry.parameters if p.kind == "positional"]
    return {name: place for place, name in enumerate(names)}


def _renamed(was: tuple[Parameter, ...], now: tuple[Parameter, ...]) -> Iterator[tuple[str, str]]:
    """(old, new) names of parameters of one type and kind that replace each other in place."""
    before, after = [p.name for p in was], [p.name for p in now]
    for tag, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "replace" and j - i == m - k:
            for one, other in zip(was[i:j], now[k:m], strict=True):
                same = one.annotation == other.annotation and one.kind == other.kind
                if same and one.name not in after and other.name not in before:
                    yield one.name, other.name


def _of_returns(was: Entry, now: Entry) -> Iterator[Told]:
    if was.returns != now.returns and was.returns and now.returns:
        seen = not any(form.startswith(UNSEEN) for form in (*was.returns, *now.returns))
        before, after = (set(e.returns if seen else kinds(e.returns)) for e in (was, now))
        text = f"{' or '.join(was.returns)} -> {' or '.join(now.returns)}"
        if before != after:  # a further form comes with a further option: what we got, we get
            yield Kind.RETURN, text, bool(before - after) and UNSEEN not in before | after
    if was.annotation != now.annotation:
        yield Kind.RETURN_ANNOTATION, f"{was.annotation or 'none'} -> {now.annotation or 'none'}", True


def _of_seen(was: tuple[str, ...], now: tuple[str, ...]) -> Iterator[Told]:
    """What real runs returned, where both releases ran: another kind for sure, else forms that have nothing in common."""
    before, after = ({kind(form) for form in forms} for forms in (was, now))
    if before and after and not set(was) & set(now):
        yield Kind.RETURN, f"in real runs: {' or '.join(was)} -> {' or '.join(now)}", not before & after


def _of_archs(was: Mapping[str, tuple[int, ...]], now: Mapping[str, tuple[int, ...]]) -> Iterator[Told]:
    for backend in sorted(was.keys() | now.keys()):
        before, after = was.get(backend, ()), now.get(backend, ())
        lost, gained = sorted(set(before) - set(after)), sorted(set(after) - set(before))
        label = f"{backend}: " if backend else ""
        if lost or (gained and not before and not backend):  # a first gate refuses what was not asked for before
            yield Kind.ARCHS, f"{label}{_list(before)} -> {_list(after)}", True
        elif gained:
            yield Kind.ARCHS_MORE, f"{label}{_list(gained)}", True


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "any"


def _of_values(was: Mapping[str, object], now: Mapping[str, object]) -> Iterator[Told]:
    for member, value in was.items():
        if member not in now:
            yield Kind.MEMBER_GONE, f"{member} = {value}", True
        elif now[member] != value:
            yield Kind.VALUE, f"{member}: {value} -> {now[member]}", not member.startswith("Invalid")  # a mark nobody passes
    for member in now.keys() - was.keys():
        yield Kind.MEMBER, f"{member} = {now[member]}", True


def _of_checks(was: Entry, now: Entry) -> Iterator[Told]:
    added = [c for c in now.checks if c not in was.checks]
    gone = [c for c in was.checks if c not in now.checks]
    if added or gone:
        yield Kind.CHECKS, "; ".join([*(f"+ {c}" for c in added), *(f"- {c}" for c in gone)]), True
    elif was.body != now.body and was.body and now.body:
        yield Kind.BODY, f"{was.body} -> {now.body}", True
