"""A verdict in words."""

from __future__ import annotations

from harness.known import Outcome, outcome
from harness.verdict import Comparison, Verdict


def line(verdict: Verdict) -> str:
    """One line per verdict, for logs."""
    note = statistics(verdict.comparison) if outcome(verdict) is Outcome.GREEN and verdict.comparison else verdict.reason
    known = f" [known: {verdict.known}]" if verdict.known else ""
    return f"{verdict.status:<13} {verdict.subject:<18} {verdict.case_id}  {verdict.seconds:.2f} s  {note:.160}{known}"


def statistics(comparison: Comparison) -> str:
    """The numbers of a comparison against their limits."""
    if comparison.total == 0:
        return "no tokens: shape and dtype only"
    if comparison.lane == "exact":
        return f"{comparison.total - comparison.beyond} of {comparison.total} elements bitwise equal"
    if comparison.lane == "ratio":
        limit = f"limit {comparison.limit:.2f}), rel-L2 {comparison.rel_l2:.2e}"
        return f"worst tile errs {comparison.worst:.3g} times as an emulation does ({limit}"
    mean = f"mean z^2 {comparison.mean_z2:.3f} <= {comparison.mean_z2_limit:.2f}"
    return f"worst z {comparison.worst:.2f} <= {comparison.limit:.2f}, {mean}, rel-L2 {comparison.rel_l2:.2e}"


def explain(verdict: Verdict) -> str:
    """Everything a person needs about one verdict, ending in the line that reproduces it."""
    lines = []
    if outcome(verdict) is Outcome.GONE:
        lines.append(f"known issue {verdict.known} no longer fails: remove it from configs/known_issues.yaml")
    lines += [f"{verdict.status} {verdict.subject} on {verdict.case_id} (stage {verdict.stage}, {verdict.seconds:.2f} s)"]
    if outcome(verdict) is Outcome.KNOWN:
        lines.append(f"  known issue {verdict.known}, which a run excuses: moecheck known says what it is")
    if verdict.reason:
        lines.append(f"  {verdict.reason}")
    lines += [f"  {finding.check}: {finding.text}" for finding in verdict.findings if finding.text not in verdict.reason]
    if verdict.diagnosis is not None and verdict.diagnosis.text not in verdict.reason:
        lines.append(f"  looks like {verdict.diagnosis.kind}: {verdict.diagnosis.text}")
    if verdict.comparison is not None:
        lines += _comparison(verdict.comparison)
    for finding in verdict.findings:
        if output := str(finding.evidence.get("output", "")).strip():
            lines += ["  last output of the process:", *(f"    | {text}" for text in output.splitlines())]
    lines += [f"  note, {note.check}: {note.text}" for note in verdict.notes]
    if verdict.picture:
        lines.append(f"  picture: {verdict.picture} in the run folder")
    facts = ", ".join(f"{key} {value}" for key, value in verdict.environment.items() if value)
    return "\n".join([*lines, f"  on: {facts}", f"  rerun: {verdict.rerun}"])


def _comparison(comparison: Comparison) -> list[str]:
    bound = (
        statistics(comparison)
        if comparison.agrees or comparison.lane in ("exact", "ratio")
        else (
            f"worst z {comparison.worst:.3g} (limit {comparison.limit:.2f}), mean z^2 {comparison.mean_z2:.3g} "
            f"(limit {comparison.mean_z2_limit:.2f}), rel-L2 {comparison.rel_l2:.2e}"
        )
    )
    lines = [f"  {comparison.lane} lane: {bound}"]
    if comparison.rows_hit:
        experts = f"; experts all of whose tokens are hit: {list(comparison.experts_hit)}" if comparison.experts_hit else ""
        lines.append(f"  {comparison.beyond} of {comparison.total} elements in {comparison.rows_hit} rows{experts}")
    for sample in comparison.samples:
        place = f"token {sample.token}, column {sample.column}"
        lines.append(f"    {place}: expected {sample.expected:.6g}, got {sample.got:.6g}, z {sample.z:.3g}")
    return lines
