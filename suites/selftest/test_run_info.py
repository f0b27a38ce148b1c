"""run.json: when a run was, and of what."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import run_info
from harness.errors import RunFolderError
from harness.run_info import RunInfo

INFO = RunInfo("2026-11-23T03:00:00+00:00", "cpu", "smoke", "abc", shard=(1, 4), revision="f" * 40)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert run_info.read(tmp_path) is None
    run_info.write(tmp_path, INFO)
    assert run_info.read(tmp_path) == INFO


def test_a_resumed_run_counts_the_time_of_both_parts(tmp_path: Path) -> None:
    first = INFO.stopped(2.5, whole=False)
    assert first.finished == ""
    second = first.stopped(1.0, whole=True)
    assert second.seconds == 3.5
    assert second.finished >= run_info.now()[:10]
    assert second.started == INFO.started


@pytest.mark.parametrize("text", ["", "[]", '{"started": 3}', '{"started": "x", "platform": "cpu", "tier": "ci", "plan": ""}'])
def test_anything_else_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / run_info.NAME).write_text(text)
    with pytest.raises(RunFolderError, match="not a moecheck run"):
        run_info.read(tmp_path)
