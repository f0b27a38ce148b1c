"""A verdict as a flat row: what history asks of it, without what only a reader of one failure wants. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from harness.case import Case
from harness.executed import ran
from harness.known import outcome
from harness.reading import printable
from harness.verdict import Verdict

SCHEMA = 1
TEXT = 500  # characters of a reason that are kept: the journal has the rest
COLUMNS = {
    **dict.fromkeys(("run", "identity", "started", "dated", "platform", "tier", "plan", "shard", "code"), "VARCHAR"),
    **dict.fromkeys(("case_id", "subject", "recipe", "activation_format", "arch", "device", "library"), "VARCHAR"),
    **dict.fromkeys(("versions", "status", "outcome", "known", "reason", "replay", "lane"), "VARCHAR"),
    "ran": "BOOLEAN",
    "failed": "BOOLEAN",
    **dict.fromkeys(("seconds", "worst", "mean_z2", "rel_l2", "independent"), "DOUBLE"),
    "schema": "INTEGER",
}  # name -> DuckDB's type
NO_LIBRARY = ("python", "arch", "device", "driver", "cuda", "sanitizer")


@dataclass(frozen=True)
class Run:
    """What all verdicts of a run share. id: the folder's name; identity: the same for two copies of one run, also where one is
    longer; started: UTC, ISO 8601 with seconds; dated: "run.json", or "mtime" where only the journal's file says when; shard:
    "i/n" or ""; code: moecheck's version and commit."""

    id: str
    identity: str
    started: str
    dated: str
    platform: str
    tier: str
    plan: str
    shard: str
    code: str


def row(verdict: Verdict, run: Run) -> dict[str, Any]:
    """A value for each of COLUMNS. None for a number that is not finite; strings without what cannot be encoded."""
    case, environment, compared = Case.parse(verdict.case_id), verdict.environment, verdict.comparison
    arch = environment.get("arch") or run.platform
    data: dict[str, Any] = {name: value for name, value in vars(run).items() if name != "id"}
    data |= {"run": run.id, "platform": run.platform or arch, "case_id": verdict.case_id, "subject": verdict.subject}
    data |= {"recipe": str(case.recipe), "activation_format": case.activation_format, "arch": arch}
    data |= {"device": environment.get("device", ""), "library": library(environment)}
    data |= {"versions": json.dumps(environment, sort_keys=True) if environment else ""}
    data |= {"status": str(verdict.status), "outcome": str(outcome(verdict)), "known": verdict.known}
    data |= {"reason": verdict.reason[:TEXT], "replay": replay(verdict), "lane": compared.lane if compared else ""}
    data |= {"ran": ran(verdict), "failed": verdict.status.failed, "seconds": verdict.seconds, "schema": SCHEMA}
    for name in ("worst", "mean_z2", "rel_l2", "independent"):
        value = None if compared is None else float(getattr(compared, name))
        data[name] = value if value is not None and abs(value) < float("inf") else None
    return {
        name: value if not isinstance(value, str) or value.isprintable() else printable(value) for name, value in data.items()
    }


def library(environment: dict[str, str]) -> str:
    """The library under test and its version: the last entry that is no fact of the machine (harness/device.py)."""
    named = [f"{name} {version}".rstrip() for name, version in environment.items() if name not in NO_LIBRARY]
    return named[-1] if named else ""


def replay(verdict: Verdict) -> str:
    """What fresh children said of a death (harness/worker/replay.py): "alone" it dies in one too; "after" others only; "open"
    where the budget ended before that was known; "vanished" where it did not happen again; "" where nobody asked."""
    for finding in verdict.findings:
        if finding.check == "replay":
            if "after" in finding.evidence:
                return "after" if finding.evidence["after"] else "alone"
            return "vanished" if finding.text.startswith("did not happen again") else "open"
    return ""
