"""report.html in a real Chromium, from file://: what people do with it, and what a hostile journal may not.

Every page is watched: an error on the console, a refused policy or any request beside the file itself fails its test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.executed import Ways
from harness.history.ledger import Cell, State
from harness.regress import compare
from harness.report import page, page_parts
from harness.report.page import Report
from harness.report.page_data import ordered
from harness.run_info import RunInfo
from harness.verdict import Comparison, Diagnosis, Finding, Sample, Stage, Status, Verdict

ROOT = Path(__file__).resolve().parents[2]
CASE = "moe.{}.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
AGREES = Comparison("real", 64, 0, 2.5, 5.0, 1.0, 2.0, 0.001, 0, 0, ())
DIFFERS = replace(AGREES, beyond=9, worst=1234.5, rows_hit=3, samples=(Sample(0, 1, 2.0, float("nan"), 9.0),))
ENVIRONMENT = {"python": "3.12", "arch": "cpu", "device": "x86_64", "torch": "2.13.0"}
MANY = 3000
ATTACKS = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1><svg onload=window.pwned=1>",
    "'\"><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>{{7*7}}{% raw %}${window.pwned=1}",
    "\u2028\u2029\u202e\x1b[31m\x1b]0;x\x07\x00\ufeff]]>--><!--",
    "<b>" * 350_000,  # 1 MiB
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOCUSED = """() => { const e = document.activeElement;
  return [e.id || e.dataset.sort || e.dataset.at || e.className || e.tagName, getComputedStyle(e).outlineStyle]; }"""
CONTRAST = """() => {
  const lum = (c) => { const f = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const rgba = (t) => { const n = t.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; }
    return [255, 255, 255, 1];
  };
  const bad = [], seen = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, s = getComputedStyle(e);
    if (["SCRIPT", "STYLE", "OPTION"].includes(e.tagName)) continue;
    if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
    const text = rgba(s.color), back = behind(e), key = [text, back].join();
    if (seen.has(key)) continue;
    seen.add(key);
    const [a, b] = [lum(text.slice(0, 3)), lum(back.slice(0, 3))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([ratio.toFixed(2), e.className || e.tagName, walk.currentNode.data.trim().slice(0, 40)]);
  }
  return { bad, pairs: seen.size };
}"""


def _missing(why: str) -> None:
    """A laptop goes without; CI does not."""
    if os.environ.get("MOECHECK_BROWSER") == "required":
        pytest.fail(f"{why}, and MOECHECK_BROWSER=required")
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        _missing(f"none of {', '.join(BROWSERS)} is on PATH: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("Playwright is not installed: pip install 'moecheck[dev]'")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield found
        found.close()


def verdict(status: Status, tokens: int, subject: str = "ours", recipe: str = "bf16", **more: Any) -> Verdict:
    comparison = AGREES if status is Status.PASSED else DIFFERS if status is Status.WRONG else None
    reason = "" if status is Status.PASSED else "because"
    one = Verdict(CASE.format(recipe, tokens), subject, status, Stage.DONE, reason, comparison=comparison)
    return replace(one, environment=ENVIRONMENT, seconds=tokens / 100, **more)


def a_run(folder: Path) -> list[Verdict]:
    """Failures of several kinds, one with a picture, among thousands of passes on two backends and two recipes."""
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 32), (200, 40, 40)).save(folder / "pictures" / "one.png")
    red = verdict(Status.WRONG, 1, reason="missing_expert: expert 4 is missing", picture="pictures/one.png")
    red = replace(red, diagnosis=Diagnosis("missing_expert", "expert 4 is missing", 1.0, {"experts": [4]}))
    death = Finding("death", "killed by SIGSEGV", {"output": "Segmentation fault\n  at kernel.cu:12", "exit_code": -11})
    found = [red, verdict(Status.CRASHED, 2, "theirs", reason="killed by SIGSEGV during launch", findings=(death,))]
    found += [verdict(Status.WRONG, 3, known="an-issue"), verdict(Status.UNSUPPORTED, 4, "theirs", reason="no such thing")]
    subjects, recipes = ("ours", "theirs"), ("bf16", "mxfp4-bf16")
    return found + [verdict(Status.PASSED, 10 + i, subjects[i % 2], recipes[i // 2 % 2]) for i in range(MANY)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page with every section."""
    folder = tmp_path_factory.mktemp("run")
    verdicts = a_run(folder)
    cells = [Cell("ours", "bf16", "standard", "cpu", state, ("native",)) for state in State]
    shown = Report(
        folder,
        ordered(verdicts),
        info=RunInfo("2026-01-02T03:04:05+00:00", "cpu", "ci", "0123456789abcdef", "2026-01-02T03:06:05+00:00", 120.0),
        reached={name: [Ways(2, 5, 7), Ways(3, 10, 80)] for name in ("ours", "theirs")},
        timings=page_parts.Timings(["case_id", "median_us"], [False, True], [["a" * 80, "1.5"]] * 5, 5),
        kills=page_parts.kills(ROOT / "configs/baselines/cpu_ci_faults.json"),
        links={"an-issue": "https://example.org/issues/1"},
        changes=compare(verdicts[2:], verdicts),
        previous="before",
        ledger=cells,
    )
    page.write(folder / "report.html", shown)
    return folder / "report.html"


@contextmanager
def watched(browser: Any, **options: Any) -> Iterator[Callable[[Path, str], Any]]:
    """Opens files; at the end nothing may have complained, and nothing been asked for."""
    context = browser.new_context(**options)
    faults: list[str] = []
    own: set[str] = set()

    def visit(path: Path, address: str = "") -> Any:
        own.add(path.as_uri())
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda m: faults.append(f"console: {m.text}"))
        tab.on("pageerror", lambda e: faults.append(f"error: {e}"))
        tab.on("dialog", lambda d: faults.append(f"dialog: {d.message}"))
        tab.add_init_script("addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective))")
        tab.goto(path.as_uri() + address)
        return tab

    def asked(route: Any) -> None:
        if route.request.url.partition("#")[0] in own:
            route.continue_()
        else:
            faults.append(f"request: {route.request.url}")
            route.abort()

    context.route("**/*", asked)
    yield visit
    context.close()
    assert not faults


def count(tab: Any) -> int:
    """Verdicts that the page says it shows."""
    return int(tab.inner_text("#shown").split()[0].replace(",", ""))


def expect_count(tab: Any, wanted: int) -> None:
    tab.wait_for_function("n => document.getElementById('shown').textContent.startsWith(n + ' of')", arg=f"{wanted:,}")


def test_filters_narrow_the_list_and_live_in_the_address(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        assert count(tab) == MANY + 4
        badges = [tab.inner_text(f"#body tr:nth-child({n}) .badge").split()[1] for n in (2, 3, 4)]
        assert badges == ["WRONG", "CRASHED", "WRONG"]
        tab.check("#failures")
        expect_count(tab, 2)
        tab.uncheck("#failures")
        tab.select_option("#b", "theirs")
        expect_count(tab, MANY // 2 + 2)
        tab.select_option("#r", "mxfp4-bf16")
        expect_count(tab, MANY // 4)
        tab.fill("#q", "T101 Theirs")
        expect_count(tab, 3)  # t101, t1013 and t1017: every fourth is of this backend and recipe
        shown = visit(report, tab.evaluate("location.hash"))
        assert count(shown) == 3
        assert shown.input_value("#q") == "T101 Theirs"
        tab.click("#reset")
        expect_count(tab, MANY + 4)
        assert tab.evaluate("location.hash") == ""
        tab.select_option("#s", "UNSUPPORTED")
        expect_count(tab, 1)
        tab.fill("#q", "no case has this")
        expect_count(tab, 0)
        assert "No verdict matches" in tab.inner_text("#body")
        tab.click(".matrix td.red a >> nth=0")  # a cell of the matrix is a filter
        expect_count(tab, MANY // 4 + 2)


def test_columns_sort(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        tab.click("text=Seconds")
        first = float(tab.inner_text("#body tr:nth-child(2) .c-s"))
        tab.click("text=Seconds")
        assert (first, float(tab.inner_text("#body tr:nth-child(2) .c-s"))) == ((MANY + 9) / 100, 0.01)
        assert tab.get_attribute("th.c-s", "aria-sort") == "ascending"


def test_of_thousands_of_rows_only_those_in_sight_exist(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        assert tab.locator("#body tr").count() < 80
        tab.evaluate("document.getElementById('rows').scrollTop = 1e9")
        tab.wait_for_selector(f"#body a[data-at='{MANY + 3}']")
        assert tab.locator("#body tr").count() < 80
        assert tab.get_attribute("#rows table", "aria-rowcount") == str(MANY + 5)
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert 400 < tab.locator("#body tr").count() < 600


def test_a_failure_has_a_page_with_its_evidence_and_its_picture(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        tab.click("#body a >> nth=0")
        tab.wait_for_selector("#detail h2")
        text = tab.inner_text("#detail")
        for part in ("missing_expert", "predicts 100 % of the error", "1.23e+03", "expected", "Rerun", "x86_64", "1 of 3,004"):
            assert part in text.replace("3004", "3,004")
        size = tab.evaluate("(i => [i.complete, i.naturalWidth, i.naturalHeight])(document.querySelector('#detail img'))")
        assert size == [True, 64, 32]
        assert tab.is_hidden("#all")
        assert tab.title().startswith("WRONG ours")
        tab.click("text=Next")
        tab.wait_for_selector("#detail :text('at kernel.cu:12')")
        tab.click("text=Next")
        link = tab.locator("#detail .known a")
        assert (link.get_attribute("href"), link.get_attribute("rel")) == ("https://example.org/issues/1", "noreferrer")
        tab.go_back()
        tab.go_back()
        assert "missing_expert" in tab.inner_text("#detail")
        tab.go_back()
        tab.wait_for_selector("#all", state="visible")
        passed = visit(report, "#v=2000")
        assert "is in journal.jsonl" in passed.inner_text("#detail")


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_copy_button_copies_the_rerun_line(browser: Any, report: Path, clipboard: bool) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        if not clipboard:  # as in a browser that keeps it from files
            tab.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        tab.click("#body a >> nth=1")
        tab.click("#detail button")
        tab.wait_for_selector("#said:text('Rerun line copied')", state="attached")
        tab.click("text=All verdicts")
        tab.focus("#q")
        tab.keyboard.press("Control+V")
        wanted = f"moecheck repro {CASE.format('bf16', 2)} --backend theirs --platform cpu"
        assert tab.input_value("#q") == wanted


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        assert tab.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        stops = []
        for _ in range(60):
            stops.append(tab.evaluate(FOCUSED))
            if stops[-1][0] == "0":
                break
            tab.keyboard.press("Tab")
        names = [name for name, _ in stops]
        assert [n for n in names if n in ("q", "b", "r", "s", "failures", "reset")] == ["q", "b", "r", "s", "failures", "reset"]
        assert names[-6:] == ["status", "subject", "case", "z", "seconds", "0"]
        assert {outline for _, outline in stops} == {"solid"}
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#detail h2 :text('theirs')")
        assert tab.evaluate("document.activeElement.tagName") == "H2"
        tab.keyboard.press("Shift+Tab")  # Next, Previous, All verdicts
        tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Shift+Tab")
        tab.keyboard.press("Enter")
        tab.wait_for_function("() => document.activeElement.dataset.at === '1'")
        tab.keyboard.press("End")
        assert tab.evaluate("document.activeElement.dataset.at") == str(MANY + 3)
        tab.keyboard.press("PageUp")
        assert int(tab.evaluate("document.activeElement.dataset.at")) < MANY - 2
        tab.keyboard.press("Home")
        assert tab.evaluate("document.activeElement.dataset.at") == "0"
        tab.focus("#failures")
        tab.keyboard.press("Space")
        expect_count(tab, 2)


def test_tables_have_headers_and_news_are_told(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        assert tab.evaluate("[...document.querySelectorAll('th')].every(t => t.scope)")
        assert tab.evaluate("[...document.querySelectorAll('input, select')].every(i => i.labels.length)")
        assert tab.get_attribute("#shown", "aria-live") == "polite"
        assert tab.get_attribute("html", "lang") == "en"
        unnamed = "[...document.querySelectorAll('a, button, [role=region], [role=img], progress')]"
        unnamed += ".filter(e => !(e.textContent.trim() || e.getAttribute('aria-label'))).length"
        assert tab.evaluate(unnamed) == 0
        levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Any, report: Path, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    with watched(browser, color_scheme=scheme) as visit:
        tab = visit(report)
        back = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(back) < 60) == (scheme == "dark")
        for address in ("", "#v=0", "#v=2"):
            found = visit(report, address).evaluate(CONTRAST)
            assert (found["bad"], found["pairs"] >= 4) == ([], True)


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    with watched(browser, viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True) as visit:
        for address in ("", "#v=0", "#v=1", "#v=2000"):
            tab = visit(report, address)
            assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        tab = visit(report)
        tab.tap("#body a >> nth=0")
        tab.wait_for_selector("#detail img")
        assert tab.evaluate("document.querySelector('#detail img').getBoundingClientRect().right") <= width


def test_paper_has_no_controls(browser: Any, report: Path) -> None:
    with watched(browser) as visit:
        tab = visit(report)
        tab.emulate_media(media="print")
        assert [tab.is_visible(s) for s in ("nav", ".filters", "#body", "h1")] == [False, False, True, True]


def test_hostile_verdicts_are_text(browser: Any, tmp_path: Path) -> None:
    bad = []
    for n, attack in enumerate(ATTACKS):
        found = Finding(attack, attack, {attack: attack, "output": attack})
        more = {"reason": attack, "findings": (found,), "notes": (found,), "plugins": (attack,), "rules": {attack[:99]: True}}
        one = verdict(Status.WRONG, n, attack, **more)
        one = replace(
            one, diagnosis=Diagnosis(attack, attack, 1.0, {attack: [attack]}), environment={attack: attack, "arch": attack}
        )
        bad += [one, replace(one, case_id=CASE.format("bf16", 100 + n), known=attack, picture=f"pictures/{attack[:40]}.png")]
    links = {attack: f"javascript:{attack}" for attack in ATTACKS}
    info = RunInfo("2026-01-02T03:04:05+00:00", ATTACKS[0], ATTACKS[1], ATTACKS[2], revision=ATTACKS[1])
    reached = {attack: [Ways(2, 1, 2)] for attack in ATTACKS}
    shown = Report(tmp_path, ordered(bad), info=info, reached=reached, links=links, changes=compare([], bad), previous="x")
    path = tmp_path / "report.html"
    page.write(path, shown)
    assert path.stat().st_size < 2 << 20
    with watched(browser) as visit:
        tab = visit(path)
        for n in range(len(bad)):
            tab.evaluate(f"location.hash = 'v={n}'")
            tab.wait_for_selector("#detail h2")
            assert tab.evaluate(
                "[window.pwned, document.querySelectorAll('#detail img, #detail script, iframe, svg svg').length]"
            ) == [None, 0]
            assert not tab.evaluate("[...document.querySelectorAll('a')].some(a => a.protocol === 'javascript:')")
            assert not tab.evaluate("/[\\u2028\\u2029\\u202e\\u001b\\u0000\\ufeff]/.test(document.body.innerText)")
        tab.evaluate("location.hash = 'v=0'")
        assert "<script>window.pwned=1</script>" in tab.inner_text("#detail .lead")
        for address in (f"#q={ATTACKS[1]}", "#b=%3Cscript%3E&sort=__proto__", "#v=99999", "#v=<img>", "#o=constructor", "#%"):
            assert visit(path, address).evaluate("[window.pwned, document.documentElement.dataset.ready]") == [None, "yes"]


def test_a_report_of_faults_alone_opens(browser: Any, tmp_path: Path) -> None:
    kills = page_parts.kills(ROOT / "configs/baselines/cpu_ci_faults.json")
    page.write(tmp_path / "f.html", Report(kills=kills))
    with watched(browser) as visit:
        assert f"{kills.killed} of {kills.planted} planted faults killed" in visit(tmp_path / "f.html").inner_text("h1")


def test_a_missing_browser_is_a_skip_here_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECHECK_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception):
        _missing("no browser")
    monkeypatch.setenv("MOECHECK_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception):
        _missing("no browser")
    assert "MOECHECK_BROWSER=required" in (ROOT / ".ci/run").read_text()
