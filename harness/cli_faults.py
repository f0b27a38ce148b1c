"""`moecheck faults`: how many planted historical bugs would this harness have caught?"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness.cli_options import Platform, Plugins
from harness.errors import UnknownName
from harness.faults import matrix
from harness.faults.campaign import Campaign
from harness.faults.fault import Fault
from harness.faults.score import Until
from harness.session import detected_platform, device_of

SURVIVED = 1  # exit code: a fault survived or a clean subject raised an alarm


def faults(  # noqa: PLR0913 - typer turns parameters into options
    platform: Platform = None,
    tier: Annotated[str, typer.Option(help="Tier whose plan is run.")] = "ci",
    fault: Annotated[list[str] | None, typer.Option("--fault", "-f", help="Fault, or a pattern with *; repeatable.")] = None,
    plugin: Plugins = None,
    until: Annotated[Until, typer.Option(help="When to move on: at a fault's first kill, after enough, at the plan's end.")] = (
        Until.ENOUGH
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the score and the matrix.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", help="Write the matrix as a page.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the planted faults; run nothing.")] = False,
    clean: Annotated[bool, typer.Option(help="Run the clean subjects too.")] = True,
    jobs: Annotated[int | None, typer.Option(help="Workers; default: the cores of a CPU up to 4, one on a GPU.", min=1)] = None,
) -> None:
    """Run a tier's plan against every planted historical bug: the kill matrix."""
    out = Console(soft_wrap=True, highlight=False)
    plugins = tuple(plugin or ())
    device = device_of(platform or detected_platform())
    workers = jobs or (min(4, os.cpu_count() or 1) if device.kind == "cpu" else 1)
    campaign = Campaign(device.arch, device, tier, plugins, workers, until)
    chosen = _chosen(campaign.faults(), fault or [])
    if list_only:
        for one in chosen:
            out.print(f"{one.name}  {one.text}  {one.thread}", markup=False)
        return
    runs = list(campaign.clean_runs(chosen)) if clean else []
    scores = []
    for score in campaign.scores(chosen):
        scores.append(score)
        if json_file is not None:  # a run that is cut short keeps what it had
            json_file.write_text(json.dumps(matrix.as_json(scores, runs), indent=1) + "\n")
        out.print(f"{'killed  ' if score.kills else 'SURVIVED'} {score.fault.name}  {matrix.called_as(score)}", markup=False)
    if page is not None:
        page.write_text(matrix.markdown(scores, runs, f"moecheck faults --platform {device.arch} --tier {tier}"))
    Console(width=180, highlight=False, file=out.file, force_terminal=out.is_terminal).print(matrix.table(scores))
    for line in matrix.summary(scores, runs):
        out.print(line, markup=False)
    bad = any(not s.kills for s in scores) or any(r.alarms or r.pools for r in runs)
    raise typer.Exit(SURVIVED if bad else 0)


def _chosen(faults: tuple[Fault, ...], patterns: list[str]) -> list[Fault]:
    """The faults that match a pattern; all without any. UnknownName for a pattern that matches none."""
    names = [fault.name for fault in faults]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UnknownName("fault", pattern, names)
    return [f for f in faults if not patterns or any(fnmatchcase(f.name, p) for p in patterns)]
