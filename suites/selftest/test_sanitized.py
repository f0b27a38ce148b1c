"""The nightly's subset under compute-sanitizer: what is chosen, that nothing runs twice, that silence is no pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from harness import config, sanitized
from harness.backends.base import CPU, Device
from harness.journal import Journal, read
from harness.plan import Plan, Request
from harness.select import Item
from harness.verdict import Comparison, Finding, Stage, Status, Verdict
from harness.worker.sanitizer import Order
from harness.worker.sanitizer_report import SanitizerError

SMALL = "moe.bf16.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
LARGE = SMALL.replace("h64", "h512")
OTHER = SMALL.replace("bf16", "fp16").replace("h64", "h128")
EMPTY = SMALL.replace("t2", "t0")
OUT = Console(quiet=True)
AGREES = Comparison("real", 10, 0, 1.0, 5.0, 1.0, 1.1, 0.1, 0, 0, ())


def passed(case_id: str, subject: str = "a") -> Verdict:
    return Verdict(case_id, subject, Status.PASSED, Stage.DONE, comparison=AGREES)


def bad(verdict: Verdict, status: Status) -> Verdict:
    return replace(verdict, status=status, findings=(Finding("memcheck", "Invalid read"),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    journal = Journal(tmp_path)
    for verdict in (passed(LARGE), passed(SMALL), passed(OTHER), passed(EMPTY), passed(SMALL, "b")):
        journal.append(verdict)
    journal.append(bad(passed(OTHER, "b"), Status.WRONG))
    journal.close()
    return tmp_path


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(sanitized, "device_of", lambda platform: CPU if platform == "cpu" else Device("cuda", platform))
    monkeypatch.setattr(sanitized.sanitizer, "find", lambda: "compute-sanitizer")
    return Plan(Request("sm90", "nightly"), 60.0, (Item(SMALL, "a"),))


def answering(monkeypatch: pytest.MonkeyPatch, judge: Callable[[Order, str], Verdict]) -> list[tuple[str, str, str]]:
    asked: list[tuple[str, str, str]] = []

    def answer(order: Order, tool: str, limit_s: float) -> tuple[Verdict, str]:
        asked.append((tool, order.subject, order.case))
        return judge(order, tool), tool

    monkeypatch.setattr(sanitized.sanitizer, "judge", answer)
    return asked


def test_the_smallest_passed_case_of_each_recipe_goes_first(folder: Path) -> None:
    verdicts = read(folder)
    assert sanitized.subset(verdicts, 1) == [Item(SMALL, "a"), Item(SMALL, "b")]
    assert sanitized.subset(verdicts, 2) == [Item(SMALL, "a"), Item(OTHER, "a"), Item(SMALL, "b")]
    assert [item.case_id for item in sanitized.subset(verdicts, 9)] == [SMALL, OTHER, LARGE, SMALL]


def test_an_error_of_the_tool_is_a_red_verdict_and_nothing_runs_twice(
    folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(order: Order, tool: str) -> Verdict:
        verdict = passed(order.case, order.subject)
        return bad(verdict, Status.CORRUPTING) if (order.subject, tool) == ("b", "memcheck") else verdict

    asked = answering(monkeypatch, judge)
    found = sanitized.sweep(plan, folder, {"memcheck": 1, "racecheck": 2}, OUT)
    assert asked == [(t, s, c) for t, n in (("memcheck", 1), ("racecheck", 2)) for c, s in pairs(folder, n)]
    assert [v.subject for v in found if v.status.failed] == ["b"]
    asked.clear()
    assert sanitized.sweep(plan, folder, {"memcheck": 1, "racecheck": 2}, OUT) == found
    assert asked == []


def pairs(folder: Path, count: int) -> list[tuple[str, str]]:
    return [(item.case_id, item.subject) for item in sanitized.subset(read(folder), count)]


def test_no_answer_is_no_pass(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(order: Order, tool: str) -> Verdict:
        if order.subject == "a":
            raise SanitizerError("no report within 300 s")
        return passed(order.case, order.subject)

    answering(monkeypatch, judge)
    with pytest.raises(SanitizerError, match=f"no answer for a {SMALL} under memcheck: no report"):
        sanitized.sweep(plan, folder, {"memcheck": 1}, OUT)
    assert [v.subject for v in read(folder / "sanitizer" / "memcheck")] == ["b"]


def test_a_cpu_has_no_sanitizer_and_the_nightly_asks_for_all_tools(folder: Path, plan: Plan) -> None:
    on_cpu = replace(plan, request=Request("cpu", "nightly"))
    assert sanitized.sweep(on_cpu, folder, {"memcheck": 1}, OUT) == []
    assert set(config.tier("nightly").sanitizer) == {"memcheck", "racecheck", "initcheck", "synccheck"}
    assert config.tier("ci").sanitizer == {}
