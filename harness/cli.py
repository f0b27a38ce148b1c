"""The command line: doctor, list, run; repro in cli_repro.py, load, faults, audit and shrink in cli_bundle.py and the like.

Exit codes: 0 clean, 1 a kernel failed, 2 incomplete (resume), 3 our or the user's fault.
"""

from __future__ import annotations

import io
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from harness import (
    __version__,
    cli_attribute,
    cli_audit,
    cli_bisect,
    cli_bundle,
    cli_coverage,
    cli_diff,
    cli_history,
    cli_known,
    cli_latency,
    cli_list,
    cli_matrix_versions,
    cli_overlay,
    cli_parallel,
    cli_pipeline,
    cli_preflight,
    cli_report,
    cli_shards,
    cli_versions,
    cli_warm,
    config,
    plan,
    plan_cache,
    plan_files,
)
from harness.backends import discover
from harness.backends.base import Backend
from harness.cli_dump import import_dump
from harness.cli_faults import faults
from harness.cli_options import Backends, Cases, Executor, Ops, Platform, Plugins, TierName
from harness.cli_repro import repro
from harness.cli_shrink import shrink
from harness.device import detect, driver_version, gpus, version
from harness.errors import MoecheckError, SelectionError
from harness.plan import Plan, Request
from harness.run import Incomplete, Manner, execute
from harness.session import detected_platform, device_of
from harness.shard import Shard
from harness.worker.supervisor import Supervisor, WorkerBug

CLEAN, KERNEL_FAILED, INCOMPLETE, USER_ERROR = 0, 1, 2, 3

# typer ships its own click from 0.26 on and used the real one before: its usage errors are found by their base class.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(add_completion=False, help="Checks MoE kernels against a pure-PyTorch reference.")
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
app.command("attribute")(cli_attribute.command)
app.command("audit")(cli_audit.command)
app.command("diff")(cli_diff.command)
app.command("matrix-versions")(cli_matrix_versions.command)
app.command("load")(cli_bundle.load)
app.command("history")(cli_history.command)
app.command("coverage")(cli_coverage.command)
app.command("known")(cli_known.command)
app.add_typer(cli_versions.app, name="contracts")
app.command("bisect")(cli_bisect.command)
app.command("overlay")(cli_overlay.command)
app.command("merge")(cli_shards.merge_)
app.add_typer(cli_pipeline.app, name="pipeline")
app.add_typer(cli_latency.app, name="latency")
app.command("parallel")(cli_parallel.command)
app.command("preflight")(cli_preflight.command)
app.command("warm")(cli_warm.command)
app.command("report")(cli_report.command)


@app.command()
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
        request = _request(platform, tier, backend, op, case, plugin, limit_s=limit)
        the_plan = _plan(replace(request, soak=soak), here=not ray)
    manner.check(the_plan.request)
    if plan_file is not None or resume is None:
        part = None if shard is None else Shard.parse(shard)
        if not ray:
            device_of(the_plan.request.platform)  # refused before anything is written
        folder = cli_shards.folder_of(the_plan, part, out_dir, resume)
    else:
        folder = resume
    code = execute(the_plan, folder, out, err, manner)
    if latency and code in (CLEAN, KERNEL_FAILED):
        cli_latency.phase(the_plan, folder)
    raise typer.Exit(code)


@app.command("plan")
def plan_(  # noqa: PLR0913 - typer turns parameters into options
    output: cli_shards.Output,
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    durations: cli_shards.Durations = None,
) -> None:
    """Write the plan of a platform, which need not be here, for `moecheck run --plan FILE --shard I/N` on machines that are;
    --platform all: of each, into a folder."""
    every = platform == cli_shards.ALL
    where = None if durations else plan_cache.folder()  # runs go on: what they took is not kept
    empty = []
    for name in config.names("platforms") if every else [platform]:
        request = _request(name, tier, backend, op, case, plugin)
        path = cli_shards.target(request.platform, output, every)
        try:
            made = plan_files.kept(where, request, partial(_written, request, durations or []), _note)
        except SelectionError as error:
            if not every:
                raise
            empty.append(str(error))
            continue
        cli_shards.save(made, path, out)
    if len(empty) == len(config.names("platforms")):
        raise SelectionError(f"on no platform: {empty[0]}")
    for text in empty:
        _note(text)


def _written(request: Request, durations: list[Path]) -> plan_files.Text:
    return cli_shards.written(_plan(request, here=False), durations)


def _note(text: str) -> None:
    err.print(f"moecheck: {text}", style="yellow", markup=False)


@app.command("list")
def list_(  # noqa: PLR0913 - typer turns parameters into options
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    as_cases: cli_list.AsCases = False,
    as_json: cli_list.AsJson = False,
) -> None:
    """Print what runs where on a platform, or the plan: subject and case id, one per line."""
    if as_cases or any((tier, backend, op, case)):
        if as_json:
            raise MoecheckError("--json is of the matrix; the plan is lines already, and plan.json in each run folder")
        cli_list.cases(_plan(_request(platform, tier, backend, op, case, plugin), here=False), out, err)
    else:
        cli_list.show(platform or detected_platform(), plugin or [], as_json, out)


app.command()(repro)
app.command()(faults)
app.command()(shrink)
app.command()(import_dump)


@app.command()
def doctor(plugin: Plugins = None) -> None:
    """What is here: GPU, driver, library versions, and which backends can run."""
    found = discover(plugin or ())
    device = detect()
    out.print(f"moecheck {__version__}, python {sys.version.split()[0]}")
    out.print("GPU: " + ("; ".join(f"{g.name} ({g.arch})" for g in gpus()) or "none (NVML finds no driver or no device)"))
    out.print(f"driver {driver_version() or '-'}, platform {device.arch}")
    known = config.names("platforms")
    if device.arch not in known:
        out.print(f"[yellow]no configs/platforms/{device.arch}.yaml; there are: {', '.join(known)}[/yellow]")
    libraries = sorted({b.library for b in found.values()} | {"torch", "triton", "flashinfer-python", "vllm"})
    out.print(", ".join(f"{name} {version(name) or '-'}" for name in libraries))
    out.print(_backend_table(found, tuple(plugin or ())))


def _backend_table(found: dict[str, Backend], plugins: tuple[str, ...]) -> Table:
    table = Table(Column("backend", no_wrap=True), "here", "recipes", "what it is / why not", header_style="bold")
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(detect(), plugins, Path(logs), 120.0) as worker:
        for name, backend in sorted(found.items()):
            support, _ = worker.probe(name)
            if support.ok and backend.archs and detect().arch not in backend.archs:
                support = type(support).no("arch", f"needs {' or '.join(backend.archs)}")
            here = "[green]yes[/green]" if support.ok else "[yellow]no[/yellow]"
            table.add_row(name, here, ", ".join(backend.recipes), escape(backend.summary if support.ok else support.reason))
    return table


def _request(platform: str | None, tier: str | None, *filters: list[str] | None, limit_s: float | None = None) -> Request:
    """`filters`: backends, ops, cases, plugins."""
    backends, ops, cases, plugins = (tuple(x or ()) for x in filters)
    return Request(platform or detected_platform(), tier or "smoke", backends, ops, cases, plugins, limit_s)


def _plan(request: Request, here: bool = True) -> Plan:
    """Expand the request, on this machine's device or, for `list`, on the one the platform file describes."""
    device = device_of(request.platform) if here else plan.device_named(config.platform(request.platform))
    rows = plan_cache.cached(plan_cache.folder(), _note)
    return plan.make(request, discover(request.plugins), device, rows=rows)


def main() -> NoReturn:
    """Console entry point: every fault of the user is one message and exit code 3."""
    code = CLEAN
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a message may quote what no encoding holds, or a terminal speak ASCII
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False) or CLEAN
    except typer.Abort:
        code = INCOMPLETE
    except ClickException as error:
        err.print(f"moecheck: {error.format_message()}", style="red", markup=False)
        code = USER_ERROR
    except (MoecheckError, WorkerBug) as error:
        err.print(f"moecheck: {error}", style="red", markup=False)
        code = USER_ERROR
    except Incomplete as stopped:
        err.print(f"moecheck: {stopped}", style="yellow", markup=False)
        code = INCOMPLETE
    except Exception:  # Python's own exit code would be 1: a kernel failed
        err.print(traceback.format_exc(), style="red", markup=False)
        code = USER_ERROR
    sys.exit(code)
