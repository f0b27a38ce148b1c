"""Kept plans' files: the same text without the work, and nothing that another program, request or machine would plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import plan_files
from harness.plan_files import READ, SOURCES, Text, kept

SOME = ["-b", "flashinfer_trtllm_fp8_block*", "-b", "vllm_marlin_mxfp4", "-b", "torch_*"]
ASKED: dict[str, Any] = {"platform": "cpu", "tier": "smoke", "backends": [], "ops": [], "cases": [], "plugins": []}


class Counted:
    """Makes a text, counting its calls."""

    def __init__(self) -> None:
        self.calls, self.told = 0, list[str]()

    def __call__(self) -> Text:
        self.calls += 1
        return Text('{"items": []}\n', ("one 1", "what"))

    def get(self, where: Path | None, asked: dict[str, Any] = ASKED) -> Text:
        return kept(where, asked, self, self.told.append)


def test_the_second_time_nothing_is_planned(tmp_path: Path) -> None:
    made = Counted()
    assert made.get(tmp_path) == made.get(tmp_path) == made()
    assert (made.calls, made.told) == (2, [])


def test_another_request_or_program_is_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counted()
    for asked in (ASKED, {**ASKED, "ops": ["moe"]}, {**ASKED, "tier": "ci"}):
        made.get(tmp_path, asked)
    assert made.calls == len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(plan_files, "_program", lambda: "other sources")
    made.get(tmp_path)
    assert (made.calls, len(list(tmp_path.iterdir()))) == (4, 3)  # the older program's file of the request is gone


def test_the_program_is_its_files_its_libraries_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for change in (
        lambda: None,
        lambda: monkeypatch.setenv("TRITON_INTERPRET", "1"),
        lambda: monkeypatch.syspath_prepend(tmp_path),
        lambda: monkeypatch.setattr(plan_files, "SOURCES", tmp_path),
    ):
        (tmp_path / "torch-9.9.dist-info").mkdir(exist_ok=True)
        change()
        found.append(plan_files._program.__wrapped__())
    assert len(set(found)) == 4


def test_planning_opens_no_file_that_the_key_leaves_out(tmp_path: Path) -> None:
    """Stored contracts, JSON, are a bisect's and the preflight's; a plan that asked them would hang on them."""
    program = (
        "import sys; opened = []; sys.addaudithook(lambda event, of: event == 'open' and opened.append(str(of[0])))\n"
        f"from harness import cli; sys.argv[1:] = {['plan', '--platform', 'sm100', *SOME, '-o', str(tmp_path / 'plan.json')]}\n"
        "cli.sys.exit = lambda code: None; cli.main(); print(*opened, sep='\\n')"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    rooms = tuple(str(SOURCES / room) for room in ("harness", "reference", "configs"))  # beside them lies a virtual environment
    mine = {Path(line).suffix for line in done.stdout.splitlines() if line.startswith(rooms)}
    assert ".yaml" in mine
    assert mine <= {".py", ".pyc", ".yaml"}


def test_backends_read_no_other_environment() -> None:
    texts = [path.read_text() for path in (SOURCES / "harness" / "backends").glob("*.py")]
    names = [name for text in texts for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)", text)]
    assert names
    assert all(name.startswith(READ) for name in names)
    assert sum(text.count("environ") for text in texts) == len(names)


def test_what_comes_from_elsewhere_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counted()
    made.get(tmp_path, {**ASKED, "plugins": ["mine.py"]})
    made.get(None)
    monkeypatch.setattr(plan_files, "entry_points", lambda group: ["theirs"])
    made.get(tmp_path)
    assert made.calls == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b'{"digest": "0", "lines": []}\n{}', b"[]\n"])
def test_a_spoilt_file_is_made_anew_with_a_note(tmp_path: Path, data: bytes) -> None:
    made = Counted()
    wanted = made.get(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(data)
    assert made.get(tmp_path) == wanted
    assert "planned anew" in made.told[0]
    assert made.get(tmp_path) == wanted
    assert made.calls == 2


def test_a_folder_that_cannot_be_written_costs_the_time_only(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    made = Counted()
    assert made.get(tmp_path / "taken") == made()
    assert "not kept" in made.told[0]


def test_a_kept_plan_is_there_before_torch(tmp_path: Path) -> None:
    """Its import takes four times as long as the rest."""
    program = (
        "import sys; from harness import cli; sys.argv[1:] = {}; cli.sys.exit = print\n"
        "cli.main(); print('torch' in sys.modules)"
    )
    asked = ["plan", "--platform", "cpu", "-b", "torch_route", "-o", str(tmp_path / "plan.json")]
    told = []
    for _ in range(2):
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", program.format(asked)], env=env, capture_output=True, text=True, check=True
        )
        *lines, code, torch = done.stdout.splitlines()
        told.append((lines, (tmp_path / "plan.json").read_text()))
        assert code == "0"
    assert torch == "False"
    assert told[0] == told[1]
    assert "torch_route" in told[0][0][0]
