"""The journal: what was written is read back, a kill costs one line at most, and nothing is ever there twice."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import RunFolderError
from harness.journal import NAME, Joined, Journal, read
from harness.select import Item
from harness.verdict import SCHEMA_VERSION, Comparison, Diagnosis, Finding, Sample, Stage, Status, Verdict

CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
INF, NAN = float("inf"), float("nan")

texts = st.text(max_size=20)
numbers = st.floats() | st.sampled_from((INF, -INF, NAN))
evidence = st.dictionaries(texts, st.integers() | texts | st.lists(texts, max_size=2), max_size=2)
comparisons = st.builds(
    Comparison,
    lane=st.sampled_from(("exact", "real")),
    **{name: numbers for name in ("worst", "limit", "mean_z2", "mean_z2_limit", "rel_l2")},
    samples=st.lists(st.builds(Sample, expected=numbers, got=numbers, z=numbers), max_size=2).map(tuple),
)
agreeing = comparisons.map(lambda c: replace(c, beyond=0, nonfinite=0, mean_z2=0.5, mean_z2_limit=INF))
common: dict[str, Any] = {
    "stage": st.sampled_from(Stage),
    "environment": st.dictionaries(texts, texts, max_size=3),
    "seconds": st.floats(0, 1e6),
    "known": texts,
    "plugins": st.lists(texts, max_size=2).map(tuple),
}
verdicts = st.builds(Verdict, status=st.just(Status.PASSED), comparison=agreeing, **common) | st.builds(
    Verdict,
    status=st.sampled_from([s for s in Status if s is not Status.PASSED]),
    reason=st.text(min_size=1, max_size=20),
    findings=st.lists(st.builds(Finding, evidence=evidence), max_size=2).map(tuple),
    comparison=st.none() | comparisons,
    diagnosis=st.none() | st.builds(Diagnosis),
    **common,
)


def failed(tokens: int, reason: str = "killed by SIGSEGV during launch") -> Verdict:
    return Verdict(CASE.format(tokens), "ours", Status.CRASHED, Stage.LAUNCH, reason, environment={"arch": "cpu"})


def recorded(folder: Path, *verdicts: Verdict) -> bytes:
    """The bytes of a journal of these verdicts."""
    journal = Journal(folder)
    for verdict in verdicts:
        journal.append(verdict)
    journal.close()
    return (folder / NAME).read_bytes()


@settings(max_examples=100, deadline=None)
@given(verdict=verdicts)
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    """Finite examples survive plain json.dumps too; inf and nan become text no other reader of JSON can parse."""
    text = json.dumps(verdict.to_json(), allow_nan=False)
    again = Verdict.from_json(json.loads(text))
    assert repr(again) == repr(verdict)  # repr: nan is not equal to itself
    assert json.dumps(again.to_json(), allow_nan=False) == text


@pytest.mark.parametrize("schema", [None, 0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION)])
def test_a_verdict_of_another_schema_is_refused(schema: object) -> None:
    with pytest.raises(ValueError, match="schema"):
        Verdict.from_json({**failed(1).to_json(), "schema": schema})


def test_verdicts_are_read_back_in_order_across_openings(tmp_path: Path) -> None:
    """One opening would not notice a journal that starts over."""
    wanted = [failed(t, f"line one\nline two \u2028 \udcff {t}") for t in range(4)]
    recorded(tmp_path, *wanted[:2])
    recorded(tmp_path, *wanted[2:])
    assert read(tmp_path) == wanted


def test_a_folder_without_a_journal_has_no_verdicts(tmp_path: Path) -> None:
    assert read(tmp_path) == []


def test_a_torn_last_line_is_dropped_and_overwritten_wherever_it_is_cut(tmp_path: Path) -> None:
    """A cut in the middle alone would miss the whole line without its newline, glued to the next one."""
    first, torn, after = failed(0), failed(1), failed(2)
    head = len(recorded(tmp_path, first))
    data = recorded(tmp_path, torn)
    for cut in range(head, len(data)):
        (tmp_path / NAME).write_bytes(data[:cut])
        assert read(tmp_path) == [first], cut
        recorded(tmp_path, after)
        assert read(tmp_path) == [first, after], cut


def test_a_case_is_never_recorded_twice(tmp_path: Path) -> None:
    """Within one opening a set in memory is enough; a resumed run has to learn it from the file."""
    recorded(tmp_path, failed(0))
    journal = Journal(tmp_path)
    with pytest.raises(AssertionError, match="already in"):
        journal.append(failed(0, "another reason"))
    journal.close()
    assert read(tmp_path) == [failed(0)]


def test_a_journal_in_use_is_not_opened_again(tmp_path: Path) -> None:
    """--resume of a run that still goes on: both would judge and record what is left."""
    first = Journal(tmp_path)
    with pytest.raises(RunFolderError, match="in use"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_two_processes_append_to_a_journal_that_a_third_holds(tmp_path: Path) -> None:
    """Half a line of a killed neighbour would be glued to the next; a worker that starts late must not plan anew."""
    recorded(tmp_path, failed(0))
    holder = Journal(tmp_path)
    size = holder.path.stat().st_size
    first, second = (Joined(tmp_path, size, tmp_path / "lock") for _ in range(2))
    first.append(failed(1))
    with holder.path.open("ab") as file:
        file.write(b'{"case_id": "torn')
    second.append(failed(2))
    first.append(failed(3))
    assert first.done == {Item(failed(t).case_id, "ours") for t in (0, 1, 3)}
    assert Joined(tmp_path, size, tmp_path / "lock").done == {Item(failed(0).case_id, "ours")}
    assert read(tmp_path) == [failed(t) for t in range(4)]
    for journal in (first, second, holder):
        journal.close()


def test_a_short_write_does_not_tear_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.write may write less than it was given: the next line would be glued to half of this one."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    recorded(tmp_path, failed(0), failed(1))
    assert read(tmp_path) == [failed(0), failed(1)]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once somebody makes room the next verdict would be glued to it, and nothing of the run could be read again."""
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:-100])

    journal = Journal(tmp_path)
    journal.append(failed(0))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFolderError, match=r"No space left.*--resume"):
        journal.append(failed(1))
    monkeypatch.setattr(os, "write", write)
    journal.append(failed(2))
    journal.close()
    assert read(tmp_path) == [failed(0), failed(2)]


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage",
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": 1}',
        json.dumps({**failed(0).to_json(), "x": 1}).encode(),
    ],
)
def test_a_line_that_is_no_verdict_is_located(tmp_path: Path, garbage: bytes) -> None:
    """Skipping it would judge its case again, and hide that somebody else writes here."""
    recorded(tmp_path, failed(0))
    with (tmp_path / NAME).open("ab") as file:
        file.write(garbage + b"\n")
    for attempt in (read, Journal):
        with pytest.raises(RunFolderError) as caught:
            attempt(tmp_path)
        assert f"{tmp_path / NAME}:2: not a verdict" in str(caught.value)
