"""`moecheck report`: a run as one HTML file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import config, journal
from harness.errors import MoecheckError, RunFolderError
from harness.report import page, page_parts


def command(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="Run folder.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    previous: Annotated[
        Path | None, typer.Option(help="Earlier run, a folder or a journal: what changed since.", metavar="RUN")
    ] = None,
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
    try:
        page.write(out, report)
    except OSError as error:
        raise MoecheckError(f"--out {out}: cannot be written: {error.strerror}; choose another file") from error
    told = page.summary(report)
    text = f"{told['verdicts']} verdicts, {told['failed']} failed, {told['missing']} not run; {out}"
    Console(soft_wrap=True, highlight=False).print(text, markup=False)
