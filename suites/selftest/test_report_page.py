"""report.html without a browser: bounded, escaped, complete, and never half written. test_report_browser.py opens it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import journal, run_info
from harness.errors import RunFolderError
from harness.executed import Ways
from harness.history.ledger import Cell, State
from harness.known import Outcome
from harness.report import coverage, page, page_data, page_parts
from harness.report.page import Report
from harness.run_info import RunInfo
from harness.select import Item
from harness.verdict import Comparison, Diagnosis, Finding, Sample, Stage, Status, Verdict

ROOT = Path(__file__).resolve().parents[2]
CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
AGREES = Comparison("real", 64, 0, 2.5, 5.0, 1.0, 2.0, 0.001, 0, 0, ())
DIFFERS = replace(
    AGREES, beyond=9, worst=float("inf"), rows_hit=3, experts_hit=(1,), samples=(Sample(0, 1, 2.0, float("nan"), 9.0),)
)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
NASTY = "</script><script>bad()</script> &amp; ' \" \u2028 \u202e \x1b[31mred\x1b[0m \x00 \udcff ]]>"


def verdict(status: Status, tokens: int = 1, **more: Any) -> Verdict:
    comparison = AGREES if status is Status.PASSED else DIFFERS if status is Status.WRONG else None
    reason = "" if status is Status.PASSED else "because"
    return replace(Verdict(CASE.format(tokens), "ours", status, Stage.DONE, reason, comparison=comparison), **more)


class Parsed(HTMLParser):
    """Tags, text, and what the <script> elements hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or "script"
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def parsed(report: Report) -> Parsed:
    return Parsed("".join(page.render(report)))


def run_of(folder: Path, *verdicts: Verdict) -> Path:
    folder.mkdir(exist_ok=True)
    recorded = journal.Journal(folder)
    for one in verdicts:
        recorded.append(one)
    recorded.close()
    return folder


@given(st.text() | st.text("\x1b[0m\n\u202e", max_size=30), st.integers(8, 60))
def test_clean_text_is_printable_and_bounded(text: str, limit: int) -> None:
    shown = page_data.clean(text, limit)
    assert shown.replace("\n", "").isprintable()
    assert len(shown) <= limit + 40
    if len(text) <= limit and text.isprintable():
        assert shown == text


def test_a_cut_text_says_how_long_it_was() -> None:
    shown = page_data.clean("x" * (1 << 20))
    assert len(shown) < page_data.MAX_TEXT + 40
    assert shown.endswith("cut, 1048576 characters")


@given(st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8))
def test_embedded_json_reads_back_and_holds_no_markup(data: Any) -> None:
    text = str(page.embedded(data))
    assert text.isascii()
    assert not set(text) & set("<>&")
    assert json.loads(text) == data


def test_the_policy_names_exactly_the_style_and_the_script_of_the_page() -> None:
    seen = parsed(Report(verdicts=[verdict(Status.PASSED)]))
    (policy,) = [str(a["content"]) for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"]
    style = "".join(seen.texts[seen.texts.index(t)] for t in seen.texts if ":root" in t)
    for text, kind in ((seen.scripts["script"], "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_nothing_in_a_verdict_becomes_markup() -> None:
    finding = Finding(NASTY, NASTY, {NASTY: NASTY, "output": NASTY})
    bad = verdict(Status.WRONG, 1, subject=NASTY, reason=NASTY, findings=(finding,), notes=(finding,), known=NASTY)
    bad = replace(bad, diagnosis=Diagnosis(NASTY, NASTY, 1.0, {NASTY: [NASTY]}), environment={NASTY: NASTY, "arch": NASTY})
    bad = replace(bad, plugins=(NASTY,), rules={NASTY: True}, picture=NASTY)
    red = replace(bad, known="", case_id=CASE.format(2))
    info = RunInfo("2026-01-02T03:04:05+00:00", NASTY, NASTY, NASTY, revision=NASTY)
    ours = parsed(Report(verdicts=[verdict(Status.PASSED)]))
    seen = parsed(Report(verdicts=[red, bad], info=info, links={NASTY: NASTY}, reached={NASTY: [Ways(2, 1, 2)]}))
    allowed = {tag for tag, _ in ours.tags} | {"progress"}
    assert {tag for tag, _ in seen.tags} <= allowed
    assert not [a for _, a in seen.tags if any(name.startswith("on") or name == "style" for name in a)]
    assert set(seen.scripts) == {"data", "d0", "d1", "script"}
    html = "".join(page.render(Report(verdicts=[red, bad])))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e\udc80-\udcff]", html)
    assert json.loads(seen.scripts["d0"])["reason"].startswith("</script><script>bad()</script>")


def test_the_table_holds_every_verdict_failures_first() -> None:
    given_ = [verdict(status, tokens) for tokens, status in enumerate(Status)]
    given_ += [verdict(Status.PASSED, 98, known="gone"), verdict(Status.WRONG, 99, known="there")]
    data = page_data.columns(page_data.ordered(given_))
    assert sorted(data["cases"].split("\n")) == sorted(v.case_id for v in given_)
    texts, codes = data["texts"], data["codes"]
    kinds = [texts["outcome"][k] for k in codes["outcome"]]
    assert list(dict.fromkeys(kinds)) == [str(kind) for kind in page_data.SEVERITY]
    by_case = {v.case_id: v for v in given_}
    for row, case in enumerate(data["cases"].split("\n")):
        said = f"moecheck repro {case}{texts['suffix'][codes['suffix'][row]]}"
        assert said == by_case[case].rerun
        assert texts["status"][codes["status"][row]] == by_case[case].status


def test_a_rerun_line_is_one_command_whatever_a_journal_says() -> None:
    """It is copied into a shell."""
    bad = verdict(Status.WRONG, 1, subject="x; touch owned", environment={"arch": "cpu $(touch owned)"})
    bad = replace(bad, findings=(Finding("death", "", {"after": ["a`touch owned`"]}),))
    assert "--backend 'x; touch owned' --platform 'cpu $(touch owned)' --after 'a`touch owned`'" in bad.rerun
    assert verdict(Status.WRONG).rerun == f"moecheck repro {CASE.format(1)} --backend ours"


def test_the_matrix_counts_every_verdict_once() -> None:
    given_ = [verdict(s, t, subject=f"b{t % 3}") for t, s in enumerate([*Status, *Status])]
    grid = page_data.grid(given_)
    assert sum(grid.row(b).total for b in grid.backends) == len(given_)
    assert sum(grid.row(b).red for b in grid.backends) == sum(v.status.failed for v in given_)
    one = page_data.grid([verdict(Status.PASSED, 1), verdict(Status.UNSUPPORTED, 2)]).cells["ours", "bf16"]
    assert (one.worst, one.words) == ("green", "1 passed, 1 skipped")
    assert page_data.grid([verdict(Status.PASSED, 1, known="gone")]).cells["ours", "bf16"].worst == "red"


def test_statistics_stand_beside_their_bounds() -> None:
    rows = {name: (value, bound, bad) for name, value, bound, bad in page_data.statistics(DIFFERS)}
    assert rows["worst z"] == ("inf", "5", True)
    assert rows["mean z²"] == ("1", "2", False)
    assert rows["elements beyond the bound"][2]
    assert "elements that differ in a bit" in {row[0] for row in page_data.statistics(replace(DIFFERS, lane="exact"))}


def test_pages_of_failures_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [verdict(Status.WRONG, tokens, reason="x" * 900) for tokens in range(30)]
    monkeypatch.setattr(page, "MAX_DETAILS", 10)
    assert sum(name.startswith("d") for name in parsed(Report(verdicts=many)).scripts) == 11  # the table's data is one
    monkeypatch.setattr(page, "MAX_DETAIL_BYTES", 9000)
    assert 1 < sum(name.startswith("d") for name in parsed(Report(verdicts=many)).scripts) < 9


def test_only_a_png_of_the_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "run" / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "good.png").write_bytes(PNG)
    (pictures / "text.png").write_text("<svg onload=bad()>")
    (pictures / "link.png").symlink_to(pictures / "good.png")
    (tmp_path / "run" / "other.png").write_bytes(PNG)
    shown = page._picture(pictures.parent, "pictures/good.png", 1 << 20)
    assert base64.b64decode(shown.removeprefix("data:image/png;base64,")) == PNG
    for name in (
        "pictures/text.png",
        "pictures/link.png",
        "other.png",
        "pictures/../other.png",
        "/etc/passwd",
        "",
        "pictures/no.png",
    ):
        assert page._picture(pictures.parent, name, 1 << 20) == ""
    assert page._picture(pictures.parent, "pictures/good.png", 10) == ""
    monkeypatch.setattr(page, "MAX_PICTURE", 10)
    assert page._picture(pictures.parent, "pictures/good.png", 1 << 20) == ""


@pytest.mark.parametrize(
    ("verdicts", "missing", "title"),
    [
        ([verdict(Status.WRONG), verdict(Status.PASSED, 2)], [], "1 failed of 2 verdicts"),
        ([verdict(Status.PASSED)], [], "Nothing failed of 1 verdicts"),
        ([verdict(Status.PASSED)], [Item(CASE.format(9), "ours")], "Incomplete of 1 verdicts"),
        ([verdict(Status.PASSED, 1, known="gone")], [], "1 failed of 1 verdicts"),
    ],
)
def test_the_head_says_how_it_went(verdicts: list[Verdict], missing: list[Item], title: str) -> None:
    seen = parsed(Report(Path("runs/x"), verdicts, missing))
    assert title in seen.text
    assert ("moecheck run --resume" in seen.text) == bool(missing)


def test_a_run_without_run_json_is_dated_by_its_journal_and_says_so(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", verdict(Status.PASSED))
    assert "by the journal's date" in parsed(page.load(folder, {})).text
    run_info.write(folder, RunInfo("2026-01-02T03:04:05+00:00", "cpu", "ci", "abc", "2026-01-02T03:06:05+00:00", 125.0, (2, 8)))
    text = parsed(page.load(folder, {})).text
    for part in ("2026-01-02 03:04 UTC, took 2 min 05 s", "tier ci", "plan abc", "shard 2 of 8"):
        assert part in text


def test_coverage_and_timings_are_shown_where_the_run_has_them(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", verdict(Status.PASSED))
    assert "Combinations executed" not in parsed(page.load(folder, {})).text
    coverage.write(folder / "coverage.json", {"ours": [Ways(2, 5, 7), Ways(3, 0, 0)]})
    lines = [{"case_id": "c", "subject": s, "median_us": x, "notes": ["a", "b"]} for s, x in (("ours", 1.25), ("his", 2.5))]
    (folder / "latency.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = parsed(page.load(folder, {})).text
    for part in ("5 of 7", "71.4 %", "not counted", "median_us", "1.25"):
        assert part in text


@pytest.mark.parametrize("name", ["coverage.json", "latency.jsonl", "run.json", "journal.jsonl"])
@pytest.mark.parametrize("content", [b"{", b'"text"', b"[1]\n", b"\xff\n", b'{"backends": {"x": 3}, "schema": 1}\n'])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = run_of(tmp_path / "run", verdict(Status.PASSED))
    (folder / name).write_bytes(content + (b"\n" if name == "journal.jsonl" else b""))
    if name == "latency.jsonl" and content.startswith(b'{"'):
        assert page.load(folder, {}).timings is not None
        return
    with pytest.raises(RunFolderError, match=re.escape(name)):
        page.load(folder, {})


def test_the_kill_matrix_of_a_stored_campaign_is_shown_whole() -> None:
    kills = page_parts.kills(ROOT / "configs/baselines/cpu_ci_faults.json")
    text = parsed(Report(kills=kills)).text
    assert f"{kills.killed} of {kills.planted} planted faults killed" in text
    assert all(row.fault in text for row in kills.matrix)
    killed = [row for row in kills.matrix if row.kills]
    survivor = replace(killed[5], kills=0)
    assert replace(kills, matrix=[*killed, survivor]).rows[0] is survivor


def test_a_kill_matrix_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"planted": 1}')
    with pytest.raises(RunFolderError, match="moecheck faults --json"):
        page_parts.kills(tmp_path / "x.json")


def test_what_changed_since_an_earlier_run_is_told(tmp_path: Path) -> None:
    before = run_of(
        tmp_path / "before", verdict(Status.PASSED, 1), verdict(Status.WRONG, 2), verdict(Status.PASSED, 3, subject="lost")
    )
    after = run_of(tmp_path / "after", verdict(Status.WRONG, 1), verdict(Status.PASSED, 2))
    text = parsed(page.since(page.load(after, {}), before)).text
    for part in ("Since before", "New failures: 1", "Fixed: 1", "Cells no longer executed: 1", "lost \u00d7 bf16"):
        assert part in text


def test_the_ledger_begins_with_what_stopped() -> None:
    cells = [
        Cell("a", "bf16", "standard", "cpu", State.EXECUTED, last="2026-01-01", days=3.0, executed=5),
        Cell("b", "bf16", "standard", "cpu", State.UNPLANNED),
        Cell("c", "bf16", "standard", "cpu", State.EXECUTED, last="2025-12-01", days=30.0, stopped="run 9", executed=1),
        Cell("d", "bf16", "standard", "cpu", State.SKIPPED, reason="UNSUPPORTED: no", refused=4),
    ]
    assert [c.backend for c in page_parts.worst_first(cells)] == ["c", "d", "b", "a"]
    text = parsed(Report(verdicts=[verdict(Status.PASSED)], ledger=cells)).text
    for part in ("no longer executed", "not in run 9", "UNSUPPORTED: no (4 times)", "never planned"):
        assert part in text


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    page.write(out, Report(verdicts=[verdict(Status.PASSED)]))
    whole = out.read_text()
    assert whole.rstrip().endswith("</html>")
    monkeypatch.setattr(page_data, "detail", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(out, Report(verdicts=[verdict(Status.WRONG)]))
    assert out.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_command_writes_a_page(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    folder, out = run_of(tmp_path / "run", verdict(Status.WRONG), verdict(Status.PASSED, 2)), tmp_path / "r.html"
    answer = moecheck("report", str(folder), "-o", str(out), "--previous", str(folder))
    assert (answer.code, answer.out.strip()) == (0, f"2 verdicts, 1 failed, 0 not run; {out}")
    assert "No change." in out.read_text()


def test_the_command_shows_the_ledger_of_a_history(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="the extra `history` is not installed")
    folder = run_of(tmp_path / "run", verdict(Status.PASSED, environment={"arch": "cpu", "torch": "2.13.0"}))
    (tmp_path / "history").mkdir()
    run_of(tmp_path / "history" / "one", verdict(Status.PASSED, 7, environment={"arch": "cpu", "torch": "2.12.0"}))
    out = tmp_path / "r.html"
    assert moecheck("report", str(folder), "-o", str(out), "--history", str(tmp_path / "history")).code == 0
    text = Parsed(out.read_text()).text
    assert "1 executed" in text  # by `ours`, which no platform file promises
    assert re.search("torch_grouped_mm bf16 standard cpu never planned", text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give a run folder"),
        (("{}/nowhere",), "no journal.jsonl in it"),
        (("{}/run", "-o", "{}/no/such/r.html"), "cannot be written"),
        (("{}/run", "--previous", "{}/nowhere"), "there is no journal"),
        (("{}/run", "--faults", "{}/nowhere"), "not what `moecheck faults --json` writes"),
        (("--faults", str(ROOT / "configs/baselines/cpu_ci_faults.json"), "--previous", "{}/run"), "give its folder too"),
    ],
)
def test_the_command_says_what_it_wants(
    moecheck: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "run", verdict(Status.PASSED))
    answer = moecheck("report", *(a.format(tmp_path) for a in arguments))
    assert answer.code == 3
    assert told in answer.err
    assert not list(tmp_path.glob("*.html"))


def test_the_templates_are_packaged() -> None:
    assert '"harness.report" = ["templates/*"]' in (ROOT / "pyproject.toml").read_text()
    assert {p.name for p in (ROOT / "harness/report/templates").iterdir()} == {"page.html", "page.css", "page.js"}


def test_every_outcome_has_words_and_a_place() -> None:
    assert set(page_data.SEVERITY) == set(Outcome)
    assert page_parts.when(None, datetime(2026, 1, 2, 3, 4, tzinfo=UTC)).startswith("2026-01-02 03:04 UTC")
    assert [page_parts.duration(s) for s in (4.5, 200, 3720)] == ["4.5 s", "3 min 20 s", "1 h 02 min"]
