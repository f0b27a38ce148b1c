"""What a judgement says: statuses, findings, and the one line that reproduces it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from types import NoneType
from typing import Any

SCHEMA_VERSION = 1


class Status(StrEnum):
    """Only PASSED is green; UNSUPPORTED and UNAVAILABLE are skips decided before launch; the rest fail."""

    PASSED = "PASSED"
    WRONG = "WRONG"  # values: beyond the derived bound, not bitwise equal where that is due, or not finite
    MALFORMED = "MALFORMED"  # not the tensor that was promised: shape, dtype, type
    UNSTABLE = "UNSTABLE"  # the result depends on what ran before, on memory nobody wrote, or on nothing (a race)
    CORRUPTING = "CORRUPTING"  # wrote where it must not: an input, beside a buffer, an earlier result
    CRASHED = "CRASHED"  # exception after saying yes, signal, abort, exit
    HUNG = "HUNG"  # did not answer within the time limit
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    CONTRACT = "CONTRACT"  # the library's signature or return value is not what the backend was written for
    UNSUPPORTED = "UNSUPPORTED"  # refused in advance: this backend does not do this case
    UNAVAILABLE = "UNAVAILABLE"  # refused in advance: library or hardware is not here
    UNTRUSTED = "UNTRUSTED"  # nothing was really tested: a wrong kernel would have passed this case too

    @property
    def skipped(self) -> bool:
        """True for the two refusals in advance."""
        return self in (Status.UNSUPPORTED, Status.UNAVAILABLE)

    @property
    def failed(self) -> bool:
        """True for everything that is neither PASSED nor a skip."""
        return self is not Status.PASSED and not self.skipped


class Stage(StrEnum):
    """How far the case came."""

    SUPPORT = "support"
    INPUTS = "inputs"
    ORACLE = "oracle"
    PREPARE = "prepare"
    LAUNCH = "launch"
    COMPARE = "compare"
    RELATIONS = "relations"
    DONE = "done"


@dataclass(frozen=True)
class Sample:
    """One bad element. z is |got - expected| / sigma, inf where bits were due."""

    token: int
    column: int
    expected: float
    got: float
    z: float


@dataclass(frozen=True)
class Comparison:
    """Expected against got. `beyond` elements are outside the bound; worst is the largest z (or the count of differing
    bits' error in units of sigma in the exact lane, or the largest ratio of a tile); mean_z2 the mean of z**2;
    rel_l2 = |got - expected| / |expected|; independent: errors that mean_z2 is the mean of, 0 where nobody counted."""

    lane: str
    total: int
    beyond: int
    worst: float
    limit: float
    mean_z2: float
    mean_z2_limit: float
    rel_l2: float
    nonfinite: int
    rows_hit: int
    experts_hit: tuple[int, ...]
    samples: tuple[Sample, ...] = ()
    independent: float = 0.0

    @property
    def agrees(self) -> bool:
        """True iff the output is as close as a right kernel's."""
        return self.beyond == 0 and self.nonfinite == 0 and self.mean_z2 <= self.mean_z2_limit


@dataclass(frozen=True)
class Finding:
    """One failed check with its evidence."""

    check: str
    text: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """What the error looks like. kind: a name of harness.diagnose.KINDS, "unexplained" when no pattern fits; explained: the
    share of the error's norm that this pattern predicts, 0 where it predicts none; evidence: what was found, plain data."""

    kind: str
    text: str
    explained: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The judgement of one case on one subject. `comparison` and `diagnosis` are set only when something was compared;
    `rules`, where asked for: acceptance rule in use elsewhere -> would it have accepted this output; picture: path of the
    error's heat map, relative to the run folder, where one was drawn; notes: what is worth telling and fails nobody; returned:
    entry point of the library -> what its first call returned (`harness.returned.form`), where the library itself ran."""

    case_id: str
    subject: str
    status: Status
    stage: Stage
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    comparison: Comparison | None = None
    diagnosis: Diagnosis | None = None
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    known: str = ""
    picture: str = ""
    plugins: tuple[str, ...] = ()
    rules: dict[str, bool] = field(default_factory=dict)
    notes: tuple[Finding, ...] = ()
    returned: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status is Status.PASSED and (self.comparison is None or not self.comparison.agrees or self.findings):
            raise ValueError(f"{self.case_id}: PASSED needs a comparison that agrees and no findings")
        if self.status.skipped and not self.reason:
            raise ValueError(f"{self.case_id}: {self.status} needs a reason")

    @property
    def rerun(self) -> str:
        """The shell line that judges this case again."""
        if ranks := self.environment.get("ranks"):
            return self._rerun_on(ranks)
        plugins = "".join(f" --plugin {shlex.quote(p)}" for p in self.plugins)
        platform = f" --platform {shlex.quote(arch)}" if (arch := self.environment.get("arch")) else ""
        after = "".join(f" --after {shlex.quote(str(item))}" for f in self.findings for item in f.evidence.get("after", ()))
        tool = f" --sanitizer {shlex.quote(tool)}" if (tool := self.environment.get("sanitizer")) else ""
        return f"moecheck repro {self.case_id} --backend {shlex.quote(self.subject)}{plugins}{platform}{after}{tool}"

    def _rerun_on(self, ranks: str) -> str:
        """On so many ranks, where the subject is BACKEND_epN."""
        backend = self.subject.rpartition("_ep")[0]
        plugins = "".join(f" --plugin {shlex.quote(p)}" for p in self.plugins)
        platform = f" --platform {arch}" if (arch := self.environment.get("arch")) else ""
        host = f" --host {host}" if (host := self.environment.get("host")) else ""
        return f"moecheck parallel --ranks {ranks} --case {self.case_id} --backend {backend}{plugins}{platform}{host}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, `from_json` inverts it; carries the rerun line for readers without moecheck."""
        return {**_plain(self), "rerun": self.rerun}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        """KeyError, TypeError or ValueError if `data` is not a verdict of this schema."""
        if data.get("schema") != SCHEMA_VERSION:
            raise ValueError(f"verdict schema {data.get('schema')!r}, this moecheck reads {SCHEMA_VERSION}")
        fields = {k: v for k, v in data.items() if k != "rerun"}
        if comparison := fields.get("comparison"):
            samples = tuple(Sample(**_numbers(s)) for s in comparison["samples"])
            hit = tuple(comparison["experts_hit"])
            fields["comparison"] = Comparison(**{**_numbers(comparison), "samples": samples, "experts_hit": hit})
        if diagnosis := fields.get("diagnosis"):
            fields["diagnosis"] = Diagnosis(**diagnosis)
        for name in ("findings", "notes"):
            fields[name] = tuple(Finding(**f) for f in fields.get(name, ()))
        fields["plugins"] = tuple(fields["plugins"])
        fields["status"], fields["stage"] = Status(fields["status"]), Stage(fields["stage"])
        return cls(**fields)


def _plain(value: Any) -> Any:
    """What asdict makes of it, without its deep copies: half the time of writing a journal. JSON has no inf and no nan: a
    field's travel as the strings "inf", "-inf", "nan"."""
    if isinstance(value, (str, int, float, NoneType)):
        return value
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    if not is_dataclass(value):
        return value
    found = ((name, getattr(value, name)) for name in value.__dataclass_fields__)
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else _plain(v) for k, v in found}


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if v in ("inf", "-inf", "nan") else v for k, v in data.items()}
