"""`moecheck import-dump DIR`: what FlashInfer's flight recorder wrote before somebody's call, judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import config
from harness.cli_options import Platform
from harness.dump.read import Dump, DumpError, folders
from harness.dump.subject import judge_recorded, opened
from harness.journal import Journal
from harness.known import mark
from harness.report.text import explain
from harness.session import detected_platform, device_of, new_folder
from harness.worker.supervisor import Supervisor

CLEAN, KERNEL_FAILED, USER_ERROR = 0, 1, 3
PLUGIN = """\
from harness.dump.subject import subject_of

BACKENDS = (subject_of({folder!r}, {name!r}),)
"""
out = Console(soft_wrap=True, highlight=False)
Root = Annotated[Path, typer.Argument(metavar="DIR", help="A dump of FLASHINFER_LOGLEVEL=10, or a folder of them.")]


def import_dump(
    root: Root,
    platform: Platform = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<time>.")] = None,
    limit: Annotated[float, typer.Option(help="Time limit of a call in seconds.", min=0.1, max=config.MAX_LIMIT_S)] = 300.0,
) -> None:
    """Judge recorded calls of FlashInfer: arguments, an isolated run, the values against the reference."""
    device = device_of(platform or detected_platform())
    found = folders(root)
    folder, failed, refused = new_folder(out_dir), False, 0
    journal = Journal(folder)
    for index, place in enumerate(found):
        try:
            dump, call = opened(str(place.resolve()))
            case = call.case
        except DumpError as error:
            out.print(f"not judged: {error}", markup=False, style="yellow")
            refused += 1
            continue
        plugin = folder / f"dump_{index}.py"
        plugin.write_text(PLUGIN.format(folder=str(place.resolve()), name=f"dump_{index}"))
        for text in (*dump.notes, _recorded(dump)):
            out.print(f"{place.name}: {text}", markup=False)
        with Supervisor(device, (str(plugin),), folder, limit) as worker:
            verdict = mark(worker.judge(case, f"dump_{index}"), config.known_issues())
        journal.append(verdict)
        out.print(explain(verdict), markup=False)
        failed |= verdict.status.failed
    journal.close()
    out.print(f"{len(found)} recorded calls: {len(found) - refused} judged, {refused} not; {folder}", markup=False)
    raise typer.Exit(KERNEL_FAILED if failed else USER_ERROR if refused == len(found) else CLEAN)


def _recorded(dump: Dump) -> str:
    """What the tensors say that the call returned when it was recorded."""
    made = f"recorded under flashinfer {dump.versions.get('flashinfer', '?')}, torch {dump.versions.get('torch', '?')}"
    return f"{made}; {judge_recorded(str(dump.folder))[0]}"
