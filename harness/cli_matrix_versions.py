"""`moecheck matrix-versions`: one plan over several releases of a package, as a table of case x version."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness import plan
from harness.backends import discover
from harness.cli_diff import written
from harness.cli_options import Allow, Backends, Cases, Index, Ops, Platform, Plugins, TierName, Wheelhouse
from harness.errors import CannotTell, MoecheckError, RunFolderError
from harness.plan import Plan, Request
from harness.reading import printable
from harness.select import Item
from harness.session import detected_platform, device_of
from harness.versions import axes, env, store, window
from harness.versions.judging import judge_all
from harness.versions.uv import PYPI

CLEAN, KERNEL_FAILED = 0, 1
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(  # noqa: PLR0913 - typer turns parameters into options
    package: Annotated[str, typer.Argument(help="Package as the index names it: flashinfer-python, vllm.")],
    versions: Annotated[str | None, typer.Option(help="Releases, a,b,c, in the order of the table.")] = None,
    good: Annotated[str | None, typer.Option(help="With --bad instead: all known releases from one to the other.")] = None,
    bad: Annotated[str | None, typer.Option(help="See --good.")] = None,
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    wheelhouse: Wheelhouse = None,
    index: Index = PYPI,
    allow: Allow = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for each release's journal; the same command goes on from it.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds a case may take; default: the tier's.", min=0.1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here, as data.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here, to paste.")] = None,
) -> None:
    """Judge one plan over every release: which cases fail since when, until when. Exit 1 if any fails anywhere."""
    if not any((case, backend, tier, op)):
        raise MoecheckError("say which cases: --case ID, --backend NAME, --op NAME or --tier NAME")
    source = env.Source(index, wheelhouse and wheelhouse.absolute(), tuple(allow or ()))
    chosen = columns(package, versions, good, bad, source)
    backends, ops, cases, plugins = (tuple(given or ()) for given in (backend, op, case, plugin))
    request = Request(platform or detected_platform(), tier or "smoke", backends, ops, cases, plugins, limit)
    found = discover(request.plugins)
    the_plan = plan.make(request, found, device_of(request.platform))
    entries = tuple(sorted({e for i in the_plan.items for e in found[i.subject].entries}))
    terms = env.Terms(request.platform, request.plugins, the_plan.limit_s, the_plan.checks, the_plan.repeats, entries)
    with tempfile.TemporaryDirectory(prefix="moecheck-") as scratch:
        folder = _folder(out_dir, the_plan) if out_dir is not None else Path(scratch)
        releases = [_release(package, v, source, the_plan.items, terms, folder / v) for v in chosen]
    _show(package, releases, the_plan.items)
    if json_file is not None:
        written(json_file, json.dumps(window.as_json(package, releases, the_plan.items), indent=1) + "\n")
    if markdown_file is not None:
        written(markdown_file, window.markdown(package, releases, the_plan.items), "--markdown")
    raise typer.Exit(KERNEL_FAILED if any(r.bad(i) for r in releases for i in the_plan.items) else CLEAN)


def columns(package: str, versions: str | None, good: str | None, bad: str | None, source: env.Source) -> list[str]:
    """The releases of the table. MoecheckError unless exactly one way to name them is used, and each is a version."""
    if (versions is None) == (good is None and bad is None) or (good is None) != (bad is None):
        raise MoecheckError("say which releases: --versions a,b,c, or --good V --bad V")
    if versions is not None:
        named = [v.strip() for v in versions.split(",") if v.strip()]
        if not named or len({store.parsed(v) for v in named}) < len(named):
            raise MoecheckError(f"--versions {versions!r}: wanted at least one release, each once")
        return named
    known = axes.releases(package, source, env.cache_folder(), lambda text: err.print(f"moecheck: {text}", markup=False))
    ends = sorted((known.end(v) for v in (good, bad) if v is not None), key=store.parsed)
    return list(known.span(*ends))


def _folder(out_dir: Path, the_plan: Plan) -> Path:
    """The folder with this plan in it. RunFolderError if it holds another, or anything else."""
    if (out_dir / plan.NAME).exists():
        if plan.load(out_dir).digest != the_plan.digest:
            raise RunFolderError(f"--out {out_dir}: it holds the verdicts of another plan; name a new folder")
        return out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.iterdir()):
            raise RunFolderError(f"--out {out_dir}: not empty, and no plan of moecheck in it; name a new folder")
        the_plan.save(out_dir)
    except OSError as error:
        raise RunFolderError(f"--out {out_dir}: cannot be written: {error.strerror}; choose another folder") from error
    return out_dir


def _release(
    package: str, version: str, source: env.Source, items: Sequence[Item], terms: env.Terms, folder: Path
) -> window.Release:
    try:
        overlay = env.make({package: version}, source, env.cache_folder())
        verdicts = judge_all(overlay, items, terms, folder)
    except CannotTell as error:
        err.print(f"{package} {version}: cannot tell: {printable(error.reason)}", markup=False)
        return window.Release(version, reason=printable(error.reason))
    failed = sum(v.status.failed for v in verdicts)
    err.print(f"{package} {version}: {len(verdicts)} verdicts, {failed} failed", markup=False)
    return window.Release(version, {Item(v.case_id, v.subject): v for v in verdicts})


def _show(package: str, releases: Sequence[window.Release], items: Sequence[Item]) -> None:
    width = max(shutil.get_terminal_size((140, 40)).columns, 60 + 8 * len(releases))
    table = Table("backend", "case", *(r.version for r in releases), "bad", title=package, title_justify="left")
    for item in items:
        bad = "; ".join(map(str, window.spans(releases, item)))
        row = (cell.replace("[", "\\[") for cell in window.cells(releases, item))
        table.add_row(item.subject, item.case_id, *row, bad)
    Console(width=width, highlight=False, file=out.file, force_terminal=out.is_terminal).print(table)
    out.print(window.legend(releases, items), markup=False)
    for line in window.untold(releases):
        out.print(printable(line), markup=False)
