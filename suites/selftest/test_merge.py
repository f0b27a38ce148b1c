"""moecheck plan and merge: shards of one plan become one run; what is missing, strange or contradictory is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from harness import config, durations, journal, plan, run_info
from harness.plan import Plan, Request
from harness.select import Item
from harness.session import begin
from harness.shard import Shard
from harness.verdict import Comparison, Stage, Status, Verdict

CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.exact.s0"
ITEMS = tuple(sorted(Item(CASE.format(tokens), "torch_grouped_mm") for tokens in range(1, 13)))
PLAN = Plan(Request("cpu", "smoke"), 60.0, ITEMS, 0, seconds=(1.0,) * len(ITEMS))
SAME = Comparison("exact", 64, 0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 0, ())
PICTURE = b"\x89PNG\r\n\x1a\n of an error"


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def verdict_of(item: Item, status: Status = Status.PASSED, picture: str = "", seconds: float = 1.0) -> Verdict:
    compared = SAME if status is Status.PASSED else None
    return Verdict(item.case_id, item.subject, status, Stage.DONE, "because", (), compared, picture=picture, seconds=seconds)


def record(folder: Path, verdicts: list[Verdict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    book = journal.Journal(folder)
    for verdict in verdicts:
        book.append(verdict)
    book.close()


def shard_in(folder: Path, index: int, count: int = 3, of: Plan = PLAN, **changes: Status) -> Path:
    """A finished shard; changes: t1=Status.WRONG is what it says of the case of one token."""
    shard = Shard(index, count)
    folder.mkdir(parents=True)
    begin(of, folder, shard)
    record(folder, [verdict_of(i, changes.get(i.case_id.split(".")[2], Status.PASSED)) for i in of.share(shard).items])
    info = run_info.read(folder)
    assert info is not None
    run_info.write(folder, replace(info, started=f"2026-11-23T0{index}:00:00+00:00").stopped(10.0, whole=True))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [shard_in(tmp_path / f"s{index}", index) for index in (1, 2, 3)]


def merged(moecheck: Call, out: Path, *folders: Path) -> Answer:
    return moecheck("merge", *map(str, folders), "--out", str(out))


def test_shards_make_the_whole_run(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    """In the plan's order, whatever order they are given in."""
    answer = merged(moecheck, tmp_path / "all", *reversed(shards))
    assert (answer.code, answer.err) == (0, "")
    assert [Item(v.case_id, v.subject) for v in journal.read(tmp_path / "all")] == list(ITEMS)
    assert plan.load(tmp_path / "all") == PLAN
    info = run_info.read(tmp_path / "all")
    assert info is not None
    assert (info.shard, info.seconds, info.started) == (None, 30.0, "2026-11-23T01:00:00+00:00")
    assert info.finished
    assert {path.name for path in (tmp_path / "all").iterdir()} >= {"junit.xml", "coverage.json", "summary.md"}
    assert 'tests="12"' in (tmp_path / "all" / "junit.xml").read_text()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failure_anywhere_fails_the_whole(moecheck: Call, tmp_path: Path) -> None:
    folders = [shard_in(tmp_path / f"s{index}", index, t5=Status.WRONG) for index in (1, 2, 3)]
    answer = merged(moecheck, tmp_path / "all", *folders)
    assert answer.code == 1
    assert "1 failed" in answer.out


def test_a_shard_that_is_missing_is_named(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    """A red case does not hide that others were never judged: 2, not 1."""
    answer = merged(moecheck, tmp_path / "all", shards[0], shards[2])
    assert answer.code == 2
    assert "4 verdicts are missing of a plan of 12" in answer.err
    assert "4 of 4 of shard 2/3: no folder of it was given: moecheck run --plan PLAN --shard 2/3 --out DIR" in answer.err
    info = run_info.read(tmp_path / "all")
    assert info is not None
    assert info.finished == ""
    assert (tmp_path / "all" / "junit.xml").read_text().count("planned but not run") == 4


def test_a_shard_that_died_is_named_with_how_to_finish_it(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    lines = (shards[1] / journal.NAME).read_text().splitlines(keepends=True)
    (shards[1] / journal.NAME).write_text("".join(lines[:2]) + lines[2][:40])  # killed within a line
    answer = merged(moecheck, tmp_path / "all", *shards)
    assert answer.code == 2
    assert f"2 of 4 of shard 2/3: moecheck run --resume {shards[1]}" in answer.err


def test_the_rest_can_be_run_where_it_was_merged(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    merged(moecheck, tmp_path / "part", *shards[:2])
    answer = merged(moecheck, tmp_path / "all", tmp_path / "part", shards[2])
    assert answer.code == 0


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (replace(PLAN, items=ITEMS[:11], seconds=PLAN.seconds[:11]), f"not {PLAN.digest}"),
        (replace(PLAN, seconds=(2.0, *PLAN.seconds[1:])), "planned with other seconds"),
        (replace(PLAN, limit_s=30.0), "planned with other limit_s"),
    ],
)
def test_shards_of_another_plan_are_refused_by_name(
    moecheck: Call, shards: list[Path], tmp_path: Path, other: Plan, hint: str
) -> None:
    """Balanced from other durations, the shards overlap and leave gaps: the same items are not the same plan."""
    stranger = shard_in(tmp_path / "stranger", 2, of=other)
    answer = merged(moecheck, tmp_path / "all", shards[0], stranger)
    assert answer.code == 3
    for text in (str(stranger), str(shards[0]), hint):
        assert text in answer.err
    assert not (tmp_path / "all").exists()


def test_a_folder_twice_or_an_out_that_is_taken_is_refused(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    twice = merged(moecheck, tmp_path / "all", *shards, shards[0] / ".." / "s1")
    assert (twice.code, "given twice" in twice.err) == (3, True)
    taken = merged(moecheck, shards[0], *shards)
    assert (taken.code, "not empty" in taken.err) == (3, True)


def test_somebody_elses_verdicts_are_refused(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    record(shards[0], [verdict_of(Item(CASE.format(99), "torch_grouped_mm"))])
    answer = merged(moecheck, tmp_path / "all", *shards)
    assert (answer.code, "1 verdicts that are not in its plan" in answer.err) == (3, True)


def test_an_item_judged_twice_alike_counts_once(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    """A shard that was started again from nothing on another machine: the later verdict stays."""
    mine = PLAN.share(Shard(1, 3)).items
    again = tmp_path / "again"
    again.mkdir()
    begin(PLAN, again, Shard(1, 3))
    record(again, [verdict_of(item, seconds=9.0) for item in mine])
    answer = merged(moecheck, tmp_path / "all", again, *shards)
    assert answer.code == 0
    assert f"{len(mine)} items were judged twice, with the same status" in answer.err
    assert {v.seconds for v in journal.read(tmp_path / "all") if Item(v.case_id, v.subject) in mine} == {9.0}


@pytest.mark.parametrize("later", [Status.PASSED, Status.CRASHED])
def test_an_item_judged_twice_differently_is_reported_and_the_graver_stays(
    moecheck: Call, shards: list[Path], tmp_path: Path, later: Status
) -> None:
    """Keeping the last one, whoever runs a flaky kernel twice gets it green."""
    mine = PLAN.share(Shard(1, 3)).items
    first = Status.CRASHED if later is Status.PASSED else Status.PASSED
    token = mine[0].case_id.split(".")[2]
    shard_in(tmp_path / "first", 1, **{token: first})
    again = shard_in(tmp_path / "again", 1, **{token: later})
    answer = merged(moecheck, tmp_path / "all", tmp_path / "first", again, *shards[1:])
    assert answer.code == 1
    assert f"torch_grouped_mm on {mine[0].case_id} was judged 2 times" in answer.err
    kept = next(v for v in journal.read(tmp_path / "all") if v.case_id == mine[0].case_id)
    assert kept.status is Status.CRASHED
    assert [note.check for note in kept.notes] == ["judged-twice"]
    assert kept.notes[0].evidence["statuses"] == [str(first), str(later)]


def test_pictures_come_along_and_nothing_from_outside(moecheck: Call, tmp_path: Path) -> None:
    """A journal is a file that somebody sent: its paths may point anywhere."""
    names = [
        "pictures/good.png",
        "../secret",
        "pictures/../../secret",
        "/etc/hostname",
        "pictures/link.png",
        "pictures/gone.png",
    ]
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    begin(PLAN, folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "pictures" / "good.png").write_bytes(PICTURE)
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "secret")
    record(folder, [verdict_of(item, picture=name) for item, name in zip(ITEMS, [*names, *[""] * 6], strict=True)])
    answer = merged(moecheck, tmp_path / "all", folder)
    assert answer.code == 0
    assert [path.name for path in (tmp_path / "all" / "pictures").iterdir()] == ["good.png"]
    assert (tmp_path / "all" / "pictures" / "good.png").read_bytes() == PICTURE
    assert "link.png: the picture is left out: it is a symbolic link" in answer.err


def test_what_a_sanitizer_said_comes_along(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    """Its red verdict is in a journal of its own, and would be lost with the folder."""
    record(shards[1] / "sanitizer" / "memcheck", [verdict_of(PLAN.share(Shard(2, 3)).items[0], Status.CORRUPTING)])
    answer = merged(moecheck, tmp_path / "all", *shards)
    assert answer.code == 1
    assert len(journal.read(tmp_path / "all" / "sanitizer" / "memcheck")) == 1


def test_parts_of_different_code_are_said(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    info = run_info.read(shards[0])
    assert info is not None
    run_info.write(shards[0], replace(info, revision="f" * 40))
    answer = merged(moecheck, tmp_path / "all", *shards)
    assert "the parts were run by different code" in answer.err
    assert run_info.read(tmp_path / "all").revision == ""  # type: ignore[union-attr]


def test_a_plan_for_a_machine_that_is_not_here(moecheck: Call, tmp_path: Path) -> None:
    file = tmp_path / "plans" / "sm90.json"
    answer = moecheck("plan", "--platform", "sm90", "-b", "torch_grouped_mm", "-o", str(file))
    assert answer.code == 0
    made = plan.load(file)
    assert made.request.platform == "sm90"
    assert len(made.seconds) == len(made.items)
    assert made.digest in answer.out


def test_the_plans_of_all_platforms(moecheck: Call, tmp_path: Path) -> None:
    """A platform without a case is said, and none at all is an error."""
    folder = tmp_path / "plans"
    select = ("--platform", "all", "-o", str(folder), "-b", "torch_compile")
    answer = moecheck("plan", *select)
    assert answer.code == 0
    made = {path.stem: plan.load(path) for path in folder.iterdir()}
    assert set(made) == set(config.names("platforms"))
    assert all(name == one.request.platform and one.digest in answer.out for name, one in made.items())
    few = moecheck("plan", "--platform", "all", "-o", str(tmp_path / "few"), "-b", "vllm_marlin_int4")
    assert few.code == 0
    assert 0 < len(list((tmp_path / "few").iterdir())) < len(made)
    assert "nothing to run" in few.err
    none = moecheck("plan", *select, "-c", "moe.fp5*")
    assert (none.code, "on no platform" in none.err) == (3, True)
    file = moecheck("plan", "--platform", "all", "-o", str(folder / "cpu.json"))
    assert (file.code, "give a folder" in file.err) == (3, True)


def test_a_plan_is_balanced_from_a_history(moecheck: Call, tmp_path: Path) -> None:
    """The median of the newest runs, of this platform only: a kernel that was slow last year is not slow."""
    item = Item(CASE.format(1).replace("exact", "real"), "torch_grouped_mm")
    for day in range(1, durations.RECENT + 3):
        run = tmp_path / "history" / f"run{day:02}"
        run.mkdir(parents=True)
        seconds = 500.0 if day <= 2 else 7.0
        record(run, [verdict_of(item, Status.WRONG, seconds=seconds)])
        info = run_info.RunInfo(f"2026-11-{day:02}T00:00:00+00:00", "cpu", "smoke", "x")
        run_info.write(run, info)
    elsewhere = replace(verdict_of(item, Status.WRONG, seconds=90.0), environment={"arch": "sm90"})
    record(tmp_path / "elsewhere", [elsewhere])
    assert durations.recorded([tmp_path / "history", tmp_path / "elsewhere"], "cpu") == {item: 7.0}
    select = ("-b", item.subject, "-c", item.case_id, "--platform", "cpu")
    moecheck("plan", *select, "-o", str(tmp_path / "p.json"), "--durations", str(tmp_path / "history"))
    assert plan.load(tmp_path / "p.json").seconds == (7.0,)


def test_durations_from_nowhere_and_a_plan_over_a_run_are_refused(moecheck: Call, shards: list[Path], tmp_path: Path) -> None:
    select = ("--platform", "cpu", "-b", "torch_grouped_mm")
    nothing = moecheck("plan", *select, "-o", str(tmp_path / "p.json"), "--durations", str(tmp_path / "nowhere"))
    assert (nothing.code, "neither a run nor a folder of runs" in nothing.err) == (3, True)
    over = moecheck("plan", *select, "-o", str(shards[0] / "plan.json"))
    assert (over.code, "is a run, whose plan stays" in over.err) == (3, True)
    assert json.loads((shards[0] / "plan.json").read_text())["digest"] == PLAN.digest
