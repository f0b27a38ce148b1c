"""latency.jsonl: one line a timed case and subject, appended and fsynced like the journal; never read by the judge.

Fields of a line, in its order (`Timing`): schema; case_id, subject: as in the journal; fill: of the data that was timed
("real", dense, also where the verdict is of another fill); method: graph, events or clock (measure.py); calls; median_us,
low_us, high_us: median of all calls and its 99 % interval; p05_us, p95_us: percentiles; steady: did the warm-up come to rest;
flops, bytes: the least the case must do (work.py); flops_share, bytes_share: achieved share of the ceilings, a matrix product
in `dtype` and a copy, measured in the same run: flops_per_s, bytes_per_s; rotations, flush_mib: steps in turn, memory read
between calls; sm_mhz: lowest and highest clock seen; throttled: why the clock was held down; ecc: uncorrected memory errors,
-1 unknown; environment: as in a verdict; notes; problem: why there is no time, every number is 0 then.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from harness.errors import TimingError
from harness.latency.statistics import Summary
from harness.reading import parse_json, printable, regular

NAME = "latency.jsonl"
SCHEMA = 1
MAX_BYTES = 1 << 28  # two KiB a line


@dataclass(frozen=True)
class Timing:
    """See the head of this file."""

    case_id: str
    subject: str
    fill: str = ""
    method: str = ""
    calls: int = 0
    median_us: float = 0.0
    low_us: float = 0.0
    high_us: float = 0.0
    p05_us: float = 0.0
    p95_us: float = 0.0
    steady: bool = True
    flops: float = 0.0
    bytes: float = 0.0
    flops_share: float = 0.0
    bytes_share: float = 0.0
    dtype: str = ""
    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0
    rotations: int = 0
    flush_mib: int = 0
    sm_mhz: tuple[int, int] = (0, 0)
    throttled: tuple[str, ...] = ()
    ecc: int = -1
    environment: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problem: str = ""
    schema: int = SCHEMA

    @property
    def share(self) -> float:
        """Of the ceiling that bounds this case: the larger one. Above 1, not all of the work was done, or not cold."""
        return max(self.flops_share, self.bytes_share)


_TYPED = TypeAdapter(Timing)


def summarised(summary: Summary) -> dict[str, float]:
    """Its numbers as a line has them."""
    return {name: round(value, 3) for name, value in asdict(summary).items()}


def append(folder: Path, timing: Timing) -> None:
    """Write and fsync one line, after what a kill left of another."""
    path = folder / NAME
    line = (json.dumps({"schema": SCHEMA, **asdict(timing)}, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab") as file:
            if (size := path.stat().st_size) and (whole := _whole(path)) < size:
                os.truncate(path, whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TimingError(f"{path}: cannot be written: {error.strerror}") from error


def _whole(path: Path) -> int:
    return regular(path, MAX_BYTES).rfind(b"\n") + 1


def read(folder: Path) -> list[Timing]:
    """The lines of a run folder, none where nothing was timed; a last line without its end does not count. TimingError with
    file and line for anything that is none."""
    path = folder / NAME
    try:
        data = regular(path, MAX_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise TimingError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            timing = _TYPED.validate_python(parse_json(line))
            if timing.schema != SCHEMA:
                raise ValueError(f"schema {timing.schema}, this moecheck reads {SCHEMA}")
        except (ValueError, ValidationError) as error:
            text = printable(str(error))[:500]
            raise TimingError(f"{path}:{number}: not a timing: {text}; delete the line and the case is timed again") from error
        found.append(timing)
    return found
