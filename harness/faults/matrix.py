"""The kill matrix for people and programs: a table, JSON, and the page in docs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from harness.diagnose import KINDS
from harness.faults.campaign import CleanRun
from harness.faults.score import LANES, Score

# The rules shown beside ours, one of each family; --json has them all.
SHOWN = {
    "flashinfer_fp8_block": "FlashInfer 79 %",
    "flashinfer_dpsk": "FlashInfer 85 %",
    "vllm_cutedsl_masked": "vLLM 0.2",
    "vllm_modular": "vLLM 0.03",
    "deepgemm_fp8": "calc_diff",
    "torch_same": "torch same()",
    "triton_kernels": "triton_kernels",
}


def table(scores: Sequence[Score]) -> Table:
    """Fault x lane: verdicts of each lane that rejected it, when the first kill came, and what it was called."""
    found = Table(header_style="bold", title="kills by lane")
    found.add_column("fault", overflow="fold")
    for lane in LANES:
        found.add_column(lane, justify="right")
    for name in ("killed", "first after", "called"):
        found.add_column(name, justify="right")
    for s in scores:
        cells = [str(s.killed[lane] or "") for lane in LANES]
        color = "green" if s.kills else "red"
        first = f"{s.after} ({s.seconds:.1f} s)" if s.kills else "-"
        called = called_as(s)
        found.add_row(f"[{color}]{s.fault.name}[/{color}]", *cells, f"{s.kills}/{s.verdicts}", first, called)
    return found


def called_as(score: Score) -> str:
    """The commonest name, marked where it is not among the true ones."""
    if not score.names:
        return ""
    name = score.names.most_common(1)[0][0]
    true = name in score.fault.expect or name not in KINDS
    return name if true else f"{name} (wrong)" if name in score.lies else f"{name} (?)"


def summary(scores: Sequence[Score], runs: Sequence[CleanRun]) -> list[str]:
    """The score in sentences."""
    killed = [s for s in scores if s.kills]
    named = [s for s in killed if s.named]
    lying = [s.fault.name for s in killed if s.lies]
    verdicts, alarms = sum(len(r.judged) for r in runs), sum(len(r.alarms) + len(r.pools) for r in runs)
    lines = [f"{len(killed)} of {len(scores)} planted faults killed ({len(killed) / max(1, len(scores)):.1%})"]
    if killed:
        seconds = statistics.median(s.seconds for s in killed)
        lines.append(f"first kill after {statistics.median(s.after for s in killed):.0f} verdicts, {seconds:.2f} s (median)")
        lines.append(
            f"named truthfully: {len(named)} of {len(killed)} killed ({len(named) / len(killed):.0%}); wrongly: {len(lying)}"
        )
    lines += [f"  named wrongly: {s.fault.name}: {kind} in {case}" for s in killed for kind, case in s.lies.items()]
    lines += [f"  survived: {s.fault.name}: {s.fault.text}" for s in scores if not s.kills]
    if strays := [(s.fault.name, text) for s in scores for text in s.strays]:
        lines.append(f"{len(strays)} deaths did not come again and count for nothing, e.g. {strays[0][0]}: {strays[0][1]}")
    lines.append(f"clean subjects: {verdicts} verdicts, {alarms} alarms")
    for rule, title in SHOWN.items():
        caught = sum(s.caught_by(rule) for s in scores)
        refused = sum(r.refused_by(rule) for r in runs)
        lines.append(f"{title} on the same outputs: {caught} of {len(scores)}; it refuses {refused} of {verdicts} right ones")
    lines += [f"  alarm: {v.status} {v.subject} {v.case_id}: {v.reason}" for run in runs for v in run.alarms]
    lines += [f"  alarm: {pool.subject}: {pool}" for run in runs for pool in run.pools]
    return lines


def as_json(scores: Iterable[Score], runs: Iterable[CleanRun]) -> dict[str, Any]:
    """planted, killed, clean_alarms, clean_verdicts, then the matrix: one entry a fault."""
    scores, runs = list(scores), list(runs)
    matrix = [
        {
            "fault": s.fault.name,
            "bug": s.fault.bug,
            "thread": s.fault.thread,
            "mechanism": s.fault.text,
            "clean": s.fault.clean.name,
            "verdicts": s.verdicts,
            "kills": s.kills,
            "lanes": {lane: s.killed[lane] for lane in LANES if s.killed[lane]},
            "first": s.first,
            "after": s.after,
            "seconds": round(s.seconds, 3),
            "names": dict(s.names.most_common()),
            "expected": list(s.fault.expect),
            "outputs": s.outputs,
            "rejected_by": dict(s.rejected),
            "named": s.named,
            "wrong_names": s.lies,
            "strays": s.strays,
        }
        for s in scores
    ]
    return {
        "planted": len(scores),
        "killed": sum(bool(s.kills) for s in scores),
        "clean_alarms": sum(len(r.alarms) + len(r.pools) for r in runs),
        "clean_verdicts": sum(len(r.judged) for r in runs),
        "matrix": matrix,
    }


def markdown(scores: Sequence[Score], runs: Sequence[CleanRun], command: str) -> str:
    """The page: how it was made, the sentences, the matrix with a link to every bug's thread."""
    lines = [
        "# Planted bugs and what catches them",
        "",
        f"Made by `{command}`. One row is one real bug, planted with its mechanism;",
    ]
    lines += ["numbers are verdicts of that lane that rejected it before the run moved on to the next fault.", ""]
    lines += [f"- {text}" for text in summary(scores, runs)]
    header = ["bug", "mechanism", *LANES, "first kill", "called", *SHOWN.values()]
    lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for s in scores:
        cells = [f"[{s.fault.bug}]({s.fault.thread})", s.fault.text.replace("|", "\\|")]
        cells += [str(s.killed[lane] or "") for lane in LANES]
        cells += [f"verdict {s.after}, {s.seconds:.1f} s" if s.kills else "**survived**", called_as(s)]
        cells += ["red" if s.caught_by(rule) else "green" for rule in SHOWN]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
