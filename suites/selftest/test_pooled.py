"""The mean of z**2 over many cases: quiet for right kernels, red for a rounding too many that no case shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch

from harness.case import Case
from harness.compare import mean_z2_limit
from harness.faults.campaign import CleanRun
from harness.faults.catalogue import FAULTS
from harness.faults.score import Score, score
from harness.pooled import alarms, pools
from harness.report import junit
from harness.select import Item
from harness.verdict import Comparison, Stage, Status, Verdict

CASES = [
    Case.parse(f"moe.bf16.t{t}.h64.i32.e4.k{k}.renormalize.swiglu.standard.real.s{s}")
    for t in (1, 4, 33)
    for k in (1, 2, 3, 4)
    for s in range(4)
]
ERRORS = 200  # independent ones in a small case


def verdict(case: Case, mean_z2: float, subject: str = "sut", errors: float = ERRORS) -> Verdict:
    comparison = Comparison("real", 64, 0, 3.0, 6.0, mean_z2, mean_z2_limit(errors), 0.0, 0, 0, (), (), errors)
    return Verdict(case.id, subject, Status.PASSED, Stage.DONE, comparison=comparison)


def drawn(seed: int, excess: float = 1.0) -> list[Verdict]:
    """A kernel whose errors are normal; those of top_k 3 and 4 have `excess` times the variance."""
    z = torch.randn(len(CASES), ERRORS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = z.square().mean(-1).tolist()
    return [verdict(c, mean * (excess if c.shape.top_k > 2 else 1.0)) for c, mean in zip(CASES, means, strict=True)]


def test_normal_errors_raise_no_alarm() -> None:
    """A pool for every level of every axis: fifty plans of 48 cases."""
    assert not any(alarms(drawn(seed)) for seed in range(50))
    assert max(p.mean_z2 for p in pools(drawn(0))) > 1  # half of them err on this side


def test_a_rounding_too_many_shows_in_the_pool_and_in_no_case() -> None:
    verdicts = drawn(1, excess=1.3)
    assert all(v.comparison is not None and v.comparison.agrees for v in verdicts)
    (found,) = alarms(verdicts)
    assert "precision" in str(found)


def test_a_pool_holds_one_subject_and_only_what_passed() -> None:
    good, bad = [verdict(c, 1.0, "good") for c in CASES], [verdict(c, 1.35, "bad") for c in CASES]
    assert [p.subject for p in alarms(good + bad)] == ["bad"]
    assert not alarms([replace(v, status=Status.UNSTABLE) for v in bad])


def test_the_alarm_of_a_pool_reaches_ci(tmp_path: Path) -> None:
    """Every testcase green would let the build pass."""
    verdicts = drawn(1, excess=1.3)
    junit.write(tmp_path / "junit.xml", [Item(v.case_id, v.subject) for v in verdicts], verdicts)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("tests")) == ("1", str(len(verdicts) + 1))
    assert "precision" in str(suite.findall("testcase/failure")[0].get("message"))


def test_a_verdict_of_an_older_journal_is_in_no_pool() -> None:
    assert not pools([verdict(c, 1.35, errors=0) for c in CASES])


def test_a_fault_that_only_the_pool_shows_is_killed() -> None:
    items = [Item(case.id, "sut") for case in CASES]
    seen = {v.case_id: v for v in drawn(1, excess=1.3)}
    found: Score = score(FAULTS[0], items, lambda case_id, subject: seen[case_id])
    assert dict(found.killed) == {"pooled z2": 1}
    assert CleanRun("sut", tuple(seen.values())).pools
    assert not CleanRun("sut", tuple(drawn(1))).pools
