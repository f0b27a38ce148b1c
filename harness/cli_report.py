"""`moecheck report`: a run as one HTML file."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import config, journal
from harness.backends import discover
from harness.cli_history import cache
from harness.cli_options import Plugins
from harness.errors import MoecheckError, RunFolderError
from harness.history.ledger import Cell, ledger, promises
from harness.history.query import History
from harness.report import page, page_parts


def command(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="Run folder.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    previous: Annotated[
        Path | None, typer.Option(help="Earlier run, a folder or a journal: what changed since.", metavar="RUN")
    ] = None,
    history: Annotated[
        str | None, typer.Option(help="Folder or URL of past runs: the coverage ledger.", metavar="DIR", show_default=False)
    ] = None,
    plugin: Plugins = None,
    faults: Annotated[Path | None, typer.Option(help="Kill matrix to show: a file of `moecheck faults --json`.")] = None,
) -> None:
    """Write a run as one HTML file that needs no network: verdicts, a page per failure, coverage."""
    killed = page_parts.kills(faults) if faults is not None else None
    if folder is None and killed is None:
        raise MoecheckError("nothing to report: give a run folder (runs/<time>), or --faults FILE, or both")
    if folder is not None and not (folder / journal.NAME).is_file():
        raise RunFolderError(f"{folder}: no {journal.NAME} in it; give a folder made by moecheck run")
    if folder is None and previous is not None:
        raise MoecheckError("--previous is compared with a run: give its folder too")
    links = {issue.id: issue.link for issue in config.known_issues()}
    report = replace(page.load(folder, links) if folder is not None else page.Report(), kills=killed)
    if previous is not None:
        report = page.since(report, previous)
    if history is not None:
        report = replace(report, ledger=_ledger(history, tuple(plugin or ())))
    try:
        page.write(out, report)
    except OSError as error:
        raise MoecheckError(f"--out {out}: cannot be written: {error.strerror}; choose another file") from error
    told = page.summary(report)
    text = f"{told['verdicts']} verdicts, {told['failed']} failed, {told['missing']} not run; {out}"
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def _ledger(history: str, plugins: tuple[str, ...]) -> list[Cell]:
    """The cells of the architectures that the history has runs of."""
    with cache() as kept, History(history, kept) as runs:
        facts = runs.facts()
    seen = {fact.arch for fact in facts}
    platforms = [p for p in map(config.platform, config.names("platforms")) if p.arch in seen]
    return ledger(facts, promises(platforms, discover(plugins)), datetime.now(UTC))
