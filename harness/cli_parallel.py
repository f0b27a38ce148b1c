"""moecheck parallel: a backend on several ranks of one machine, judged as one layer."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import config, journal, plan, run_info
from harness.backends import discover
from harness.case import Case
from harness.cli_options import Backends, Cases, Platform, Plugins
from harness.errors import MoecheckError, SelectionError
from harness.journal import Journal
from harness.parallel import cases
from harness.parallel.rank import HOST
from harness.parallel.run import Ranks, transport_of
from harness.plan import Plan, Request, chosen
from harness.report.text import line
from harness.run import exit_code, publish
from harness.select import Item
from harness.session import begin, detected_platform, device_of, new_folder

LIMIT_S = 60.0  # of a case: milliseconds of work, seconds of a first compilation on each rank
MAX_RANKS = 64

Count = Annotated[int, typer.Option("--ranks", help="Processes that share the experts; a GPU each.", min=1, max=MAX_RANKS)]
Transport = Annotated[str | None, typer.Option(help="gloo on CPUs, nccl on GPUs.")]
Tier = Annotated[str, typer.Option("--tier", help=f"How many cases: {', '.join(cases.STRENGTH)}.")]
HostName = Annotated[str, typer.Option("--host", help="Another dispatch and combine in the place of ours, as MODULE:CLASS.")]
Folder = Annotated[Path | None, typer.Option("--out", help="New run folder; default: runs/<time>.")]
Again = Annotated[Path | None, typer.Option("--resume", help="Continue the run in this folder.")]
Limit = Annotated[float, typer.Option(help="Seconds a case may take.", min=0.1)]


def command(  # noqa: PLR0913 - typer turns parameters into options
    ranks: Count = 2,
    platform: Platform = None,
    tier: Tier = "smoke",
    backend: Backends = None,
    case: Cases = None,
    plugin: Plugins = None,
    transport: Transport = None,
    host: HostName = HOST,
    out_dir: Folder = None,
    resume: Again = None,
    limit: Limit = LIMIT_S,
) -> None:
    """Judge kernels on several ranks: experts shared out, tokens sent to them and back. A crash or a hang is one rank's."""
    if resume is not None:
        the_plan, folder = plan.load(resume), resume
        ranks = _ranks_of(the_plan)
    else:
        request = Request(
            platform or detected_platform(), tier, tuple(backend or ()), (), tuple(case or ()), tuple(plugin or ()), limit
        )
        the_plan, folder = _plan(request, ranks), None
    here = device_of(the_plan.request.platform)
    transport_of(here, transport, ranks)
    if folder is None:
        folder = new_folder(out_dir)
        begin(the_plan, folder)
    out = Console(soft_wrap=True, highlight=False)
    started = time.monotonic()
    host = _host_of(folder, host)
    record = Journal(folder)
    try:
        with Ranks(here, ranks, the_plan.limit_s, the_plan.request.plugins, host) as group:
            for item in the_plan.items:
                if item not in record.done:
                    verdict = group.judge(item)
                    record.append(verdict)
                    out.print(line(verdict), markup=False)
    finally:
        record.close()
    verdicts = journal.read(folder)
    if info := run_info.read(folder):
        run_info.write(folder, info.stopped(time.monotonic() - started, whole=True))
    publish(the_plan, verdicts, folder, out)
    raise typer.Exit(exit_code(verdicts))


def _plan(request: Request, ranks: int) -> Plan:
    """The plan of several ranks; named cases are judged as they are."""
    backends = chosen(request.backends, discover(request.plugins))
    device = plan.device_named(config.platform(request.platform))
    usable = [b for b in backends if cases.refuses(b) is None]
    if request.backends and not usable:
        raise SelectionError(f"{backends[0].name}: {cases.refuses(backends[0])}; choose another backend")
    named = [c for c in request.cases if "*" not in c]
    items = [Item(c, cases.name_of(b.name, ranks)) for c in named for b in usable if Case.parse(c)]
    if len(named) < len(request.cases) or not request.cases:
        found = cases.plan(usable, device, ranks, request.tier)
        items += [i for i in found if not request.cases or any(fnmatchcase(i.case_id, c) for c in request.cases)]
    if not items:
        raise SelectionError("no case of several ranks is left; `moecheck list` shows what runs on this platform")
    return Plan(request, request.limit_s or LIMIT_S, tuple(dict.fromkeys(items)))


def _host_of(folder: Path, asked: str) -> str:
    """The host of a run that goes on; MoecheckError for another one than it began with."""
    begun = {v.environment.get("host", HOST) for v in journal.read(folder)} or {asked}
    if asked not in (HOST, *begun):
        raise MoecheckError(f"--host {asked}: {folder} was begun with {', '.join(begun)}; give another folder")
    return begun.pop()


def _ranks_of(the_plan: Plan) -> int:
    counts = {cases.split(item.subject)[1] for item in the_plan.items}
    if len(counts) != 1:
        raise MoecheckError(f"a run of several ranks has one number of them, this plan has {sorted(counts)}; run it anew")
    return counts.pop()
