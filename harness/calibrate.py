"""`python -m harness.calibrate`: right kernels on random cases, thousands of them. Every alarm is the judge's fault.

Subjects: the reference's recipes and every plain recipe, emulated in float32 with shuffled sums, each judged with its
roundings declared and (`?`) undeclared; and every backend that runs here. Per subject the mean of z**2 must be 1.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from harness import config
from harness.backends import discover
from harness.backends.base import CPU, Backend, Device, checked_probe
from harness.case import FILLS, SKEWS, Case, Recipe, Shape
from harness.checks import untrusted
from harness.compare import MEAN_Z2_SLACK, compare
from harness.device import detect
from harness.emulate import emulate
from harness.errors import UnknownName
from harness.inputs import make_inputs
from harness.oracle import expect
from harness.pipeline import Options, run
from harness.ratio import FALSE_ALARM, assumed_rounding
from harness.verdict import Comparison, Status
from reference.activation import ACTIVATIONS
from reference.formats import all_formats
from reference.recipes import RECIPES
from reference.rounding import Rounding
from reference.routing import RULES

MOST_TOKENS = 4096
# Multiply-adds of one GEMM: 15 ms on a core of 2020, all that is done with a case included; on a GPU,
# where launches count, not sums.
WORK = {"cpu": 1.5e6, "cuda": 2e7}
CHECKS = 1  # relations asked of a backend's case
EXPERT, DECODED = 1e5, 4  # what an expert in use, and one of its weights, cost besides, in multiply-adds
SIZES = (8, 16, 24, 32, 64, 72, 96, 128, 160, 192, 256, 384, 512)
EXPERTS = (1, 2, 4, 6, 8, 16, 17, 32, 33, 64, 128, 256)  # 17 and 33: 16 and 32 in groups, and a shared one
TOP_K = (1, 2, 3, 4, 6, 8, 10, 16)
EXACT = 0.2  # share of the exact fill: it has no statistics to calibrate
ERRORS = 4  # standard errors of a mean of z**2 beyond which it is off
REPORT = 5.0  # seconds between two lines of progress
console = Console(highlight=False, soft_wrap=True)
Judged = Comparison | str | None  # how a right kernel fared; how it died; None: it refuses, or the case is untrusted


@dataclass(frozen=True)
class Subject:
    """A right kernel: what it takes, and `judge(case, seed)`. `tight`: it is judged by declared roundings to something
    narrower than the fp32 accumulator, whose own error is only bounded from above."""

    name: str
    recipes: tuple[str, ...]
    judge: Callable[[Case, int], Judged]
    tight: bool
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    routings: tuple[str, ...] = tuple(RULES)


@dataclass
class Tally:
    """What was seen of one subject. worst: largest share of its limit; squares: sum of mean z**2 times independent."""

    tight: bool
    verdicts: int = 0
    untold: int = 0
    alarms: list[str] = field(default_factory=list)
    worst: float = 0.0
    squares: float = 0.0
    independent: float = 0.0

    def add(self, case: Case, seed: int, judged: Judged) -> str | None:
        """Count one verdict; the text of the alarm if it is one."""
        self.verdicts += judged is not None
        self.untold += judged is None
        text = judged if isinstance(judged, str) else None
        if isinstance(judged, Comparison):
            self._measure(judged)
            if not judged.agrees:
                numbers = f"worst {judged.worst:.3g} / {judged.limit:.3g}, mean z^2 {judged.mean_z2:.3f}"
                text = f"{judged.lane} lane, {judged.beyond} of {judged.total} beyond, {numbers}"
        if text is not None:
            self.alarms.append(f"{case.id} order {seed}: {text}")
        return self.alarms[-1] if text is not None else None

    def _measure(self, comparison: Comparison) -> None:
        if comparison.limit:
            self.worst = max(self.worst, comparison.worst / comparison.limit)
        if comparison.lane == "real" and math.isfinite(comparison.mean_z2):
            independent = _independent(comparison.mean_z2_limit)
            self.squares += comparison.mean_z2 * independent
            self.independent += independent

    @property
    def mean_z2(self) -> float:
        """Mean of z**2, each verdict weighted by its independent errors; NaN before the first."""
        return self.squares / self.independent if self.independent else math.nan

    @property
    def off(self) -> bool:
        """The mean of z**2 is not 1 (above 1, where sigma is an upper estimate), by more than the slack and chance."""
        distance = abs(self.mean_z2 - 1) if self.tight else self.mean_z2 - 1
        return distance > MEAN_Z2_SLACK + ERRORS * math.sqrt(2 / max(self.independent, 1e-9))


def _independent(limit: float) -> float:
    """`harness.compare.mean_z2_limit` inverted."""
    chance = (math.sqrt(1 + 2 * (limit - 1 - MEAN_Z2_SLACK)) - 1) / 2
    return -math.log(FALSE_ALARM) / chance**2


def subjects(backends: bool = True, device: Device = CPU) -> Iterator[Subject]:
    """Everything that can be right on this device: on a GPU the backends, on the CPU emulated kernels too."""
    if device.kind == "cpu":
        yield from _emulations()
    for backend in discover().values() if backends else ():
        here = backend.op == "moe" and device.arch in (backend.archs or (device.arch,))
        if here and checked_probe(backend, device).ok:
            planned = config.platform(device.arch).axes.recipe or backend.recipes
            for out, group in groupby(sorted((r for r in backend.recipes if r in planned), key=_out), _out):
                judge, routings = partial(_run, backend, device), backend.routings or tuple(RULES)
                yield Subject(f"{backend.name}_{out}", tuple(group), judge, out != "fp32", backend.activations, routings)


def _emulations() -> Iterator[Subject]:
    for recipe in RECIPES.values():
        yield from _emulated(recipe.name, recipe.rounding, _recipes(recipe.rounding))
    for name, fmt in all_formats().items():
        if fmt.scaling is None:
            texts = tuple(str(Recipe.parse(f"{weights}-{name}")) for weights in all_formats())
            yield from _emulated(f"plain_{name}", assumed_rounding(Recipe.parse(name)), texts)


def _out(recipe: str) -> str:
    return Recipe.parse(recipe).out


def _emulated(name: str, rounding: Rounding, recipes: tuple[str, ...]) -> Iterator[Subject]:
    yield Subject(name, recipes, partial(_emulate, rounding, rounding), rounding.out != "fp32")
    yield Subject(f"{name}?", recipes, partial(_emulate, rounding, None), False)


def _recipes(rounding: Rounding) -> tuple[str, ...]:
    """Recipe texts, one per weight format, whose activations and middle are what the rounding points make of them."""
    carrier = rounding.steps("out")[-1]
    acts, middle = ((rounding.steps(point) or (carrier,))[-1] for point in ("x", "middle"))
    return tuple(str(Recipe.parse(f"{weights}-{acts}-{middle}-{carrier}")) for weights in all_formats())


def _emulate(rounding: Rounding, declared: Rounding | None, case: Case, seed: int) -> Judged:
    inputs = make_inputs(case)
    expected = expect(case, inputs, declared)
    return None if untrusted(case, expected) else compare(expected, emulate(inputs, rounding, seed))


def _run(backend: Backend, device: Device, case: Case, seed: int) -> Judged:
    verdict = run(case, backend, device, options=Options(CHECKS))
    if verdict.status.skipped or verdict.status is Status.UNTRUSTED:
        return None
    return verdict.comparison if verdict.status is Status.PASSED else f"{verdict.status}: {verdict.reason}"


def draw(rng: random.Random, subject: Subject, work: float = WORK["cpu"]) -> Case:
    """A valid case that the subject's recipes, activations and routings allow, tokens log-uniform, within `work`."""
    while True:
        tokens, experts, top_k = int((MOST_TOKENS + 1) ** rng.random()), rng.choice(EXPERTS), rng.choice(TOP_K)
        shape = Shape(tokens, rng.choice(SIZES), rng.choice(SIZES), experts, top_k)
        recipe = Recipe.parse(rng.choice(subject.recipes))
        fill = FILLS[rng.random() > EXACT]
        names = rng.choice(subject.routings), rng.choice(subject.activations)
        case = Case("moe", shape, *names, recipe, fill, rng.choice(SKEWS), seed=rng.randrange(1 << 30))
        active = min(experts, tokens * top_k)
        cost = shape.hidden * shape.inter * (tokens * top_k + active * DECODED) + active * EXPERT
        if cost <= work and case.problem() is None:
            return case


def possible(subject: Subject) -> bool:
    """False where no case takes the subject's recipes yet."""
    shape = Shape(1, 512, 512, 1, 1)
    cases = (Case("moe", shape, "renormalize", "swiglu", Recipe.parse(text), "real") for text in subject.recipes)
    return any(case.problem() is None for case in cases)


def calibrate(verdicts: int, seed: int, backends: bool = True, device: Device = CPU, only: str = "") -> dict[str, Tally]:
    """Judge right kernels `verdicts` times, the subjects whose name holds `only` in turn, and say what happens meanwhile."""
    rng, everybody = random.Random(seed), [s for s in subjects(backends, device) if only in s.name]
    able = [s for s in everybody if possible(s)]
    if not able:
        raise UnknownName("subject", only, [s.name for s in subjects(backends, device)])
    if skipped := sorted({s.name.rstrip("?") for s in everybody if s not in able}):
        console.print(f"no case takes these yet: {', '.join(skipped)}")
    tallies = {subject.name: Tally(subject.tight) for subject in able}
    started = told = time.monotonic()
    done = 0
    for number in range(verdicts):
        subject = able[number % len(able)]
        case = draw(rng, subject, WORK[device.kind])
        alarm = tallies[subject.name].add(case, number, subject.judge(case, number))
        done += 1
        if alarm is not None:
            console.print(f"ALARM {subject.name}: {alarm}")
        if time.monotonic() - told > REPORT:
            told = time.monotonic()
            console.print(f"{done} of {verdicts}, {done / (told - started):.0f} a second, {_alarms(tallies)} alarms")
    console.print(f"{done} drawn in {time.monotonic() - started:.0f} s")
    return tallies


def _alarms(tallies: dict[str, Tally]) -> int:
    return sum(len(tally.alarms) for tally in tallies.values())


def table(tallies: dict[str, Tally]) -> Table:
    """One line per subject."""
    columns = ("subject", "verdicts", "untrusted or refused", "alarms", "worst / limit", "mean z^2", "+-", "independent errors")
    shown = Table(*columns)
    for name, t in tallies.items():
        mean = f"{t.mean_z2:.3f}{'' if t.tight else ' (upper)'}{' OFF' if t.off else ''}" if t.independent else ""
        error = f"{math.sqrt(2 / t.independent):.3f}" if t.independent else ""
        counts = (str(n) for n in (t.verdicts, t.untold, len(t.alarms)))
        shown.add_row(name, *counts, f"{t.worst:.2f}", mean, error, f"{t.independent:.3g}")
    return shown


def main(
    verdicts: Annotated[int, typer.Option(help="How many right kernels to judge.")] = 2000,
    seed: Annotated[int, typer.Option(help="Decides every case and every order of summation.")] = 0,
    backends: Annotated[bool, typer.Option(help="Also judge the backends that run on this device.")] = True,
    recipe: Annotated[str, typer.Option(help="Only subjects with this in their name.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Exit 1 if a right kernel raised an alarm, or a subject's mean of z**2 is off."""
    torch.set_num_threads(1)
    tallies = calibrate(verdicts, seed, backends, detect(), recipe)
    console.print(table(tallies))
    off = [name for name, tally in tallies.items() if tally.off]
    console.print(f"{sum(t.verdicts for t in tallies.values())} verdicts, {_alarms(tallies)} alarms; mean z^2 off: {off}")
    if json_file is not None:
        figures = {name: {**asdict(t), "mean_z2": t.mean_z2 if t.independent else None} for name, t in tallies.items()}
        json_file.write_text(json.dumps({"verdicts": verdicts, "seed": seed, "subjects": figures}, indent=1) + "\n")
    raise typer.Exit(int(bool(off) or _alarms(tallies) > 0))


if __name__ == "__main__":
    typer.run(main)
