"""A known issue excuses one failure and nothing else, and says so when that failure is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from harness import config, plan
from harness.backends import discover
from harness.case import Case
from harness.errors import ConfigError
from harness.history import synthetic
from harness.history.synthetic import Night
from harness.known import KnownIssue, Outcome, mark, outcome
from harness.select import Item
from harness.session import Session
from harness.verdict import Comparison, Stage, Status, Verdict

AGREES = Comparison("real", 64, 0, 1.0, 5.0, 1.0, 2.0, 0.0, 0, 0, ())
CASE = "moe.bf16.t2.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
ISSUE = KnownIssue(
    "wrong-dot", "https://example.org/1", "ours", "cpu", {"recipe": ("bf16", "nvfp4"), "tokens": (1, 2)}, Status.WRONG, "zeros:"
)
FAILS = Verdict(CASE, "ours", Status.WRONG, Stage.DONE, "zeros: all of them", environment={"arch": "cpu"})
PASSES = Verdict(CASE, "ours", Status.PASSED, Stage.DONE, comparison=AGREES, environment={"arch": "cpu"})
SKIPS = (Status.UNSUPPORTED, Status.UNAVAILABLE)


def judged(verdict: Verdict) -> Outcome:
    return outcome(mark(verdict, [ISSUE]))


def test_the_described_failure_is_known() -> None:
    assert mark(FAILS, [ISSUE]).known == ISSUE.id
    assert judged(FAILS) is Outcome.KNOWN


def test_a_case_that_passes_now_is_gone() -> None:
    """xfail without strict: the entry would stay for ever and excuse the next bug."""
    assert judged(PASSES) is Outcome.GONE


def test_what_fails_only_sometimes_may_pass() -> None:
    """A kernel that reads what memory held is right now and then; its entry must end by its date instead."""
    issue = replace(ISSUE, sometimes=True, expires=date(2027, 1, 1))
    assert outcome(mark(PASSES, [issue])) is Outcome.GREEN
    assert outcome(mark(FAILS, [issue])) is Outcome.KNOWN


@pytest.mark.parametrize("status", [s for s in Status if s.failed and s is not Status.WRONG])
def test_another_status_is_red(status: Status) -> None:
    assert judged(replace(FAILS, status=status)) is Outcome.RED


def test_another_text_is_red() -> None:
    """An issue that excuses every WRONG of its cases would hide a second bug behind the first."""
    assert judged(replace(FAILS, reason="gate_up_swap: exchanged")) is Outcome.RED


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "theirs"},
        {"environment": {"arch": "sm90"}},
        {"case_id": CASE.replace("bf16", "fp16")},
        {"case_id": CASE.replace(".t2.", ".t3.")},
        {"case_id": CASE.replace(".t2.", ".t12.")},
    ],
)
@pytest.mark.parametrize(("before", "as_before"), [(FAILS, Outcome.RED), (PASSES, Outcome.GREEN)])
def test_what_it_does_not_name_is_untouched(before: Verdict, as_before: Outcome, change: dict[str, str]) -> None:
    """Every axis has to match: any of them would excuse other recipes."""
    assert judged(replace(before, **change)) is as_before


def test_every_listed_value_matches() -> None:
    assert judged(replace(FAILS, case_id=CASE.replace("bf16", "nvfp4").replace(".t2.", ".t1."))) is Outcome.KNOWN


@pytest.mark.parametrize("status", SKIPS)
def test_a_skip_says_nothing(status: Status) -> None:
    """A library that is not here has neither the bug nor the fix."""
    skipped = mark(replace(FAILS, status=status), [ISSUE])
    assert (skipped.known, outcome(skipped)) == ("", Outcome.SKIPPED)


def test_the_issue_that_excuses_is_named_among_several() -> None:
    other = replace(ISSUE, id="other", text="nan:")
    assert mark(FAILS, [other, ISSUE]).known == ISSUE.id


@pytest.mark.parametrize("issue", config.known_issues(), ids=lambda issue: issue.id)
def test_every_entry_speaks_of_a_planned_case(issue: KnownIssue) -> None:
    """A misspelt axis, value, backend or arch excuses nothing and is never gone: nobody would notice the entry."""
    platform = config.platform(issue.arch)
    backends = discover()
    request = plan.Request(platform.name, "smoke", (issue.backend,))
    axes = [Case.parse(item.case_id).axes for item in plan.make(request, backends, plan.device_named(platform)).items]
    for name, values in issue.match.items():
        assert set(values) & {a[name] for a in axes}, f"{issue.id}: no planned case has {name} in {values}"
    assert any(all(a[name] in values for name, values in issue.match.items()) for a in axes)


# ---- dates and quarantine

DIES = replace(ISSUE, id="dies", status=Status.CRASHED, text="killed by", expires=date(2026, 6, 30), quarantine=True)
HEAD = """issues:
  - id: dies
    link: LINK
    backend: triton_moe
    arch: cpu
    match: {tokens: [1]}
    status: CRASHED
    text: "killed by"
"""


def issues(folder: Path, more: str = "", link: str = "https://github.com/o/r/issues/1") -> Path:
    (folder / "known_issues.yaml").write_text(HEAD.replace("LINK", link) + more)
    return folder


def test_an_issue_excuses_until_its_date_is_over(tmp_path: Path) -> None:
    root = issues(tmp_path, "    expires: 2026-06-30\n")
    dies = Verdict(CASE.replace(".t2.", ".t1."), "triton_moe", Status.CRASHED, Stage.LAUNCH, "killed by SIGSEGV")
    for day, expected in ((date(2026, 6, 30), Outcome.KNOWN), (date(2026, 7, 1), Outcome.RED)):
        assert outcome(mark(dies, config.known_issues(root, day))) is expected
    (note,) = mark(dies, config.known_issues(root, date(2026, 7, 1))).notes
    assert "dies expired on 2026-06-30" in note.text


def test_an_expired_issue_is_still_gone_when_its_case_passes() -> None:
    assert outcome(mark(PASSES, [replace(ISSUE, expired=True)])) is Outcome.GONE


def test_an_issue_that_expired_does_not_hide_another_that_excuses() -> None:
    assert mark(FAILS, [replace(ISSUE, id="old", expired=True), ISSUE]).known == ISSUE.id


@pytest.mark.parametrize(
    "link",
    [
        "https://github.com/vllm-project/vllm/issues/38169",
        "https://github.com/vllm-project/vllm/pull/38050#discussion_r1",
        "https://gitlab.example.org/group/sub/project/-/merge_requests/7",
        "https://bugzilla.example.org/show_bug.cgi?id=12",
        "https://jira.example.org/browse/KERNEL-12",
        "docs/findings.md#triton-interpreter-bf16-dot",
    ],
)
def test_a_link_is_a_thread_or_a_finding(tmp_path: Path, link: str) -> None:
    assert config.known_issues(issues(tmp_path, link=link))[0].link == link


@pytest.mark.parametrize(
    "link",
    [
        "https://github.com/o/r",
        "http://github.com/o/r/issues/1",
        "https://github.com/o/r/issues/new",
        "https://o/r issues/1",
        "docs/findings.md#nobody-wrote-this",
        "docs/findings.md",
        "see the chat",
    ],
)
def test_another_link_is_refused_with_its_line(tmp_path: Path, link: str) -> None:
    with pytest.raises(ConfigError, match=r"known_issues.yaml:3: .*findings.md"):
        config.known_issues(issues(tmp_path, link=link))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("    quarantine: true\n", "only with expires"),
        ("    expires: next week\n", "date"),
        ("    expires: 1798675200\n", "date"),
        ("    expires: 2026-13-01\n", "month"),
    ],
)
def test_a_quarantine_wants_a_date_that_is_one(tmp_path: Path, more: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config.known_issues(issues(tmp_path, more))


def test_only_deaths_are_quarantined(tmp_path: Path) -> None:
    """A wrong result harms nobody: it is judged, and seen to be gone."""
    path = issues(tmp_path, "    expires: 2026-06-30\n    quarantine: true\n") / "known_issues.yaml"
    assert config.known_issues(tmp_path)[0].quarantine
    path.write_text(path.read_text().replace("CRASHED", "WRONG"))
    with pytest.raises(ConfigError, match="CRASHED or HUNG"):
        config.known_issues(tmp_path)


@pytest.mark.parametrize(("expired", "status"), [(False, Status.UNAVAILABLE), (True, Status.CRASHED)])
def test_a_quarantined_case_is_not_launched_until_its_date_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expired: bool, status: Status
) -> None:
    """It kills its process: launched, it could not be a skip."""
    plugin = tmp_path / "killer.py"
    plugin.write_text(KILLER)
    item = Item(CASE, "killer")
    issue = replace(DIES, backend="killer", expired=expired)
    monkeypatch.setattr(config, "known_issues", lambda: (issue,))
    session = Session(plan.Plan(plan.Request("cpu", "smoke", plugins=(str(plugin),)), 60.0, (item,)), None)
    try:
        judged = session.judge(item)
    finally:
        session.close()
    assert judged.status is status
    if expired:
        assert outcome(judged) is Outcome.RED
        assert "expired" in judged.notes[-1].text
    else:
        assert (judged.reason, judged.known) == ("quarantined until 2026-06-30: https://example.org/1", "dies")
        assert (outcome(judged), judged.environment["arch"]) == (Outcome.SKIPPED, "cpu")


KILLER = """
import os, signal
from harness.backends.base import Backend, Launch
def call():
    os.kill(os.getpid(), signal.SIGKILL)
def prepare(case, inputs):
    return Launch(call)
BACKENDS = (Backend("killer", "torch", True, ("bf16",), ("swiglu",), prepare, lambda case: None),)
"""


def test_the_command_lists_matches_and_is_red_for_what_expired_or_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moecheck: Callable[..., Any]
) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    listed = (replace(ISSUE, backend="onnxruntime_moe"), DIES)
    past = date(2026, 6, 30)
    monkeypatch.setattr(config, "known_issues", lambda today: tuple(replace(i, expired=today > past) for i in listed))
    planned = [i for i in synthetic.items(20) if i.subject == "onnxruntime_moe"]
    night = Night(0, {"torch": "2", "onnxruntime": "1", "triton": "3"}, "a" * 40)
    for number in range(2):
        found = synthetic.verdicts(replace(night, number=number), planned)
        found[0] = replace(synthetic.failed(found[0]) if number == 0 else found[0], known=ISSUE.id)
        synthetic.write(tmp_path / str(number), replace(night, number=number), found)
        answer = moecheck("known", str(tmp_path), "--now", "2026-01-03")
        assert answer.code == number, answer.out
        assert "last failed as described in 0 (2026-01-01T03:00), 1 cases" in answer.out
    assert "GONE: 1 of its cases passed in 1;" in answer.out
    assert "these runs have not seen it" in answer.out
    late = moecheck("known", "--expired", "--now", "2026-07-01", "--json")
    assert late.code == 1
    assert [entry["id"] for entry in json.loads(late.out)["issues"]] == [ISSUE.id, DIES.id]
    assert moecheck("known", "--expired", "--now", "2026-06-30").code == 0
