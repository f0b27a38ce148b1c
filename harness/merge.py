"""Joins the run folders of one plan into one: every verdict kept or reported, everything missing named."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

from rich.console import Console

from harness import journal, plan, run_info, sanitized
from harness.backends import discover
from harness.errors import PluginError, RunFolderError
from harness.known import Outcome, outcome
from harness.plan import Plan
from harness.reading import printable, regular
from harness.report.heatmap import FOLDER as PICTURES
from harness.run import exit_code, publish
from harness.run_info import RunInfo
from harness.select import Item
from harness.session import shard_of
from harness.shard import Shard, assign, costs
from harness.verdict import Finding, Verdict

# Which of two verdicts on one item stays: the one that may cost somebody a night. A skip says nothing.
WEIGHT = (Outcome.SKIPPED, Outcome.GREEN, Outcome.KNOWN, Outcome.GONE, Outcome.RED)
MAX_PICTURE = 1 << 24  # bytes: heat maps have at most 1,024 x 2,048 pixels
SHOWN = 20


@dataclass(frozen=True)
class Part:
    """One run folder. tools: sanitizer -> its verdicts."""

    folder: Path
    plan: Plan
    shard: Shard | None
    info: RunInfo | None
    verdicts: list[Verdict]
    tools: Mapping[str, list[Verdict]]


@dataclass(frozen=True)
class Gap:
    """Items without a verdict: `missing` of the `planned` ones of a shard, or of a whole run (None); advice: what to do."""

    shard: Shard | None
    missing: int
    planned: int
    advice: str

    def __str__(self) -> str:
        whose = "of the plan" if self.shard is None else f"of shard {self.shard}"
        return f"{self.missing} of {self.planned} {whose}: {self.advice}"


@dataclass(frozen=True)
class Joined:
    """What the parts make together. verdicts, in the plan's order; pictures: path in the run folder -> where it is;
    remarks: what the person who merges should know."""

    plan: Plan
    parts: list[Part]
    verdicts: list[Verdict]
    tools: Mapping[str, list[Verdict]]
    gaps: list[Gap]
    pictures: Mapping[str, Path]
    remarks: list[str]


def unlike(one: Plan, other: Plan) -> str:
    """In what another plan differs, in words; "" where it is the same."""
    if one.digest != other.digest:
        return f"another plan, of digest {other.digest}, not {one.digest}"
    names = [field.name for field in fields(Plan) if getattr(one, field.name) != getattr(other, field.name)]
    return f"the same items as digest {one.digest}, planned with other {', '.join(names)}" if names else ""


def join(folders: Sequence[Path]) -> Joined:
    """Read the parts; RunFolderError if they are not of one plan, or one of them is given twice or holds somebody else's
    verdicts."""
    parts = [_part(folder) for folder in folders]
    first = parts[0]
    for number, part in enumerate(parts):
        if any(part.folder.samefile(other.folder) for other in parts[:number]):
            raise RunFolderError(f"{part.folder} is given twice; give every shard's folder once")
        if difference := unlike(first.plan, part.plan):
            raise RunFolderError(f"{part.folder} is of {difference}, as in {first.folder}; merge the shards of one plan")
    parts.sort(key=lambda part: "" if part.info is None else part.info.started)  # the later verdict comes last
    found, remarks = _kept(parts, {part.folder: part.verdicts for part in parts})
    tools = {}
    for tool in sorted({name for part in parts for name in part.tools}):
        by_tool, more = _kept(parts, {part.folder: part.tools.get(tool, []) for part in parts})
        tools[tool], remarks = [verdict for _, verdict in by_tool.values()], [*remarks, *(f"{tool}: {text}" for text in more)]
    order = [item for item in first.plan.items if item in found]
    pictures = {v.picture: f.folder / v.picture for f, v in found.values() if v.picture and _ours(f.folder, v.picture)}
    gaps = [*_gaps(first.plan, parts, set(found)), *_unsanitized(parts)]
    verdicts = [found[item][1] for item in order]
    return Joined(first.plan, parts, verdicts, tools, gaps, pictures, [*remarks, *_strange(parts)])


def _part(folder: Path) -> Part:
    the_plan, places = plan.load(folder), sorted((folder / sanitized.FOLDER).glob(f"*/{journal.NAME}"))
    tools = {path.parent.name: journal.read(path.parent) for path in places}
    part = Part(folder, the_plan, shard_of(folder), run_info.read(folder), journal.read(folder), tools)
    planned = set(the_plan.items)
    for verdicts in (part.verdicts, *tools.values()):
        if strangers := [v for v in verdicts if Item(v.case_id, v.subject) not in planned]:
            example = f"{strangers[0].subject} on {strangers[0].case_id}"
            raise RunFolderError(
                f"{folder}: its journal holds {len(strangers)} verdicts that are not in its plan, e.g. {example}"
            )
    return part


def _kept(parts: list[Part], given: Mapping[Path, list[Verdict]]) -> tuple[dict[Item, tuple[Part, Verdict]], list[str]]:
    """One verdict an item, and what there is to say of those that came twice: of equal statuses the later stays, of different
    ones the graver, with a note that tells of the others."""
    found: dict[Item, list[tuple[Part, Verdict]]] = defaultdict(list)
    for part in parts:
        for verdict in given[part.folder]:
            found[Item(verdict.case_id, verdict.subject)].append((part, verdict))
    kept, remarks = {}, []
    twice = [item for item, several in found.items() if len(several) > 1]
    torn = [item for item in twice if len({v.status for _, v in found[item]}) > 1]
    for item, several in found.items():
        part, verdict = max(enumerate(several), key=lambda pair: (WEIGHT.index(outcome(pair[1][1])), pair[0]))[1]
        if item in torn:
            told = ", ".join(f"{v.status} in {p.folder.name}" for p, v in several)
            note = Finding(
                "judged-twice", f"judged {len(several)} times: {told}", {"statuses": [str(v.status) for _, v in several]}
            )
            verdict = replace(verdict, notes=(*verdict.notes, note))
            remarks.append(f"{item.subject} on {item.case_id} was {note.text}; {verdict.status} stays")
        kept[item] = part, verdict
    hidden = [f"and {len(remarks) - SHOWN} more that came out differently"] if len(remarks) > SHOWN else []
    same = [f"{len(twice) - len(torn)} items were judged twice, with the same status"] if len(twice) > len(torn) else []
    return kept, [*remarks[:SHOWN], *hidden, *same]


def _ours(folder: Path, picture: str) -> bool:
    """Is this a picture of that run, and not a path to somewhere else? The journal may be a stranger's."""
    path = PurePosixPath(picture)
    inside = len(path.parts) == 2 and path.parts[0] == PICTURES and path.name == printable(path.name)
    return inside and path.name != ".." and not (folder / PICTURES).is_symlink()


def _gaps(the_plan: Plan, parts: list[Part], found: set[Item]) -> list[Gap]:
    missing = len(the_plan.items) - len(found)
    if not missing:
        return []
    counts = {part.shard.count for part in parts if part.shard is not None}
    if len(counts) != 1:
        whole = " or ".join(f"moecheck run --resume {part.folder}" for part in parts if part.shard is None)
        return [
            Gap(None, missing, len(the_plan.items), whole or f"the shards given are of {sorted(counts)} parts, run all of one")
        ]
    (count,) = counts
    folders = {part.shard.index: part.folder for part in parts if part.shard is not None}
    gaps = []
    for index, mine in enumerate(assign(the_plan.items, the_plan.seconds or costs(the_plan.items, {}), count), start=1):
        left = sum(item not in found for item in mine)
        where = f"--resume {folders[index]}" if index in folders else f"--plan PLAN --shard {index}/{count} --out DIR"
        advice = f"moecheck run {where}" if index in folders else f"no folder of it was given: moecheck run {where}"
        gaps += [Gap(Shard(index, count), left, len(mine), advice)] if left else []
    return gaps


def _unsanitized(parts: list[Part]) -> list[Gap]:
    """A shard that is whole, but not under each of its tier's sanitizers."""
    gaps = []
    for part in parts:
        mine = part.plan.share(part.shard).items
        if len(part.verdicts) == len(mine):
            owed = sanitized.owed(part.plan, part.shard, part.verdicts)
            have = {tool: {Item(v.case_id, v.subject) for v in verdicts} for tool, verdicts in part.tools.items()}
            left = {tool: sum(item not in have.get(tool, ()) for item in items) for tool, items in owed.items()}
            total, advice = sum(map(len, owed.values())), f"under a sanitizer: moecheck run --resume {part.folder}"
            gaps += [Gap(part.shard, sum(left.values()), total, advice)] if any(left.values()) else []
    return gaps


def _strange(parts: list[Part]) -> list[str]:
    """What does not make the result wrong, and should not go unsaid."""
    codes = {f"{part.info.version} {part.info.revision}".strip() for part in parts if part.info is not None}
    told = [f"the parts were run by different code: {', '.join(sorted(codes))}"] if len(codes) > 1 else []
    try:
        discover(parts[0].plan.request.plugins)
    except PluginError as error:
        told.append(f"combinations executed are counted without the plugin: {error}")
    return told


def write(joined: Joined, folder: Path, out: Console) -> int:
    """Write the joined run into a new folder and print its report; 0 or 1, where no case is missing."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        try:
            _fill(joined, temporary)
            temporary.replace(folder)  # plan and verdicts are there together, or neither
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        publish(joined.plan, joined.verdicts, folder, out)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: cannot be written: {error.strerror}; choose another folder") from error
    return exit_code([*joined.verdicts, *(v for verdicts in joined.tools.values() for v in verdicts)])


def _fill(joined: Joined, folder: Path) -> None:
    joined.plan.save(folder)
    run_info.write(folder, _info(joined))
    _write_lines(folder / journal.NAME, joined.verdicts)
    for tool, verdicts in joined.tools.items():
        (folder / sanitized.FOLDER / tool).mkdir(parents=True)
        _write_lines(folder / sanitized.FOLDER / tool / journal.NAME, verdicts)
    for name, source in joined.pictures.items():
        try:
            data = regular(source, MAX_PICTURE, follow=False)
        except (OSError, ValueError) as error:
            joined.remarks.append(f"{source}: the picture is left out: {error}")
            continue
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def _info(joined: Joined) -> RunInfo:
    infos = [part.info for part in joined.parts if part.info is not None]
    asked, codes = joined.plan.request, {(info.version, info.revision) for info in infos}
    started = min((info.started for info in infos), default=run_info.now())
    whole = RunInfo(started, asked.platform, asked.tier, joined.plan.digest, seconds=sum(info.seconds for info in infos))
    if len(codes) == 1:
        whole = replace(whole, version=infos[0].version, revision=infos[0].revision)
    return replace(whole, finished="" if joined.gaps else max((info.finished for info in infos), default=run_info.now()))


def _write_lines(path: Path, verdicts: Iterable[Verdict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for verdict in verdicts:
            file.write(json.dumps(verdict.to_json(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
