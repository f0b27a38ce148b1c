"""History names what regressed, what flakes, what drifts and what stopped being executed, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from harness import journal, run_info
from harness.errors import HistoryError
from harness.history import bench, store, synthetic
from harness.history.ledger import ledger, promises
from harness.history.query import History
from harness.history.rows import COLUMNS, Run, replay, row
from harness.history.store import Place, add
from harness.history.synthetic import Change, Night, failed, items, verdicts, write
from harness.select import Item
from harness.verdict import Finding, Status, Verdict
from harness.worker.replay import explained

pytest.importorskip("duckdb", reason="the extra `history` is not installed")

NIGHTS = 30
PLAN = items(70)
ITEMS = {name: [i for i in PLAN if i.subject == name] for name in synthetic.RECIPES}
REGRESSED, DEPENDENT, FIXED, NEVER = (ITEMS["onnxruntime_moe"][3 * i] for i in (2, 3, 4, 5))  # all of recipe fp32
FLAKY, KNOWN = ITEMS["triton_moe"][7], ITEMS["triton_moe"][8]
STOPPED = "int8_channel-fp32"
AFTER = Finding("replay", "depends on what ran before", {"after": ["a:b"]})


def night(number: int) -> Night:
    """A library moves at 9, another at 22; moecheck itself every five nights."""
    versions = {"torch": "2.13.0" if number < 9 else "2.14.0", "triton": "3.7.1"}
    return Night(number, {**versions, "onnxruntime": "1.32.0" if number < 22 else "1.33.0"}, f"{number // 5:040x}")


def planted(when: Night, right: Verdict) -> Verdict | None:
    """What the thirty nights hold."""
    item, number = Item(right.case_id, right.subject), when.number
    if item == REGRESSED and number >= 22:
        return failed(right)
    if item == FLAKY and number in (3, 11, 12, 19, 27):
        return failed(right, Status.CRASHED, "killed by SIGSEGV during launch")
    if right.subject == "onnxruntime_moe" and f".{STOPPED}." in right.case_id and number >= 18:
        return failed(right, Status.UNAVAILABLE, "onnxruntime without QMoE")
    if item == DEPENDENT and number in (11, 13):
        return replace(failed(right, Status.CRASHED, "killed by SIGABRT"), findings=(AFTER,))
    if item == NEVER or (item == FIXED and number < 5):
        return failed(right)
    if item == KNOWN:
        return replace(failed(right), known="wrong-dot")
    return right if item != PLAN[0] or number > 4 else None  # planned from the fifth night on


def history(root: Path, nights: int = NIGHTS, change: Change = planted) -> Path:
    """Run folders as `moecheck run` leaves them."""
    for number in range(nights):
        write(root / f"{number:03}", night(number), verdicts(night(number), PLAN, change))
    return root


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return history(tmp_path_factory.mktemp("thirty") / "runs")


@pytest.fixture
def opened(tmp_path: Path, thirty: Path) -> Iterator[Callable[[Path | str], History]]:
    """Opens histories, closes them in the end."""
    made: list[History] = []

    def make(root: Path | str) -> History:
        made.append(History(str(root), (thirty.parent if root == thirty else tmp_path) / "cache"))
        return made[-1]

    yield make
    for one in made:
        one._connection.close()


def test_thirty_nights_name_the_regression_the_flake_and_the_lost_cell(
    thirty: Path, opened: Callable[[Path | str], History]
) -> None:
    """And nothing else: a bug that was fixed, one that never passed, a known issue and a death that needs what ran before."""
    asked = opened(thirty)
    (regression,) = asked.regressions()
    assert Item(regression.case_id, regression.subject) == REGRESSED
    assert (regression.good, regression.bad, regression.runs) == ("021", "022", 8)
    assert regression.changed == "onnxruntime 1.32.0 -> 1.33.0"
    (flake,) = asked.flakes()
    assert Item(flake.case_id, flake.subject) == FLAKY
    cells = ledger(asked.facts(), (), night(NIGHTS).started)
    (lost,) = [cell for cell in cells if cell.stopped]
    assert (lost.backend, lost.recipe, lost.reason) == ("onnxruntime_moe", STOPPED, "UNAVAILABLE: onnxruntime without QMoE")
    assert (lost.last, lost.stopped) == (night(17).started.isoformat(), night(18).started.isoformat())
    assert not [d for d in asked.drift() if d.moved]
    assert len(asked.runs()) == NIGHTS
    assert not asked.left_out


def test_only_runs_of_the_same_code_make_a_flake(tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    """The verdict may have changed because moecheck did: uncommitted changes or a journal that does not say prove nothing."""

    def flips(when: Night, right: Verdict) -> Verdict:
        return failed(right) if when.number == 1 and right.case_id == PLAN[0].case_id else right

    for revision, flakes in (("a" * 40, 1), ("a" * 40 + "+", 0)):
        root = tmp_path / revision
        for number in range(3):
            when = replace(night(number), revision=revision)
            write(root / str(number), when, verdicts(when, PLAN[:3], flips))
        assert len(opened(root).flakes()) == flakes
    for folder in root.iterdir():
        (folder / run_info.NAME).unlink()
    asked = opened(root)
    assert not asked.flakes()
    assert {run.dated for run in asked.runs()} == {"mtime"}


def test_the_flake_rate_is_of_all_runs_at_versions_that_pass_it(thirty: Path, opened: Callable[[Path | str], History]) -> None:
    (flake,) = opened(thirty).flakes()
    assert (flake.failed, flake.runs, flake.vanished) == (5, NIGHTS, 0)
    assert [i for i, letter in enumerate(flake.pattern) if letter == "F"] == [3, 11, 12, 19, 27]


@pytest.mark.parametrize(
    ("answers", "before", "kind"),
    [
        ([True], 0, "alone"),
        ([False], 0, "vanished"),
        ([False, False], 2, "vanished"),
        ([False, True, None], 2, "after"),
        ([False, None], 2, "open"),
        ([None], 2, ""),
    ],
)
def test_what_fresh_children_said_is_read_from_the_finding(answers: list[bool | None], before: int, kind: str) -> None:
    """By the words of harness/worker/replay.py where its evidence is empty: another wording there must fail here."""
    right = synthetic.verdict(PLAN[0], night(0))
    told = iter(answers)
    assert replay(explained(failed(right, Status.CRASHED), PLAN[1 : 1 + before], lambda _: next(told, False))) == kind


def test_a_death_that_fresh_children_do_not_repeat_is_a_flake_and_one_that_came_to_stay_is_not(
    tmp_path: Path, opened: Callable[[Path | str], History]
) -> None:
    """Same versions, passed before, dies now. Alone in a fresh child too: something unrecorded changed; that is no chance."""

    def dies(evidence: Finding) -> Change:
        return lambda when, v: replace(failed(v, Status.CRASHED), findings=(evidence,)) if when.number > 2 else v

    kinds = {"alone": Finding("replay", "", {"after": []}), "vanished": Finding("replay", "did not happen again: ...", {})}
    for kind, evidence in kinds.items():
        for number in range(5):
            when = replace(night(number), revision="a" * 40)
            write(tmp_path / kind / str(number), when, verdicts(when, PLAN[:1], dies(evidence)))
        asked = opened(tmp_path / kind)
        assert [len(asked.regressions()), len(asked.flakes())] == ([1, 0] if kind == "alone" else [0, 1])
        assert all(r.changed == "nothing that is recorded" for r in asked.regressions())


def test_drift_is_told_from_the_errors_that_a_release_draws_anew(
    tmp_path: Path, opened: Callable[[Path | str], History]
) -> None:
    """Ten percent more error in one recipe, in no case beyond a bound; the releases around it moved nothing."""

    def worse(when: Night, right: Verdict) -> Verdict:
        compared = right.comparison
        assert compared is not None
        if when.number < 22 or f".{STOPPED}." not in right.case_id:
            return right
        return replace(right, comparison=replace(compared, mean_z2=1.21 * compared.mean_z2, rel_l2=1.1 * compared.rel_l2))

    for number in range(0, NIGHTS, 6):
        write(tmp_path / str(number), night(number), verdicts(night(number), items(280), worse))
    found = opened(tmp_path).drift()
    assert len(found) == 4  # torch's release, and onnxruntime's for three recipes
    (moved,) = [drift for drift in found if drift.moved]
    assert (moved.recipe, moved.old, moved.new) == (STOPPED, "onnxruntime 1.32.0", "onnxruntime 1.33.0")
    assert moved.rel_l2 == pytest.approx(1.1, rel=0.02)
    assert moved.new_mean_z2 == pytest.approx(1.21 * (moved.old_mean_z2 or 0), rel=0.05)


def test_slow_cases_are_ranked_by_their_median(thirty: Path, opened: Callable[[Path | str], History]) -> None:
    found = opened(thirty).slowest(5)
    assert len(found) == 5
    assert [s.median_s for s in found] == sorted((s.median_s for s in found), reverse=True)
    assert all(s.worst_s >= s.median_s for s in found)


# ---- the store


def test_adding_twice_changes_nothing_and_a_longer_run_replaces_its_shorter_self(
    tmp_path: Path, opened: Callable[[Path | str], History]
) -> None:
    place = Place(str(tmp_path / "history"))
    found = verdicts(night(0), PLAN[:9])
    part = write(tmp_path / "run", night(0), found[:4])
    first = add(part, place)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "history").rglob("*")}
    assert (first.new, first.verdicts) == (True, 4)
    assert add(part, place) == replace(first, new=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "history").rglob("*")} == before
    with (part / journal.NAME).open("a") as file:  # resumed, and killed in the middle of a line
        file.writelines(json.dumps(v.to_json()) + "\n" for v in found[4:])
        file.write('{"case_id": "mo')
    assert add(part, place).verdicts == 9
    (run,) = opened(tmp_path / "history").runs()
    assert run.verdicts == 9
    assert len(journal.read(tmp_path / "history" / run.run)) == 9


def test_a_history_may_be_an_object_store(thirty: Path, opened: Callable[[Path | str], History]) -> None:
    url = f"memory://{random.random()}/nightly"
    folders = sorted(thirty.iterdir())[16:24]
    assert all(add(folder, Place(url)).new for folder in folders)
    assert not add(folders[3], Place(url)).new
    asked = opened(url)
    assert [r.good_started for r in asked.regressions()] == [night(21).started.isoformat()]
    assert {f.stopped for f in asked.facts()} == {"", night(18).started.isoformat()}


def test_plain_run_folders_in_an_object_store_are_read(thirty: Path, opened: Callable[[Path | str], History]) -> None:
    """Somebody's `aws s3 cp`: no Parquet file there."""
    place = Place(f"memory://{random.random()}")
    for name in (run_info.NAME, journal.NAME):
        place.write(thirty / "002" / name, "002", name)
    (run,) = opened(place.url).runs()
    assert (run.started, run.dated) == (night(2).started.isoformat(), "run.json")


def test_many_may_add_at_once(thirty: Path, tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    """The same run from several machines too: each file is whole or not there."""
    folders = sorted(thirty.iterdir())[:6] * 3
    with ThreadPoolExecutor(6) as pool:
        names = {added.name for added in pool.map(lambda folder: add(folder, Place(str(tmp_path / "history"))), folders)}
    assert len(names) == 6
    assert {p.name for p in (tmp_path / "history").rglob("*") if p.is_file()} == set(store.PARTS)
    assert len(opened(tmp_path / "history").runs()) == 6


def test_the_cache_follows_the_journal(tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    found = verdicts(night(0), PLAN[:9])
    run = write(tmp_path / "runs" / "a", night(0), found[:4])
    assert [r.verdicts for r in opened(tmp_path / "runs").runs()] == [4]
    with (run / journal.NAME).open("a") as file:
        file.writelines(json.dumps(v.to_json()) + "\n" for v in found[4:])
    assert [r.verdicts for r in opened(run).runs()] == [9]
    assert [r.verdicts for r in opened(tmp_path / "runs").runs()] == [9]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the stale one is gone


def test_a_journal_without_run_json_is_dated_by_its_file(tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    run = write(tmp_path / "old", night(0), verdicts(night(0), PLAN[:2]))
    (run / run_info.NAME).unlink()
    when = night(9).started
    os.utime(run / journal.NAME, (when.timestamp(), when.timestamp()))
    add(run, Place(str(tmp_path / "history")))
    shutil.rmtree(run)
    (seen,) = opened(tmp_path / "history").runs()
    assert (seen.started, seen.dated, seen.platform) == (when.isoformat(), "mtime", "cpu")


def test_a_damaged_run_is_left_out_and_named(thirty: Path, tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    shutil.copytree(thirty / "001", tmp_path / "runs" / "good")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / journal.NAME).write_text("{}\n")
    asked = opened(tmp_path / "runs")
    assert [run.run for run in asked.runs()] == ["good"]
    assert "bad/journal.jsonl:1" in asked.left_out[0]


@pytest.mark.parametrize("content", [b"", b"PAR1 something else"])
def test_a_damaged_parquet_file_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / store.NAME).write_bytes(content)
    with pytest.raises(HistoryError, match="no Parquet of moecheck's"):
        History(str(tmp_path), tmp_path / "cache")


def test_a_strangers_parquet_file_drives_nothing(tmp_path: Path, moecheck: Callable[..., Any]) -> None:
    """Its rows are typed, and its words may be anything: markup, colours, versions that are no JSON, a time that is none."""
    run = Run("[red]r", "i", "2026-01-01T03:00:00+00:00", "run.json", "cpu", "ci", "p", "", "c")
    rows = [row(v, run) for v in verdicts(night(0), PLAN[:1])] * 2
    rows[1] = {**rows[0], "run": "s", "identity": "j", "status": "WRONG", "outcome": "red", "failed": True, "versions": "]{"}
    rows = [{**one, "device": "[/bold]\x1b[31mred"} for one in rows]

    def write_rows(started: str) -> None:
        for name, one in zip("rs", rows, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / "rows.jsonl").write_text(json.dumps({**one, "started": started if name == "s" else one["started"]}))
            columns = ", ".join(f"{key}: '{kind}'" for key, kind in COLUMNS.items())
            read = f"read_json('{tmp_path}/rows.jsonl', format = 'newline_delimited', columns = {{{columns}}})"
            store.duckdb().sql(f"COPY (SELECT * FROM {read}) TO '{tmp_path}/{name}/{store.NAME}' (FORMAT parquet)")

    write_rows("2026-01-02T03:00:00+00:00")
    told = moecheck("history", str(tmp_path))
    assert told.code == 1
    assert "versions - -> ]{" in told.out
    shown = moecheck("coverage", str(tmp_path), "--platform", "cpu", "--now", "2026-01-03")
    assert shown.code == 0
    assert "\x1b[31m" not in told.out + shown.out
    for wrong in ("yesterday", "2026-01-02"):
        write_rows(wrong)
        assert "wanted ISO 8601 with its zone" in moecheck("history", str(tmp_path)).err


def test_hostile_words_and_names_go_through(tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    """Lone surrogates and zero bytes are JSON, quotes and brackets are file names."""
    hostile = "a'; DROP TABLE kept; --\ud800\x00" + "\u202e"
    found = [failed(v, reason=hostile) for v in verdicts(night(0), PLAN[:1])]
    add(write(tmp_path / "r'[a]*" / "x", night(0), found), Place(str(tmp_path / "h'[a]*")))
    for root in ("r'[a]*", "h'[a]*"):
        assert [run.failed for run in opened(tmp_path / root).runs()] == [1]
    kept = row(found[0], Run("r", "i", "s", "d", "cpu", "ci", "p", "", "c"))["reason"]
    assert kept == "a'; DROP TABLE kept; --\\ud800\\x00\\u202e"


def test_an_empty_folder_and_a_url_nobody_knows_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="no run in it"):
        History(str(tmp_path), tmp_path / "cache")
    with pytest.raises(HistoryError, match="URL of fsspec"):
        Place("gopher://x/y")


def test_shards_of_one_night_are_not_each_others_end(tmp_path: Path, opened: Callable[[Path | str], History]) -> None:
    """The second shard starts an hour later and has other cells: nothing stopped. The next night it did."""
    for number in range(2):
        for shard in (1, 2):
            mine = [i for i in PLAN if (i.subject == "triton_moe") == (shard == 2)][: 30 if (number, shard) == (1, 1) else None]
            folder = write(tmp_path / f"{number}-{shard}", night(number), verdicts(night(number), mine))
            started = (night(number).started + timedelta(hours=shard)).isoformat()
            run_info.write(folder, replace(night(number).info(len(mine)), shard=(shard, 2), started=started))
    facts = opened(tmp_path).facts()
    assert not [f for f in facts if f.stopped]
    assert {f.backend for f in facts} == set(synthetic.RECIPES)
    assert ledger(facts, promises([], {}), night(3).started)


def test_the_benchmark_asks_everything_of_a_history_of_the_size_it_says(tmp_path: Path) -> None:
    measured = bench.measure(tmp_path, runs=6, each=40)
    assert (measured.verdicts, measured.added) == (240, 40)
    assert set(measured.seconds) == {"open", *bench.QUESTIONS}
