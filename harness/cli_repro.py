"""`moecheck repro ID`: one case again, alone, with everything there is to say about it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import cli_bundle, config, plan
from harness.backends import discover
from harness.backends.base import Backend, Device
from harness.case import Case
from harness.cli_options import Backends, Platform, Plugins
from harness.errors import MoecheckError
from harness.known import mark
from harness.plan import Request
from harness.report.text import explain
from harness.select import Item
from harness.session import detected_platform, device_of
from harness.worker import sanitizer as sanitizers
from harness.worker.supervisor import Supervisor

CLEAN, KERNEL_FAILED = 0, 1  # exit codes
out = Console(soft_wrap=True, highlight=False)

After = Annotated[
    list[str] | None, typer.Option(metavar="[BACKEND:]ID", help="Case judged before it in the same process; repeatable.")
]
Tool = Annotated[str | None, typer.Option(help=f"Under compute-sanitizer: {', '.join(sanitizers.TOOLS)}.")]


def repro(  # noqa: PLR0913 - typer turns parameters into options
    case_id: Annotated[str, typer.Argument(metavar="ID", help="Case id, as a verdict prints it.")],
    platform: Platform = None,
    backend: Backends = None,
    plugin: Plugins = None,
    limit: Annotated[float, typer.Option(help="Time limit in seconds.", min=0.1, max=config.MAX_LIMIT_S)] = 300.0,
    after: After = None,
    sanitizer: Tool = None,
    bundle: cli_bundle.Folder = None,
) -> None:
    """Judge one case again, alone in a fresh child or after others, and say everything about it."""
    case, plugins = Case.parse(case_id), tuple(plugin or ())
    found, device = discover(plugins), device_of(platform or detected_platform())
    request = Request(device.arch, "smoke", tuple(backend or ()), cases=(case.id,), plugins=plugins)
    subjects = [item.subject for item in plan.make(request, found, device).items]
    if sanitizer is not None:
        if after or bundle:
            raise MoecheckError("--sanitizer judges one case alone; it takes neither --after nor --bundle")
        raise typer.Exit(_sanitized(case, subjects, device, plugins, sanitizer, limit))
    folder = None if bundle is None else cli_bundle.one_subject(bundle, subjects)
    failed = False
    for subject in subjects:
        before = [_item(text, subject, found) for text in after or ()]
        with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(device, plugins, Path(logs), limit) as worker:
            worker.repeats = config.tier("nightly").repeats
            verdict = mark(worker.judge(case, subject, before), config.known_issues())
            out.print(explain(verdict), markup=False)
            if folder is not None:
                out.print(cli_bundle.bundle(folder, verdict, worker, plugins, device), markup=False)
        failed |= verdict.status.failed
    raise typer.Exit(KERNEL_FAILED if failed else CLEAN)


def _item(text: str, subject: str, found: Mapping[str, Backend]) -> Item:
    """BACKEND:ID or ID, of `subject` then."""
    backend, _, case_id = text.rpartition(":")
    return Item(Case.parse(case_id).id, plan.known_backend(backend or subject, found).name)


def _sanitized(case: Case, subjects: list[str], device: Device, plugins: tuple[str, ...], tool: str, limit: float) -> int:
    """One process under compute-sanitizer after another; 1 if a kernel failed."""
    folder, failed = Path(tempfile.mkdtemp(prefix="moecheck-sanitizer-")), False  # stays: the tool's whole report lies there
    for subject in subjects:
        order = sanitizers.Order(case.id, subject, device, plugins, str(folder / f"{subject}.json"))
        verdict, said = sanitizers.judge(order, tool, limit)
        out.print(explain(verdict), markup=False)
        out.print(said, markup=False)
        failed |= verdict.status.failed
    return KERNEL_FAILED if failed else CLEAN
