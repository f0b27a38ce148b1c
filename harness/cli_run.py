"""moecheck run, and how a selection becomes a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from harness import cli_latency, cli_shards, config, paths, plan, plan_cache
from harness.backends import discover
from harness.cli_options import ERR, OUT, Backends, Cases, Executor, Ops, Platform, Plugins, TierName, note
from harness.errors import MoecheckError
from harness.plan import Plan, Request
from harness.run import Manner, execute
from harness.session import detected_platform, device_of
from harness.shard import Shard


def run(  # noqa: PLR0913 - typer turns parameters into options
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Run a plan made by `moecheck plan`.")] = None,
    shard: Annotated[str | None, typer.Option(help="Run the I-th of N parts of the plan, e.g. 3/8.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="New run folder; default: runs/<time>.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the interrupted run in this folder; with --plan: begin there where nothing is."),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Seconds a case may take; default: the tier's.", min=0.1, max=config.MAX_LIMIT_S)
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per verdict.")] = False,
    soak: Annotated[bool, typer.Option("--soak", help="All cases in one process that is never recycled.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", "-n", help="Processes that share the run; a GPU each.", min=1)] = None,
    executor: Executor = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure; not for a nightly.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Afterwards, time what passed: production cases, or --case.")
    ] = False,
) -> None:
    """Judge every planned case and print the table."""
    ray = executor == "ray"
    manner = Manner(verbose, jobs, fail_fast, ray)
    selected = any((platform, tier, backend, op, case, plugin, limit, soak))
    if plan_file is not None:
        if selected:
            raise MoecheckError("--plan is a selection already; it takes no other")
        the_plan = plan.load(plan_file)
    elif resume is not None:
        if selected or out_dir or shard:
            raise MoecheckError("--resume continues the plan in its folder; it takes no other selection")
        the_plan = plan.load(resume)
    else:
        request = request_of(platform, tier, backend, op, case, plugin, limit_s=limit)
        the_plan = plan_of(replace(request, soak=soak), here=not ray)
    manner.check(the_plan.request)
    if plan_file is not None or resume is None:
        part = None if shard is None else Shard.parse(shard)
        if not ray:
            device_of(the_plan.request.platform)  # refused before anything is written
        folder = cli_shards.folder_of(the_plan, part, out_dir, resume)
    else:
        folder = resume
    code = execute(the_plan, folder, OUT, ERR, manner)
    if latency and code in (0, 1):  # judged, whatever was found
        cli_latency.phase(the_plan, folder)
    raise typer.Exit(code)


def request_of(platform: str | None, tier: str | None, *filters: list[str] | None, limit_s: float | None = None) -> Request:
    """`filters`: backends, ops, cases, plugins."""
    backends, ops, cases, plugins = (tuple(x or ()) for x in filters)
    return Request(platform or detected_platform(), tier or "smoke", backends, ops, cases, plugins, limit_s)


def plan_of(request: Request, here: bool = True, partly: bool = False) -> Plan:
    """Expand the request, on this machine's device or, for `list`, on the one the platform file describes. partly: see
    plan.make."""
    device = device_of(request.platform) if here else plan.device_named(config.platform(request.platform))
    rows = plan_cache.cached(paths.plans(), note)
    return plan.make(request, discover(request.plugins), device, rows=rows, partly=partly)
