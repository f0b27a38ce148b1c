"""Runs that nobody made, for self-tests and the benchmark: kernels that are right, errors drawn anew with each release."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from harness import run_info
from harness.case import Case
from harness.journal import NAME
from harness.run_info import RunInfo
from harness.select import Item
from harness.verdict import Comparison, Stage, Status, Verdict

BEGAN = datetime(2026, 1, 1, 3, tzinfo=UTC)
RECIPES = {
    "torch_grouped_mm": ("bf16",),
    "onnxruntime_moe": ("fp32", "int8_channel-fp32", "int4_channel-fp32"),
    "triton_moe": ("fp16", "nvfp4-fp16", "mxfp4-fp16"),
}
LIBRARIES = {"torch_grouped_mm": "torch", "onnxruntime_moe": "onnxruntime", "triton_moe": "triton"}
INDEPENDENT = 400.0  # errors in a case of the real lane: 33 tokens of hidden 256 have some hundreds


@dataclass(frozen=True)
class Night:
    """One run of a history, the `number`th day. versions: library -> version; revision: moecheck's commit."""

    number: int
    versions: dict[str, str]
    revision: str
    platform: str = "cpu"
    tier: str = "nightly"

    @property
    def started(self) -> datetime:
        """A day after the one before."""
        return BEGAN + timedelta(days=self.number)

    def info(self, verdicts: int) -> RunInfo:
        """Its run.json."""
        started, finished = (t.isoformat(timespec="seconds") for t in (self.started, self.started + timedelta(minutes=9)))
        return RunInfo(started, self.platform, self.tier, f"{verdicts:016x}", finished, 540.0, revision=self.revision)


Change = Callable[[Night, Verdict], Verdict | None]


def items(count: int) -> list[Item]:
    """`count` different items, of the subjects and recipes in turn."""
    cells = [(subject, recipe) for subject, recipes in RECIPES.items() for recipe in recipes]
    sizes = ((t, fill) for t in itertools.count(1) for fill in ("real", "exact"))
    texts = (f"t{t}.h64.i32.e4.k2.renormalize.swiglu.standard.{fill}.s0" for t, fill in sizes for _ in cells)
    endless = zip(itertools.cycle(cells), texts, strict=False)
    return [Item(f"moe.{recipe}.{text}", subject) for (subject, recipe), text in itertools.islice(endless, count)]


def verdict(item: Item, night: Night) -> Verdict:
    """A pass. Its errors depend on the item and the library's version, its seconds on the run too."""
    library = LIBRARIES[item.subject]
    version = night.versions[library]
    drawn = random.Random(f"{item} {version}")
    real = Case.parse(item.case_id).fill == "real"
    mean = max(0.1, drawn.gauss(1, (2 / INDEPENDENT) ** 0.5)) if real else 0.0
    rel = 0.004 * random.Random(str(item)).uniform(0.5, 2) * mean**0.5
    environment = {"python": "3.12.3", "torch": night.versions["torch"], "arch": "cpu", "device": "x86_64", library: version}
    lane, worst, limit = ("real", drawn.uniform(2, 4), 6.3) if real else ("exact", 0.0, 0.0)
    compared = Comparison(lane, 2048, 0, worst, limit, mean, 2.0, rel, 0, 0, (), (), INDEPENDENT)
    seconds = round(random.Random(str(item)).uniform(0.01, 0.2) * random.Random(f"{item} {night.number}").uniform(0.8, 1.3), 4)
    return Verdict(item.case_id, item.subject, Status.PASSED, Stage.DONE, "", (), compared, None, environment, seconds)


def failed(right: Verdict, status: Status = Status.WRONG, reason: str = "zeros: all of them") -> Verdict:
    """The same case, failing."""
    return replace(right, status=status, reason=reason, comparison=None)


def verdicts(night: Night, planned: Iterable[Item], change: Change | None = None) -> list[Verdict]:
    """The run's verdicts; `change` may replace each, or leave it out with None."""
    found = (verdict(item, night) for item in planned)
    return [v for v in (one if change is None else change(night, one) for one in found) if v is not None]


def write(folder: Path, night: Night, found: Iterable[Verdict]) -> Path:
    """A run folder: run.json and journal.jsonl, as moecheck run leaves them."""
    folder.mkdir(parents=True)
    lines = [json.dumps(v.to_json(), allow_nan=False) + "\n" for v in found]
    (folder / NAME).write_text("".join(lines))
    run_info.write(folder, night.info(len(lines)))
    return folder
