"""The second phase of `moecheck run --latency`: times the production cases, or the named ones, that passed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from harness import config
from harness.backends.base import Device
from harness.case import Case
from harness.errors import TimingError
from harness.latency import record
from harness.latency.clocks import together
from harness.latency.compare import turn
from harness.latency.record import Timing
from harness.latency.statistics import summary
from harness.latency.timer import Side, Timer
from harness.latency.work import work
from harness.plan import Plan
from harness.select import Item
from harness.verdict import Status, Verdict
from reference.formats import get

SLOTS, FEWEST_SLOTS = 24, 8  # turns of a case; the 99 % interval of a median needs 8
BUDGET_S = 4.0  # what a case's turns may take together
TOO_GOOD = 1.05  # share of a ceiling above which a time is doubted: the ceilings are the best of ten


@dataclass
class Lane:
    """Times one item after another. ceilings: by dtype, measured once."""

    device: Device
    plugins: tuple[str, ...]
    logs: Path
    limit_s: float
    budget_s: float = BUDGET_S

    def __post_init__(self) -> None:
        self._ceilings: dict[str, dict[str, float]] = {}

    def time(self, item: Item) -> Timing:
        """The timing of one item; its problem where the kernel did not survive it."""
        case = Case.parse(item.case_id)
        side = Side(item.subject, self.plugins, name=item.subject)
        try:
            with Timer(side, self.device, self.logs, self.limit_s) as timer:
                timing = self._timed(case, timer)
        except TimingError as error:
            return Timing(item.case_id, item.subject, problem=str(error))
        return timing

    def _timed(self, case: Case, timer: Timer) -> Timing:
        timer.prepare(case, graph=True)
        facts = timer.wait()["timed"]
        warm = timer.ask({"latency": "warm"})["timed"]
        us, rotations = statistics.median(warm["us"]), facts["rotations"]
        calls = turn(us, rotations, self.device)
        turns = max(FEWEST_SLOTS, min(SLOTS, int(self.budget_s * 1e6 / (calls * us))))
        slots = [timer.slot(calls) for _ in range(turns)]
        found, clock = summary([times for times, _ in slots]), together(c for _, c in slots)
        notes = [*facts["notes"], *([] if warm["steady"] else ["the warm-up did not come to rest"])]
        notes += [f"the clock was held down: {', '.join(clock.throttled)}"] if clock.throttled else []
        notes += [] if clock.steady else [f"the clock went from {clock.sm_mhz[0]} to {clock.sm_mhz[1]} MHz"]
        timing = Timing(
            case.id,
            timer.side.backend,
            facts["fill"],
            facts["method"],
            **record.summarised(found),  # type: ignore[arg-type]
            steady=warm["steady"],
            rotations=rotations,
            flush_mib=facts["flush_mib"],
            sm_mhz=clock.sm_mhz,
            throttled=clock.throttled,
            ecc=clock.ecc,
            environment=timer.environment,
            notes=tuple(notes),
        )
        return self._shared(timing, case, facts["experts"], timer)

    def _shared(self, timing: Timing, case: Case, experts: float, timer: Timer) -> Timing:
        """With the work of the case and the share of what the card was measured to do."""
        least, dtype = work(case, experts), str(get(case.recipe.carrier).torch_dtype).removeprefix("torch.")
        if dtype not in self._ceilings:
            self._ceilings[dtype] = timer.ask({"latency": "ceilings", "dtype": dtype})["timed"]
        ceilings, seconds = self._ceilings[dtype], timing.median_us / 1e6
        shares = least.flops / seconds / ceilings["flops_per_s"], least.bytes / seconds / ceilings["bytes_per_s"]
        timing = replace(
            timing,
            flops=least.flops,
            bytes=least.bytes,
            flops_share=round(shares[0], 4),
            bytes_share=round(shares[1], 4),
            dtype=dtype,
            flops_per_s=ceilings["flops_per_s"],
            bytes_per_s=ceilings["bytes_per_s"],
        )
        quantised = get(case.recipe.acts).scaling is not None  # its products may run at twice the carrier's rate and more
        if shares[1] > TOO_GOOD or (shares[0] > TOO_GOOD and not quantised):
            doubt = "faster than a copy or a matrix product of this size was here: not all of it was done, or from a cache"
            timing = replace(timing, notes=(*timing.notes, doubt))
        return timing


def wanted(plan: Plan, case: Case) -> bool:
    """Is it named by --case, or of a production row of the plan's tier?"""
    if plan.request.cases or case.shape.tokens == 0:
        return case.shape.tokens > 0
    shape = case.shape
    for row in config.tier(plan.request.tier).production.get(plan.request.platform, ()):
        model = config.production(row.model)
        layer = (model.hidden, model.inter // row.tp, row.experts or model.experts, model.top_k)
        if case.op == "moe" and layer == (shape.hidden, shape.inter, shape.experts, shape.top_k):
            return True
    return False


def timed(plan: Plan, items: Iterable[Item]) -> list[Item]:
    """The items of these that are timed if they pass."""
    return [item for item in items if wanted(plan, Case.parse(item.case_id))]


def chosen(plan: Plan, verdicts: Iterable[Verdict]) -> list[Item]:
    """What of a run is timed: PASSED and wanted; of a case's fills the real one, if it is there."""
    found: dict[tuple[str, str], Item] = {}
    for verdict in sorted(verdicts, key=lambda v: Case.parse(v.case_id).fill != "real"):
        case = Case.parse(verdict.case_id)
        if verdict.status is Status.PASSED and wanted(plan, case):
            found.setdefault((case.vary(fill="real").id, verdict.subject), Item(case.id, verdict.subject))
    return list(found.values())


def run(lane: Lane, items: Iterable[Item], folder: Path, told: Callable[[Timing], None]) -> list[Timing]:
    """Time what the folder has no line of yet; every line there is."""
    done = record.read(folder)
    known = {Item(t.case_id, t.subject) for t in done}
    for item in items:
        if item not in known:
            timing = lane.time(item)
            record.append(folder, timing)
            told(timing)
            done.append(timing)
    return done


def table(timings: Iterable[Timing]) -> Table:
    """For people: times, their spread, and the share of the measured ceilings."""
    found = Table(title="latency", title_justify="left", header_style="bold")
    for name in ("case", "backend", "median us (99 %)", "p05..p95", "by", "of the matmul rate", "of the copy rate"):
        found.add_column(name, overflow="fold")
    for t in timings:
        if t.problem:
            found.add_row(t.case_id, t.subject, f"not timed: {t.problem}")
            continue
        interval, spread = f"{t.median_us:.1f} ({t.low_us:.1f}..{t.high_us:.1f})", f"{t.p05_us:.1f}..{t.p95_us:.1f}"
        shares = f"{100 * t.flops_share:.1f} % ({t.dtype})" if t.flops else "-", f"{100 * t.bytes_share:.1f} %"
        found.add_row(t.case_id, t.subject, interval, spread, t.method, *shares)
    return found
