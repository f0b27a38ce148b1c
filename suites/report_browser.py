"""A report page in a real browser, for people who change it: pictures to look at, and how long the largest page takes to open.

    python suites/report_browser.py shots report.html /tmp/shots      light, dark, phone; the list and the first failure
    python suites/report_browser.py speed --verdicts 100000           builds a page of that many and opens it

Needs Playwright and Chromium (MOECHECK_CHROMIUM, default: the chromium on PATH).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2, "has_touch": True},
    "phone_dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "device_scale_factor": 2},
}


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; its sandbox is off because root has none."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("MOECHECK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def shots(page: Path, folder: Path, row: int) -> None:
    """The page as people see it."""
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, options in VIEWS.items():
            context = browser.new_context(**options)
            tab = context.new_page()
            tab.goto(page.resolve().as_uri())
            tab.screenshot(path=folder / f"{name}.png")
            tab.screenshot(path=folder / f"{name}_whole.png", full_page=True)
            tab.goto(page.resolve().as_uri() + f"#v={row}")
            tab.screenshot(path=folder / f"{name}_failure.png", full_page=True)
            context.close()
    print(f"{len(VIEWS) * 3} pictures in {folder}")  # noqa: T201


def journal(folder: Path, verdicts: int) -> None:
    """A journal of so many lines, made of the stored ones of an H200 with seeds of their own."""
    stored = [line for name in ("vllm", "flashinfer", "deaths", "ci") for line in _lines(f"sm90_h200_{name}.jsonl")]
    with (folder / "journal.jsonl").open("w") as file:
        for seed, line in enumerate(islice(cycle(stored), verdicts)):
            data = json.loads(line)
            data["case_id"] = f"{data['case_id'].rpartition('.s')[0]}.s{seed}"
            file.write(json.dumps(data) + "\n")


def _lines(name: str) -> list[str]:
    return (ROOT / "configs" / "baselines" / name).read_text().splitlines()


def speed(verdicts: int) -> None:
    """Seconds and memory to build a page, its size, and how long until it can be used."""
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder, page = Path(name), Path(name) / "report.html"
        journal(folder, verdicts)
        child = os.fork()
        if not child:  # a process of its own, so that the memory is that of a report alone
            _build(folder, page)
            os._exit(0)
        os.waitpid(child, 0)
        with chromium() as browser:
            system = browser.new_browser_cdp_session()
            for attempt in ("first", "again"):
                tab = browser.new_page()
                before, started = _cpu(system), time.perf_counter()
                tab.goto(page.as_uri())
                tab.wait_for_selector("#body a")
                opened, busy = time.perf_counter() - started, _cpu(system) - before
                started = time.perf_counter()
                tab.fill("#q", "t17 e33")
                tab.wait_for_function("() => location.hash.includes('q=')")
                filtered = time.perf_counter() - started
                print(f"{attempt}: opened in {opened:.2f} s ({busy:.2f} s of CPU), filtered in {filtered:.2f} s")  # noqa: T201
                tab.close()


def _cpu(system: Any) -> float:
    """Seconds of CPU that the browser's processes have used."""
    return sum(process["cpuTime"] for process in system.send("SystemInfo.getProcessInfo")["processInfo"])


def _build(folder: Path, page: Path) -> None:
    marks = [(time.perf_counter(), time.process_time())]
    from harness.report import page as report

    def mark() -> str:
        marks.append((time.perf_counter(), time.process_time()))
        wall, cpu = (new - old for old, new in zip(*marks[-2:], strict=True))
        return f"{wall:.1f} s ({cpu:.1f} s of CPU)"

    imported = mark()
    loaded = report.load(folder, {})
    read = mark()
    report.write(page, loaded)
    wrote = mark()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = page.stat().st_size / 2**20
    print(f"{len(loaded.verdicts)} verdicts: import {imported}, read {read}, write {wrote}")  # noqa: T201
    print(f"a page of {size:.1f} MiB; peak memory {peak:.2f} GiB", flush=True)  # noqa: T201


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("shots")
    look.add_argument("page", type=Path)
    look.add_argument("folder", type=Path)
    look.add_argument("--row", type=int, default=0, help="of the verdict whose page is shown")
    commands.add_parser("speed").add_argument("--verdicts", type=int, default=100_000)
    asked = parser.parse_args()
    if asked.command == "shots":
        shots(asked.page, asked.folder, asked.row)
    else:
        speed(asked.verdicts)


if __name__ == "__main__":
    main()
