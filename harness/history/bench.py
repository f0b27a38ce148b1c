"""python -m harness.history.bench: how long the questions take over a million verdicts in four hundred runs."""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from harness import journal
from harness.history import store, synthetic
from harness.history.query import History
from harness.history.store import Place, add
from harness.history.synthetic import BEGAN, Night

QUESTIONS: dict[str, Callable[[History], object]] = {
    "runs": History.runs,
    "regressions": History.regressions,
    "flakes": History.flakes,
    "drift": History.drift,
    "slowest": lambda history: history.slowest(10),
    "ledger's facts": History.facts,
    "executed in 30 days": lambda history: history.executed(history.runs()[-30:][0].started),
    "known issues": History.known,
}
# a run is a copy of the first with its own date, versions, times and errors; one verdict in a thousand fails
COPY = """COPY (SELECT * EXCLUDE (lost) REPLACE (
    '{run}' AS run, '{run}' AS identity, '{started}' AS started, '0.1.0 {number:040x}' AS code,
    library || '.{release}' AS library, replace(versions, '"torch": "', '"torch": "{release}.') AS versions,
    seconds * (0.8 + 0.5 * random()) AS seconds, mean_z2 * (0.98 + 0.04 * random()) AS mean_z2,
    rel_l2 * (0.98 + 0.04 * random()) AS rel_l2, lost AS failed,
    CASE WHEN lost THEN 'WRONG' ELSE status END AS status, CASE WHEN lost THEN 'red' ELSE outcome END AS outcome)
  FROM (SELECT *, random() < 0.001 AS lost FROM read_parquet('{template}')))
  TO '{target}' (FORMAT parquet, COMPRESSION zstd)"""


@dataclass(frozen=True)
class Measured:
    """(wall, processor) seconds of opening the history and of each question; wall seconds of the first `add` and its verdicts;
    verdicts in all; bytes of Parquet."""

    seconds: dict[str, tuple[float, float]]
    add_s: float
    added: int
    verdicts: int
    size: int


def measure(root: Path, runs: int, each: int) -> Measured:
    """Build `runs` runs of `each` verdicts under `root` and ask everything."""
    night = Night(0, {"torch": "2.13.0", "onnxruntime": "1.32.0", "triton": "3.7.1"}, "0" * 40)
    first = synthetic.write(root / "run", night, synthetic.verdicts(night, synthetic.items(each)))
    place, started = Place(str(root / "history")), time.perf_counter()
    template = root / "history" / add(first, place).name / store.NAME
    add_s = time.perf_counter() - started
    with store.duckdb().connect() as connection:
        for number in range(1, runs):
            name = f"{number:05}"
            (root / "history" / name).mkdir()
            when = (BEGAN + timedelta(hours=number)).isoformat(timespec="seconds")
            target = root / "history" / name / store.NAME
            told = {"run": name, "started": when, "number": number // 3, "release": number // 40}
            connection.execute(COPY.format(**told, template=template, target=target))
    clock = [(time.perf_counter(), time.process_time())]
    with History(str(root / "history"), root / "cache") as history:
        clock.append((time.perf_counter(), time.process_time()))
        for ask in QUESTIONS.values():
            ask(history)
            clock.append((time.perf_counter(), time.process_time()))
        verdicts = sum(run.verdicts for run in history.runs())
    taken = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(clock)]
    size = sum(path.stat().st_size for path in (root / "history").rglob(store.NAME))
    return Measured(dict(zip(("open", *QUESTIONS), taken, strict=True)), add_s, len(journal.read(first)), verdicts, size)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--each", type=int, default=2500, help="verdicts in a run")
    given, out = parser.parse_args(), Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="moecheck-") as folder:
        found = measure(Path(folder), given.runs, given.each)
    for name, (wall, processor) in found.seconds.items():
        out.print(f"{name:20} {wall:6.2f} s, {processor:6.2f} s of processor time")
    wall, processor = (sum(times) for times in zip(*found.seconds.values(), strict=True))
    out.print(f"{'all of it':20} {wall:6.2f} s, {processor:6.2f} s of processor time")
    out.print(f"{found.verdicts} verdicts in {given.runs} runs, {found.size >> 20} MiB of Parquet")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    out.print(f"add: {found.added / found.add_s:.0f} verdicts a second; peak memory {peak} MiB")


if __name__ == "__main__":
    main()
