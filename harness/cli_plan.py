"""moecheck plan: a plan's file, made once for machines that need not be here. What was made before is there before torch is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import paths, plan_files
from harness.cli_options import OUT, Backends, Cases, Ops, Platform, Plugins, TierName, note
from harness.errors import RunFolderError, SelectionError

Output = Annotated[Path, typer.Option("--output", "-o", help="The plan's file; a folder for --platform all.")]
Durations = Annotated[
    list[Path] | None, typer.Option(help="A run, or a folder of runs, whose recorded times balance the shards; repeatable.")
]
ALL = "all"  # every platform


def command(  # noqa: PLR0913 - typer turns parameters into options
    output: Output,
    platform: Platform = None,
    tier: TierName = None,
    backend: Backends = None,
    op: Ops = None,
    case: Cases = None,
    plugin: Plugins = None,
    durations: Durations = None,
) -> None:
    """Write the plan of a platform, which need not be here, for `moecheck run --plan FILE --shard I/N` on machines that are;
    --platform all: of each, into a folder."""
    where = None if durations else paths.plans()  # runs go on: what they took is not kept
    wanted = paths.names("platforms") if platform == ALL else [platform or _detected()]
    empty = []
    for name in wanted:
        path = target(name, output, platform == ALL)
        asked: dict[str, Any] = {"platform": name, "tier": tier or "smoke"}
        asked |= {"backends": backend or [], "ops": op or [], "cases": case or [], "plugins": plugin or []}
        asked["partly"] = platform == ALL
        try:
            made = plan_files.kept(where, asked, partial(_made, asked, durations or []), note)
        except SelectionError as error:
            if platform != ALL:
                raise
            empty.append(str(error))
            continue
        save(made, path)
    if len(empty) == len(wanted):
        raise SelectionError(f"on no platform: {empty[0]}")
    for text in empty:
        note(text)


def target(platform: str, output: Path, every: bool) -> Path:
    """The file of a platform's plan: -o itself, or in it, where all platforms are planned. RunFolderError if it cannot be."""
    if every and output.exists() and not output.is_dir():
        raise RunFolderError(f"-o {output}: a file; --platform {ALL} writes one file for each platform: give a folder")
    path = output / f"{platform}.json" if every else output
    if (path.parent / paths.JOURNAL).exists():
        raise RunFolderError(f"-o {output}: {path.parent} is a run, whose plan stays as it is; choose another folder")
    return path


def save(made: plan_files.Text, path: Path) -> None:
    """Write the file and say what it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.put(path, made.content)
    except OSError as error:
        raise RunFolderError(f"-o {path}: cannot be written: {error.strerror}; choose another file") from error
    *counts, what = made.lines
    for line in (*counts, f"{what}; {path}"):
        OUT.print(line, markup=False)


def _detected() -> str:
    from harness.session import detected_platform

    return detected_platform()


def _made(asked: dict[str, Any], durations: list[Path]) -> plan_files.Text:
    from harness.cli_run import plan_of, request_of
    from harness.cli_shards import written

    filters = (asked[name] for name in ("backends", "ops", "cases", "plugins"))
    request = request_of(asked["platform"], asked["tier"], *filters)
    return written(plan_of(request, here=False, partly=asked["partly"]), durations)
