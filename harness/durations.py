"""What cases took in earlier runs, for balancing shards."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from harness import config, journal, run_info
from harness.errors import RunFolderError
from harness.select import Item

RECENT = 10  # runs of a history that count: kernels and machines change


def recorded(places: Iterable[Path], platform: str) -> dict[Item, float]:
    """Median seconds of each item on `platform` in the run folders of `places`: a run, or a folder of runs, of which the newest
    count. RunFolderError for a place that has neither."""
    arch = config.platform(platform).arch
    seconds: dict[Item, list[float]] = defaultdict(list)
    for folder in (run for place in places for run in _runs(place)):
        for verdict in journal.read(folder):
            if verdict.environment.get("arch", arch) == arch and not verdict.status.skipped:
                seconds[Item(verdict.case_id, verdict.subject)].append(verdict.seconds)
    return {item: statistics.median(found) for item, found in seconds.items()}


def _runs(place: Path) -> list[Path]:
    if (place / journal.NAME).is_file():
        return [place]
    runs = [path.parent for path in place.glob(f"*/{journal.NAME}")]
    if not runs:
        raise RunFolderError(
            f"--durations {place}: neither a run nor a folder of runs: no {journal.NAME} in it; wanted one of them"
        )
    return sorted(runs, key=_when)[-RECENT:]


def _when(run: Path) -> tuple[float, str]:
    """Seconds since 1970 and the name; a run of an older release is as old as its journal."""
    info = run_info.read(run)
    when = run_info.timestamp(info.started) if info is not None else (run / journal.NAME).stat().st_mtime
    return when, run.name
