"""report.html: a run as one file that needs nothing else and asks no network for anything.

The verdicts travel as JSON in <script type="application/json"> and are shown by textContent alone; the rest is escaped by
jinja2. A content security policy lets this page run this page's own script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harness import __version__, journal, plan, run_info
from harness.executed import Ways
from harness.history.ledger import Cell
from harness.known import Outcome, outcome
from harness.pooled import alarms
from harness.reading import regular
from harness.regress import Changes, compare
from harness.report import page_data, page_parts
from harness.report.page_parts import Kills, Timings
from harness.run_info import RunInfo
from harness.select import Item
from harness.verdict import Verdict

MAX_DETAILS, MAX_DETAIL_BYTES = 2000, 24 << 20  # failures with a page of their own; nobody reads the next one
MAX_PICTURE, MAX_PICTURES = 1 << 20, 12 << 20  # bytes of one heat map, of all
SHOWN_MISSING, SHOWN_CHANGES, SHOWN_CELLS = 20, 200, 2000  # lines of a list
_PICTURE = re.compile(r"pictures/[\w.-]+\.png", re.ASCII)
_PNG = b"\x89PNG\r\n\x1a\n"
_HIDDEN = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # no tag or entity survives in JSON's strings


@dataclass(frozen=True)
class Report:
    """What a page shows. missing: planned items without a verdict; links: known issue -> where it is told; changes: since the
    run that `previous` names."""

    folder: Path | None = None
    verdicts: Sequence[Verdict] = ()
    missing: Sequence[Item] = ()
    info: RunInfo | None = None
    time: datetime = field(default_factory=lambda: datetime.now(UTC))
    reached: Mapping[str, Sequence[Ways]] = field(default_factory=dict)
    timings: Timings | None = None
    kills: Kills | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    changes: Changes | None = None
    previous: str = ""
    ledger: Sequence[Cell] = ()


def load(folder: Path, links: Mapping[str, str]) -> Report:
    """The run in `folder`; a journal is enough. RunFolderError for what cannot be read."""
    with _no_garbage():
        verdicts = journal.read(folder)
    done = {Item(v.case_id, v.subject) for v in verdicts}
    missing = [i for i in plan.load(folder).items if i not in done] if (folder / plan.NAME).exists() else []
    path = folder / journal.NAME
    time = datetime.fromtimestamp((path if path.exists() else folder).stat().st_mtime, UTC)
    return Report(
        folder,
        page_data.ordered(verdicts),
        missing,
        run_info.read(folder),
        time,
        page_parts.coverage(folder),
        page_parts.timings(folder),
        links=links,
    )


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Of a hundred thousand verdicts nothing is garbage; looking for it takes a quarter of the time that reading them does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def since(report: Report, previous: Path) -> Report:
    """The same with what changed since the run in another folder."""
    changes = compare(journal.read_from(previous), report.verdicts)
    info = run_info.read(previous) if previous.is_dir() else None
    name = page_data.one_line(previous.resolve().name)
    told = f"{name}, {datetime.fromisoformat(info.started):%Y-%m-%d %H:%M} UTC" if info is not None else name
    return replace(report, changes=changes, previous=told)


def write(path: Path, report: Report) -> None:
    """Write the page, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for part in render(report):
                file.write(part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(report: Report) -> Iterator[str]:
    """The page in pieces."""
    loader = PackageLoader("harness.report")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, script = ((loader.get_source(page, name)[0]) for name in ("page.css", "page.js"))
    page.globals.update(parts=page_parts, clean=page_data.clean, one_line=page_data.one_line, len=len)
    counts = Counter(outcome(v) for v in report.verdicts)
    arch = next((v.environment["arch"] for v in report.verdicts if "arch" in v.environment), "")
    return page.get_template("page.html").generate(
        report=report,
        title=_title(report),
        headline=page_parts.headline(report.info, arch),
        when=page_parts.when(report.info, report.time),
        version=__version__,
        counts=_counts(counts, len(report.missing)),
        bar=[(name, n) for name, _, n in _counts(counts, len(report.missing))],
        folder=page_data.clean(report.folder or "", 300),
        shown_changes=SHOWN_CHANGES,
        shown_cells=SHOWN_CELLS,
        red=counts[Outcome.RED] + counts[Outcome.GONE],
        grid=page_data.grid(report.verdicts),
        pools=alarms(report.verdicts),
        facts=page_parts.facts(report.verdicts),
        data=embedded(page_data.columns(report.verdicts)) if report.verdicts else None,
        details=_details(report),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        shown_missing=SHOWN_MISSING,
    )


def embedded(data: object) -> Markup:
    """JSON that may stand in a <script>: ASCII, without <, > and &."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_HIDDEN))


def _policy(style: str, script: str) -> str:
    hashed = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    rules = (
        "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
    )
    return rules.format(*hashed)


def _title(report: Report) -> str:
    name = report.folder.resolve().name if report.folder is not None else "planted faults"
    about = f"{report.info.platform} {report.info.tier} " if report.info is not None else ""
    return page_data.clean(f"moecheck {about}{name}", 200)


def _counts(counts: Counter[Outcome], missing: int) -> list[tuple[str, str, int]]:
    """(css name, words, count), the gone and the missing only where there are any."""
    words = (
        ("red", "failed", counts[Outcome.RED]),
        ("gone", "known, but pass now", counts[Outcome.GONE]),
        ("missing", "not run", missing),
        ("known", "known issues", counts[Outcome.KNOWN]),
        ("green", "passed", counts[Outcome.GREEN]),
        ("skipped", "skipped", counts[Outcome.SKIPPED]),
    )
    return [w for w in words if w[2] or w[0] not in ("gone", "missing")]


def _details(report: Report) -> Iterator[tuple[int, Markup]]:
    """(row, JSON) of what is worth a page: failures, known issues, passes with notes; until a limit is met."""
    left, pictures, shown = MAX_DETAIL_BYTES, MAX_PICTURES, 0
    for row, verdict in enumerate(report.verdicts):
        if not verdict.status.failed and not verdict.notes and not verdict.known:
            continue
        data = page_data.detail(verdict, report.links.get(verdict.known, ""))
        data["picture"] = image = _picture(report.folder, verdict.picture, pictures)
        pictures -= len(image)
        text = embedded(data)
        left, shown = left - len(text) + len(image), shown + 1
        if left < 0 or shown > MAX_DETAILS:
            return
        yield row, text


def _picture(folder: Path | None, name: str, left: int) -> str:
    """The heat map as a data URI; "" for none, for what is no PNG of ours, and where no room is left."""
    if folder is None or not _PICTURE.fullmatch(name):
        return ""
    try:
        image = regular(folder / name, min(MAX_PICTURE, left), follow=False)
    except (OSError, ValueError):  # removed, or replaced by something else: the page goes without
        return ""
    return "data:image/png;base64," + base64.b64encode(image).decode() if image.startswith(_PNG) else ""


def summary(report: Report) -> Mapping[str, int]:
    """What the command says after writing."""
    counts = Counter(outcome(v) for v in report.verdicts)
    return {
        "verdicts": len(report.verdicts),
        "failed": counts[Outcome.RED] + counts[Outcome.GONE],
        "missing": len(report.missing),
    }
