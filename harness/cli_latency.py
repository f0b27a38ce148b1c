"""`moecheck latency`: compare two versions of a kernel, and how much a comparison can see; `run --latency` times one."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness import journal, plan, run_info
from harness.backends import discover
from harness.case import Case
from harness.cli_options import Platform as PlatformName
from harness.cli_options import Plugins, absolute
from harness.errors import TimingError
from harness.latency import lane, power
from harness.latency.compare import BLOCKS, Contest, Measured
from harness.latency.record import Timing
from harness.latency.statistics import Call, Comparison, Design, Round
from harness.latency.timer import Side
from harness.plan import Plan
from harness.reading import parse_json, regular
from harness.session import detected_platform, device_of

app = typer.Typer(add_completion=False, help="How fast the correct kernels are. No timing decides a verdict.")
out = Console(soft_wrap=True, highlight=False)
MAX_BYTES = 1 << 27  # of a file of comparisons: 2 KiB a round
SideText = Annotated[list[str], typer.Option(help="Of the side: a backend's name, a plugin FILE.py, a folder; repeatable.")]

Resolution = Annotated[float, typer.Option(min=0.01, max=1.0, help='What "no difference" does not overlook, as a share.')]


def phase(the_plan: Plan, folder: Path) -> list[Timing]:
    """Times what passed in a run folder, after its verdicts."""
    request = the_plan.request
    items = lane.chosen(the_plan, journal.read(folder))
    if not items:
        out.print("latency: nothing to time: no production case of this plan passed; name cases with --case", markup=False)
    logs = folder / "log"
    logs.mkdir(exist_ok=True)
    measure = lane.Lane(device_of(request.platform), request.plugins, logs, the_plan.limit_s)
    timings = lane.run(measure, items, folder, lambda t: out.print(_line(t), markup=False))
    if timings:
        out.print(lane.table(timings))
    for note, count in Counter(note for t in timings for note in t.notes).items():
        out.print(f"latency: {note} ({count} of {len(timings)})", markup=False, style="yellow")
    return timings


def _line(timing: Timing) -> str:
    what = timing.problem or f"{timing.median_us:.1f} us, 99 % within {timing.low_us:.1f}..{timing.high_us:.1f}"
    return f"timed {timing.subject}:{timing.case_id}: {what}"


@app.command()
def compare(  # noqa: PLR0913 - typer turns parameters into options
    case_id: Annotated[str, typer.Argument(metavar="CASE", help="Case id; both sides must pass it.")],
    a: SideText,
    b: SideText,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Backend of a side that names none.")] = None,
    platform: PlatformName = None,
    plugin: Plugins = None,
    repeats: Annotated[int, typer.Option(min=1, help="Whole comparisons, each of fresh processes.")] = 1,
    most: Annotated[int, typer.Option(min=3, max=100, help="Rounds after which it gives up.")] = Design.most,
    resolution: Resolution = Design.resolution,
    blocks: Annotated[int, typer.Option(min=2, max=100, help="A B B A blocks of a round.")] = BLOCKS,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds for one answer of a child.")] = 300.0,
    graph: Annotated[bool, typer.Option(help="Replay a CUDA graph where the call can be captured.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every comparison with its raw times.")] = None,
) -> None:
    """Is B slower than A? Interleaved, on one device, in one session; a ratio with its confidence, or "cannot tell"."""
    case, device = Case.parse(case_id), device_of(platform or detected_platform())
    sides = side("A", a, backend, plugin or []), side("B", b, backend, plugin or [])
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs:
        contest = Contest(case, sides, device, Path(logs), limit, Design(resolution=resolution, most=most), blocks, graph=graph)
        contest.judge()
        for number in range(repeats):
            comparison, rounds = contest.run()
            found.append(_as_json(comparison, rounds))
            out.print(f"{number + 1}: {comparison.text}" if repeats > 1 else comparison.text, markup=False)
            if json_file is not None:
                _write(json_file, contest, found)
    _conditions(contest, found)


def side(name: str, given: list[str], backend: str | None, plugins: list[str]) -> Side:
    """A side from what the command line says of it; TimingError with what is missing."""
    folders = [text for text in given if Path(text).is_dir()]
    files = [text for text in given if text.endswith(".py")]
    names = [text for text in given if text not in (*folders, *files)]
    for text in names:
        if "/" in text:
            raise TimingError(f"--{name.lower()} {text}: no such folder; wanted a backend's name, a FILE.py or a folder")
    if len(names) > 1 or len(folders) > 1:
        raise TimingError(f"--{name.lower()}: one backend and one folder a side, got {', '.join((*names, *folders))}")
    all_plugins = tuple(absolute([*plugins, *files]))
    chosen = names[0] if names else backend or _only_backend(name, files)
    plan.known_backend(chosen, discover(all_plugins))
    return Side(chosen, all_plugins, str(Path(folders[0]).absolute()) if folders else "", f"{name} ({' '.join(given)})")


def _only_backend(name: str, files: list[str]) -> str:
    own = set(discover(absolute(files))) - set(discover()) if files else set()
    if len(own) != 1:
        raise TimingError(f"--{name.lower()} names no backend: give one, or --backend NAME for both sides")
    return own.pop()


def _as_json(comparison: Comparison, rounds: list[Measured]) -> dict[str, Any]:
    return {**asdict(comparison), "text": comparison.text, "measured": [asdict(r) for r in rounds]}


def _write(path: Path, contest: Contest, found: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    data = {
        "schema": 1,
        "case": contest.case.id,
        "made": run_info.now(),
        "revision": run_info.revision(),
        "design": asdict(contest.design),
        "sides": [
            {**asdict(s), "environment": e, "facts": f}
            for s, e, f in zip(contest.sides, contest.environments, contest.facts, strict=True)
        ],
        "calls": Counter(one["call"] for one in found),
        "comparisons": found,
    }
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data) + "\n")
    temporary.replace(path)


def _conditions(contest: Contest, found: list[dict[str, Any]]) -> None:
    """Of whom and how this is true, and what disturbed it."""
    for one, environment, facts in zip(contest.sides, contest.environments, contest.facts, strict=True):
        library = discover(one.plugins)[one.backend].library
        version = environment.get(library) or "of no known version"
        out.print(f"{one.name}: {one.backend}, {library} {version}, timed by {facts['method']}", markup=False)
    clocks = [r["clock"] for c in found for r in c["measured"]]
    held = sorted({reason for clock in clocks for reason in clock["throttled"]})
    low, high = min(c["sm_mhz"][0] for c in clocks), max(c["sm_mhz"][1] for c in clocks)
    if high:
        why = f"; held down: {', '.join(held)}" if held else ""
        out.print(f"SM clock {low}..{high} MHz{why}", markup=False)
    if len(found) > 1:
        tally = Counter(c["call"] for c in found)
        out.print("calls: " + ", ".join(f"{call} {count} of {len(found)}" for call, count in tally.items()), markup=False)


@app.command("power")
def power_(
    files: Annotated[list[Path], typer.Argument(help="What `compare --json` wrote.")],
    slowdown: Annotated[list[float] | None, typer.Option(help="B's true slowdown; repeatable; default 0, 0.02, 0.05.")] = None,
    trials: Annotated[int, typer.Option(min=100, help="Comparisons to simulate.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=1, help="The chance of this many right calls in a row is told.")] = 20,
    most: Annotated[int, typer.Option(min=3, max=100, help="Rounds after which it gives up.")] = Design.most,
    resolution: Resolution = Design.resolution,
) -> None:
    """What a comparison on this machine can see: calls simulated on the noise that recorded comparisons had."""
    noise = power.pool([r for file in files for r in recorded(file)])
    out.print(
        f"noise of {len(noise) // 2} pairs of processes: rms {100 * (sum(n * n for n in noise) / len(noise)) ** 0.5:.2f} %"
    )
    for true in slowdown or [0.0, 0.02, 0.05]:
        found = power.simulated(noise, true, Design(resolution=resolution, most=most), trials)
        shares = ", ".join(f"{call} {100 * found.share(call):.2f} %" for call in Call if call in found.calls)
        right = Call.SLOWER if true > 0 else Call.SAME
        chance = 100 * found.all_of(right, repeats)
        in_a_row = f"{repeats} of {repeats} say {right}: {chance:.1f} %"
        out.print(f"B slower by {100 * true:g} %: {shares}; {in_a_row}; {found.rounds:.1f} rounds", markup=False)


def recorded(path: Path) -> list[Round]:
    """The rounds of a file of comparisons; TimingError for anything else."""
    try:
        data = parse_json(regular(path, MAX_BYTES))
        if data["schema"] != 1:
            raise ValueError(f"schema {data['schema']!r:.80}, this moecheck reads 1")
        values = [r["values"] for c in data["comparisons"] for r in c["measured"]]
        return [((float(a), float(b)), (float(c), float(d))) for (a, b), (c, d) in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TimingError(
            f"{path}: not a file of comparisons ({error}); `moecheck latency compare --json FILE` writes one"
        ) from error
