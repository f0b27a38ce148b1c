"""moecheck merge, what a plan's file says, and which folder a shard runs in: shards of a plan run anywhere, and are joined."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harness import durations, merge, plan, run_info
from harness.errors import Incomplete, RunFolderError
from harness.plan import Plan
from harness.plan_files import Text
from harness.session import begin, new_folder, shard_of
from harness.shard import Shard, costs

BEGUN = {run_info.NAME, f".{run_info.NAME}", f".{plan.NAME}"}  # what a kill leaves of a run that has not yet its plan


def written(the_plan: Plan, places: list[Path]) -> Text:
    """A plan's file with the seconds that each item is expected to take, so that all shards agree on who has what."""
    known = durations.recorded(places, the_plan.request.platform)
    seconds = costs(the_plan.items, known)
    measured = sum(item in known for item in the_plan.items)
    counts = Counter(item.subject for item in the_plan.items)
    what = f"{len(the_plan.items)} items of tier {the_plan.request.tier} on {the_plan.request.platform}"
    how_long = f"about {sum(seconds):.0f} s ({measured} as recorded, the others estimated)"
    lines = ", ".join(f"{name} {number}" for name, number in counts.items()), f"{what}, {how_long}, digest {the_plan.digest}"
    return Text(replace(the_plan, seconds=seconds).text(), lines)


def folder_of(the_plan: Plan, shard: Shard | None, out_dir: Path | None, resume: Path | None) -> Path:
    """The run folder of this shard of this plan, made where it is not there; RunFolderError if it belongs to another."""
    if resume is not None and out_dir is not None:
        raise RunFolderError(f"--out {out_dir} --resume {resume}: one folder is wanted; --resume alone begins where nothing is")
    if resume is not None and (resume / plan.NAME).exists():
        if (there := plan.load(resume)) != the_plan:
            raise RunFolderError(f"--resume {resume}: {merge.unlike(the_plan, there)}; give another folder")
        if (whose := shard_of(resume)) != shard:
            raise RunFolderError(f"--resume {resume}: it holds {_named(whose)}, not {_named(shard)}; give another folder")
        return resume
    if resume is not None and resume.is_dir() and {path.name for path in resume.iterdir()} <= BEGUN:
        folder = resume
    elif resume is None and out_dir is None and shard is not None:
        folder = new_folder(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{shard.index}of{shard.count}")
    else:
        folder = new_folder(resume or out_dir)
    begin(the_plan, folder, shard)
    return folder


def _named(shard: Shard | None) -> str:
    return "the whole plan" if shard is None else f"shard {shard}"


def merge_(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders of one plan.")],
    out_dir: Annotated[Path, typer.Option("--out", help="New folder for the whole run.")],
) -> None:
    """Join the shards of a plan into one run, and say what is missing."""
    out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise RunFolderError(f"--out {out_dir}: exists and is not empty; choose another folder")
    joined = merge.join(folders)
    code = merge.write(joined, out_dir, out)
    for text in joined.remarks:
        err.print(f"moecheck: {text}", style="yellow", markup=False)
    if joined.gaps:
        lines = "".join(f"\n  {gap}" for gap in joined.gaps)
        missing, total = sum(gap.missing for gap in joined.gaps), len(joined.plan.items)
        raise Incomplete(
            f"{missing} verdicts are missing of a plan of {total}:{lines}\nor all here: moecheck run --resume {out_dir}"
        )
    raise typer.Exit(code)
