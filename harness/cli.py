"""The command line: doctor, list, run, repro; load (cli_bundle.py), faults (cli_faults.py) and audit (cli_audit.py).

Exit codes: 0 clean, 1 a kernel failed, 2 incomplete (resume), 3 our or the user's fault.
"""

from __future__ import annotations

import io
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness import __version__, cli_audit, cli_bundle, config, plan
from harness.backends import discover
from harness.backends.base import Backend
from harness.case import Case
from harness.cli_faults import faults
from harness.device import detect, driver_version, gpus, version
from harness.errors import MoecheckError
from harness.known import mark
from harness.plan import Plan, Request
from harness.report.text import explain
from harness.run import Incomplete, execute
from harness.session import detected_platform, device_of, new_folder
from harness.worker.supervisor import Supervisor, WorkerBug

CLEAN, KERNEL_FAILED, INCOMPLETE, USER_ERROR = 0, 1, 2, 3

# typer ships its own click from 0.26 on and used the real one before: its usage errors are found by their base class.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(add_completion=False, help="Checks MoE kernels against a pure-PyTorch reference.")
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)
app.command("audit")(cli_audit.command)
app.command("load")(cli_bundle.load)


def _absolute(paths: list[str] | None) -> list[str]:
    """Plans and rerun lines must work from any folder."""
    return [str(Path(path).absolute()) if path.endswith(".py") or "/" in path else path for path in paths or ()]


Platform = Annotated[str | None, typer.Option(help="Platform file under configs/platforms; default: this machine's.")]
TierName = Annotated[str | None, typer.Option("--tier", help="Tier file under configs/tiers.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", "-b", help="Backend to judge; repeatable.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Operation to judge; repeatable.")]
Cases = Annotated[list[str] | None, typer.Option("--case", "-c", help="Case id, or a pattern with *; repeatable.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", callback=_absolute, help="Python file or module that defines BACKENDS or FAULTS; repeatable."),
]


@app.command()
def run(  # noqa: PLR0913 - typer turns parameters into options
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="New run folder; default: runs/<time>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the interrupted run in this folder.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="Seconds a case may take; default: the tier's.", min=0.1, max=config.MAX_LIMIT_S)
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per verdict.")] = False,
) -> None:
    """Judge every planned case and print the table."""
    if resume is not None:
        if any((platform, tier, backend, op, case, plugin, out_dir, limit)):
            raise MoecheckError("--resume continues the plan in its folder; it takes no other selection")
        folder, the_plan = resume, plan.load(resume)
    else:
        the_plan = _plan(_request(platform, tier, backend, op, case, plugin, limit_s=limit))
        folder = new_folder(out_dir)
        the_plan.save(folder)
    raise typer.Exit(execute(the_plan, folder, out, err, verbose))


@app.command("list")
def list_(
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
) -> None:
    """Print the plan: subject and case id, one per line."""
    the_plan = _plan(_request(platform, tier, backend, op, case, plugin), here=False)
    for item in the_plan.items:
        out.print(f"{item.subject}  {item.case_id}", markup=False)
    counts = Counter(item.subject for item in the_plan.items)
    err.print(f"{len(the_plan.items)} cases: " + ", ".join(f"{name} {n}" for name, n in counts.items()))


@app.command()
def repro(
    case_id: Annotated[str, typer.Argument(metavar="ID", help="Case id, as a verdict prints it.")],
    platform: Platform = None,
    backend: Backends = None,
    plugin: Plugins = None,
    limit: Annotated[float, typer.Option(help="Time limit in seconds.")] = 300.0,
    bundle: cli_bundle.Folder = None,
) -> None:
    """Judge one case again, alone in a fresh child, and say everything about it."""
    case = Case.parse(case_id)
    plugins = tuple(plugin or ())
    found = discover(plugins)
    device = device_of(platform or detected_platform())
    request = Request(device.arch, "smoke", tuple(backend or ()), cases=(case.id,), plugins=plugins)
    chosen = [item.subject for item in plan.make(request, found, device).items]
    folder = None if bundle is None else cli_bundle.one_subject(bundle, chosen)
    failed = False
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(device, plugins, Path(logs), limit) as worker:
        for subject in chosen:
            verdict = mark(worker.judge(case, subject), config.known_issues())
            out.print(explain(verdict), markup=False)
            if folder is not None:
                out.print(cli_bundle.bundle(folder, verdict, worker, plugins, device), markup=False)
            failed |= verdict.status.failed
    raise typer.Exit(KERNEL_FAILED if failed else CLEAN)


app.command()(faults)


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
    table = Table("backend", "here", "recipes", "what it is / why not", header_style="bold")
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
    return plan.make(request, discover(request.plugins), device)


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
