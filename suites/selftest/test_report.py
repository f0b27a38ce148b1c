"""Reports derived from a journal: complete, parseable, and never without the line that reproduces a verdict."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from harness.known import Outcome, outcome
from harness.report import junit
from harness.report.table import COLUMNS, SPARED, summary
from harness.report.text import explain, line
from harness.select import Item
from harness.verdict import Comparison, Diagnosis, Finding, Sample, Stage, Status, Verdict

CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
AGREES = Comparison("real", 64, 0, 2.5, 5.0, 1.0, 2.0, 0.001, 0, 0, ())
DIFFERS = replace(
    AGREES, beyond=9, worst=float("inf"), rows_hit=3, experts_hit=(1,), samples=(Sample(0, 1, 2.0, float("nan"), 9.0),)
)
HOSTILE = "\x00\x1b[31m ]]> <script>&amp;\"' \udcff \ufffe \r\n [/bold] {} %s"


def verdict_of(status: Status, tokens: int = 1, reason: str = "because", known: str = "") -> Verdict:
    comparison = AGREES if status is Status.PASSED else DIFFERS if status is Status.WRONG else None
    reason = "" if status is Status.PASSED else reason
    return Verdict(CASE.format(tokens), "ours", status, Stage.DONE, reason, comparison=comparison, known=known)


EVERY = [verdict_of(status, tokens) for tokens, status in enumerate(Status)]
EVERY += [verdict_of(Status.PASSED, 98, known="gone"), verdict_of(Status.WRONG, 99, known="still-there")]


def items(verdicts: list[Verdict]) -> list[Item]:
    return [Item(v.case_id, v.subject) for v in verdicts]


def written(folder: Path, planned: list[Item], verdicts: list[Verdict]) -> xml.Element:
    """The testsuite element of a junit.xml that was written and parsed again."""
    junit.write(folder / "junit.xml", planned, verdicts)
    suite = xml.parse(folder / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    return suite


def rendered(verdicts: list[Verdict], width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(summary(verdicts, {"ours": "lib 1.0"}, width))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_the_table_of_a_narrow_terminal_leaves_columns_out_and_says_which(width: int) -> None:
    """Squeezed into the 80 columns that a terminal has when it opens, every word was a column of single letters."""
    verdicts = [replace(v, subject=name) for v in EVERY for name in ("ours", "a_backend_of_twenty_nine_chars")]
    text = rendered(verdicts, width)
    for word in ("a_backend_of_twenty_nine_chars", "passed", "failed", "known", "skipped"):
        assert f" {word} " in text
    left_out = " ".join(text.partition("no room for ")[2].split())
    assert all((f"┃ {name} " in text) == (name not in left_out) for name in SPARED if name != "recipes")
    assert ("no room for" in text) == (width < 200)
    assert "0 verdicts" in rendered([], width)


def test_a_known_failure_is_called_known_where_it_is_explained() -> None:
    """The run's report gives the line that reproduces it: who follows it read of an unexplained failure."""
    assert "known issue still-there, which a run excuses" in explain(EVERY[-1])
    assert "excuses" not in explain(verdict_of(Status.WRONG))


def test_junit_has_one_testcase_per_planned_case(tmp_path: Path) -> None:
    suite = written(tmp_path, items(EVERY), EVERY)
    cases = suite.findall("testcase")
    assert [(c.get("name"), c.get("classname")) for c in cases] == [(v.case_id, v.subject) for v in EVERY]
    tags = {Outcome.GREEN: [], Outcome.RED: ["failure"], Outcome.GONE: ["failure"]}
    assert [[e.tag for e in c] for c in cases] == [tags.get(outcome(v), ["skipped"]) for v in EVERY]


def test_junit_counts_what_it_holds(tmp_path: Path) -> None:
    """CI systems show the attributes and never count."""
    planned = [*items(EVERY), Item(CASE.format(500), "ours")]
    suite = written(tmp_path, planned, EVERY)
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
        assert int(suite.get(attribute, -1)) == len(list(suite.iter(tag)))


def test_junit_calls_a_planned_case_without_verdict_an_error(tmp_path: Path) -> None:
    """Left out, a run killed half way looks like a smaller green one."""
    suite = written(tmp_path, items(EVERY), EVERY[:-1])
    (error,) = suite.iter("error")
    assert (error.get("type"), error.get("message")) == ("not-run", "planned but not run")
    assert len(suite.findall("testcase")) == len(EVERY)


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1) | st.just(HOSTILE))
def test_junit_stays_xml_whatever_a_kernel_prints(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Escaping < and & is not enough: XML has no way to write most control characters."""
    finding = Finding("death", text, {"output": text})
    bad = replace(verdict_of(Status.CRASHED, 1, text, known=text), findings=(finding,), diagnosis=Diagnosis(text, text))
    bad = replace(bad, environment={text: text}, plugins=(text,))
    suite = written(tmp_path_factory.mktemp("xml"), items([bad]), [bad])
    assert len(suite.findall("testcase")) == 1


def test_junit_replaces_the_old_report_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for verdicts in ([], EVERY):
        suite = written(tmp_path, items(EVERY), verdicts)
    assert suite.get("errors") == "0"
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]


@pytest.mark.parametrize("copies", [0, 1, 300])
def test_the_table_renders_any_number_of_verdicts(copies: int) -> None:
    """No verdict at all, none compared, and many are different paths through the statistics."""
    text = rendered(EVERY * copies)
    assert f"{len(EVERY) * copies} verdicts" in text
    assert all(name in text for name in COLUMNS)
    assert text.count("ours") == min(copies, 1)


def test_the_table_accounts_for_every_verdict() -> None:
    row = next(text for text in rendered(EVERY).splitlines() if "ours" in text)
    passed, failed, known, skipped = (int(cell) for cell in row.split("│")[4:8])
    assert (passed, failed, known, skipped) == (1, len(EVERY) - 5 + 1, 1, 2)


def test_a_backend_that_was_only_skipped_has_a_row() -> None:
    assert "ours" in rendered([verdict_of(Status.UNAVAILABLE)])


@pytest.mark.parametrize("verdict_", EVERY, ids=lambda v: f"{v.status}{v.known}")
def test_an_explanation_says_what_where_why_and_how_to_repeat(verdict_: Verdict) -> None:
    text = explain(verdict_)
    assert verdict_.status in text.splitlines()[verdict_.known == "gone"]
    assert all(part in text for part in (verdict_.subject, verdict_.case_id, verdict_.reason))
    assert text.endswith(f"rerun: {verdict_.rerun}")


numbers = st.floats() | st.integers(0, 5).map(float)
comparisons = st.builds(
    Comparison,
    lane=st.sampled_from(("exact", "real")),
    worst=numbers,
    mean_z2=numbers,
    rel_l2=numbers,
    samples=st.lists(st.builds(Sample, got=numbers, z=numbers), max_size=2).map(tuple),
)
verdicts = st.builds(
    Verdict,
    status=st.sampled_from([s for s in Status if s is not Status.PASSED]),
    reason=st.text(min_size=1),
    findings=st.lists(st.builds(Finding, evidence=st.dictionaries(st.just("output"), st.text())), max_size=2).map(tuple),
    comparison=st.none() | comparisons,
    diagnosis=st.none() | st.builds(Diagnosis),
    environment=st.dictionaries(st.text(), st.text(), max_size=2),
    known=st.sampled_from(("", "issue")),
)


@settings(max_examples=100, deadline=None)
@given(judged=verdicts)
def test_the_rerun_line_is_in_every_explanation(judged: Verdict) -> None:
    """Also of a verdict whose numbers are nan, whose lists are empty, whose texts are not printable."""
    assert explain(judged).endswith(f"  rerun: {judged.rerun}")
    assert f"{judged.status}" in line(judged)
