"""What a bisect found, as text to paste into an issue of the library."""

from __future__ import annotations

import platform
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness import __version__
from harness.versions import store
from harness.versions.bisect import Result
from harness.versions.diff import diff
from harness.versions.search import Stopped

MOST_LINES = 40  # of a list in the report
ABOUT_MOE = re.compile(r"moe|expert|fp4|fp8|grouped|quant", re.IGNORECASE)


def report(result: Result, rerun: str, files: Sequence[str] = (), dates: Mapping[str, str] | None = None) -> str:
    """Markdown: the answer, what the neighbours say, their contract diff, every run, and how to run it again. dates: when they
    came, and what else is told of them."""
    question = result.question
    if isinstance(result.answer, Stopped):
        head = [f"{question.package}: no answer: {result.answer.reason}"]
    else:
        head = list(_answer(result))
        head += [f"* {version}: {text}" for version, text in (dates or {}).items() if text != "-"]
    tested = sum(len({r.version for r in result.runs if r.version == v}) for v in result.releases)
    head.append(f"* {len(result.runs)} runs of {tested} of the {len(result.releases)} releases in between, ends included")
    head.append(f"* {platform.platform()}, Python {platform.python_version()}, moecheck {__version__}")
    head.append(f"* again: `{rerun}`")
    parts = ["\n".join(head)]
    if result.first and result.before and (changes := _contract_changes(result)):
        parts.append(_folded(f"contracts {result.before} -> {result.first}", changes))
    if files:
        parts.append(_folded(f"files {result.before} -> {result.first}", files))
    parts.append(_folded("every run", [f"{r.version}: {r.answer}, {r.text}" for r in result.runs]))
    return "\n\n".join(parts)


def changed_files(old: Path, new: Path) -> list[str]:
    """How many files of each folder differ between two wheels, and the names of those about MoE and quantisation."""
    before, after = (_members(path) for path in (old, new))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    sources = [name for name in changed if "/csrc/" in name or "/include/" in name]
    python = [name for name in changed if name.endswith(".py")]
    count = f"{len(changed)} files differ: {len(sources)} of csrc and include, {len(python)} Python"
    marks = {True: {True: "changed", False: "removed"}, False: {True: "added", False: ""}}
    named = [name for name in (*sources, *python) if ABOUT_MOE.search(name)]
    return [count, *(f"{marks[name in before][name in after]} {name}" for name in named)]


def _members(wheel: Path) -> dict[str, tuple[int, int]]:
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: (i.CRC, i.file_size) for i in archive.infolist() if ".dist-info/" not in i.filename}


def _answer(result: Result) -> Iterator[str]:
    question, answer = result.question, result.answer
    assert not isinstance(answer, Stopped)
    what = "fixed in" if question.fix else "introduced in"
    suspects = [result.releases[s] for s in answer.suspects]
    exactly = len(suspects) == 1
    where = suspects[0] if exactly else f"one of {', '.join(suspects)} (those between could not be tested)"
    yield f"**{question.package}: {question.wanted}: {what} {where}**"
    yield f"* last release without the change: {result.before}; confidence {answer.confidence:.1%}"
    said = {r.version: r.text for r in result.runs}
    for version in (result.before, result.first):
        if version in said:
            yield f"* {version}: {said[version]}"
    before, after = result.rates
    if not question.fix and (before or after < 1):
        yield f"* fails in {after:.0%} of the runs since, in {before:.0%} of those before"


def _contract_changes(result: Result) -> list[str]:
    package = result.question.package
    if package not in store.packages() or not {result.before, result.first} <= set(store.releases(package)):
        return []
    old, new = (store.load(package, str(v)) for v in (result.before, result.first))
    return [f"{c.entry}: {c.kind}: {c.text}" for c in diff(old, new)]


def _folded(title: str, lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    body = "\n".join([*lines[:MOST_LINES], *more])
    return f"<details><summary>{title}</summary>\n\n```\n{body}\n```\n</details>"
