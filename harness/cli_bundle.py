"""`moecheck repro --bundle DIR` writes a bundle, `moecheck load DIR` reads a stranger's and judges its case here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import config
from harness.backends import discover
from harness.backends.base import Device
from harness.bundle.compare import Outcome, compared, signature
from harness.bundle.read import Bundle, read
from harness.bundle.write import Judged, new_folder, write
from harness.cli_options import Plugins
from harness.device import detect
from harness.errors import SelectionError
from harness.known import mark
from harness.plan import known_backend
from harness.reading import printable
from harness.report.text import explain
from harness.session import detected_platform, device_of
from harness.verdict import Verdict
from harness.worker.supervisor import Supervisor

CODES = {Outcome.SAME: 1, Outcome.ANOTHER: 1, Outcome.PASSES: 0, Outcome.UNJUDGED: 2}

Folder = Annotated[Path | None, typer.Option("--bundle", metavar="DIR", help="New folder for a repro bundle.")]


def load(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle, as repro --bundle writes it.")],
    platform: Annotated[str | None, typer.Option(help="Platform file; default: the bundle's if it is here.")] = None,
    plugin: Plugins = None,
    limit: Annotated[float, typer.Option(help="Time limit in seconds.", min=0.1, max=config.MAX_LIMIT_S)] = 300.0,
) -> None:
    """Check a stranger's bundle, execute nothing of it, and judge its case again with the backend of that name here."""
    out = Console(soft_wrap=True, highlight=False)
    bundle = read(folder)
    out.print(_described(folder, bundle), markup=False)
    plugins = tuple(plugin or ())
    subject = known_backend(bundle.manifest.backend, discover(plugins)).name
    device = _device(platform, bundle)
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(device, plugins, Path(logs), limit) as worker:
        verdict = mark(worker.judge(bundle.case, subject), config.known_issues())
    out.print(explain(verdict), markup=False)
    outcome = compared(bundle.verdict, verdict)
    there, here = (printable(" ".join(filter(None, signature(v)))) for v in (bundle.verdict, verdict))
    out.print(f"{outcome}: {there} there, {here} here", markup=False)
    raise typer.Exit(CODES[outcome])


def one_subject(folder: Path, subjects: list[str]) -> Path:
    """`folder`, made, for the one subject of a bundle; SelectionError for none or several."""
    if len(subjects) != 1:
        raise SelectionError(f"--bundle holds one failure of one backend; choose with --backend among {', '.join(subjects)}")
    return new_folder(folder)


def bundle(folder: Path, verdict: Verdict, worker: Supervisor, plugins: tuple[str, ...], device: Device) -> str:
    """Write the bundle of a verdict that `worker` reached; what was written, in one line."""
    made = write(folder, Judged(verdict, discover(plugins)[verdict.subject], device), worker)
    size = sum(file.bytes for file in made.files.values())
    kind = f"python {folder / 'repro.py'} calls the kernel by itself" if made.standalone else f"not standalone: {made.note}"
    return f"bundle {folder}: {len(made.files) + 1} files, {size} bytes; {kind}"


def _described(folder: Path, bundle: Bundle) -> str:
    machine = bundle.environment.get("machine", {})
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    verdict = printable(f"{bundle.verdict.status} {bundle.verdict.reason}")[:300]
    whole = f"{len(bundle.manifest.files) + 1} files as its manifest says; nothing of it is executed"
    return f"bundle {folder}: {whole}\n  there: {verdict}\n  on: {printable(facts)[:300]}"


def _device(platform: str | None, bundle: Bundle) -> Device:
    """The named platform's device; else the bundle's where this machine has it; else this machine's."""
    arch = bundle.manifest.arch
    if platform is None and arch in config.names("platforms") and arch in ("cpu", detect().arch):
        platform = arch
    return device_of(platform or detected_platform())
