"""docs/findings.md: every line that it tells the reader to type works, every script shows what it says."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.backends import discover
from harness.case import Case

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "findings.md"
SCRIPTS = sorted(p for p in (ROOT / "docs" / "findings").glob("*.py") if not p.stem.endswith("_common"))
LINES = re.findall(r"((?:moecheck repro|python3? docs/findings/)[^`\n#]*)", PAGE.read_text() if PAGE.exists() else "")
BUDGET_S = 60.0
spent: list[float] = []


def options(words: list[str], name: str) -> list[str]:
    """The values of a repeatable option."""
    return [value for flag, value in itertools.pairwise(words) if flag == name]


def test_the_page_tells_what_to_type() -> None:
    """No line found would leave the tests below without a case, and green."""
    assert LINES


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_a_line_to_type_names_things_that_exist(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "moecheck":
        assert Case.parse(words[2]).id == words[2]
        plugins = options(words, "--plugin")
        assert all((ROOT / plugin).is_file() for plugin in plugins)
        assert set(options(words, "--backend")) <= set(discover(str(ROOT / plugin) for plugin in plugins))
    else:
        assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_on_the_page(script: Path) -> None:
    assert script.name in PAGE.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_present_or_gone(script: Path) -> None:
    """Python's exit status for a traceback is 1 too: a script that breaks must not look like a defect."""
    library = script.stem.split("_")[0]
    if importlib.util.find_spec(library) is None or needs_gpu(script):
        pytest.skip(f"{script.stem} wants {library}" + (" and a GPU" if needs_gpu(script) else ""))
    if sum(spent) > BUDGET_S:
        pytest.skip(f"the others took {sum(spent):.0f} s")
    start = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=BUDGET_S)
    spent.append(time.monotonic() - start)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def needs_gpu(script: Path) -> bool:
    return "cuda" in script.read_text() and script.stem.split("_")[0] not in ("onnxruntime", "triton")
