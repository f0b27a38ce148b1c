"""The bisect over overlays: a case and commands over a wheelhouse, killed at random points and resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from harness.errors import CannotTell, OverlayError, RunFolderError
from harness.select import Item
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict
from harness.versions import cases, env, judging
from harness.versions.bisect import Journal, Question, Run
from harness.versions.cases import Judged, lacking, signature
from harness.versions.env import Overlay, Terms
from harness.versions.search import Answer

TOY = "moecheck-toy"
CASE = "moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
PLUGIN = """
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as B

def prepare(case, inputs):
    import moecheck_toy
    launch = B[0].prepare(case, inputs)
    return replace(launch, call=lambda: moecheck_toy.scale(launch.call()))

BACKENDS = (replace(B[0], name="toy", library="moecheck-toy", prepare=prepare, entries=("moecheck_toy.scale",), script=None),)
"""


def toy(folder: Path, version: str, body: str, needs: str = "") -> Path:
    """A wheel of the toy."""
    info = f"moecheck_toy-{version}.dist-info"
    path = folder / f"moecheck_toy-{version}-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        archive.writestr("moecheck_toy/__init__.py", body)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {TOY}\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve releases; the function goes wrong at 1.7, 1.6 is cut off in the middle."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for minor in range(1, 13):
        toy(folder, f"1.{minor}", f"def scale(x):\n    return x * {2 if minor >= 7 else 1}\n")
    broken = folder / "moecheck_toy-1.6-py3-none-any.whl"
    broken.write_bytes(broken.read_bytes()[:100])
    monkeypatch.setattr(env, "cache_folder", lambda: tmp_path / "cache")
    return folder


def test_a_case_is_judged_over_each_release(moecheck: Callable[..., Any], wheels: Path, tmp_path: Path) -> None:
    """The verdicts' environment shows the overlay's version; 1.6 does not install and stays under suspicion."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    options = ("--good", "1.5", "--bad", "1.7", "--case", CASE, "--backend", "toy", "--platform", "cpu")
    more = (
        "--plugin",
        str(plugin),
        "--axis",
        "wheelhouse",
        "--wheelhouse",
        str(wheels),
        "--journal",
        str(tmp_path / "j"),
        "--files",
    )
    answer = moecheck("bisect", TOY, *options, *more)
    assert answer.code == 0, answer.err
    assert f"**{TOY}: toy on {CASE}: introduced in one of 1.6, 1.7 (those between could not be tested)**" in answer.out
    assert "* 1.7: WRONG constant_factor\n" in answer.out
    assert "* environment: python" in answer.out
    assert f"{TOY} 1.5\n" in answer.out  # the run before the answer
    assert f"--case {CASE} --backend toy --platform cpu --plugin {plugin} --axis wheelhouse" in answer.out
    assert "1 files differ: 0 of csrc and include, 1 Python" in answer.out
    rows = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()[1:]]
    assert [(r["version"], r["answer"]) for r in rows] == [("1.7", "bad"), ("1.5", "good"), ("1.6", "cannot tell")]
    assert "its wheel is corrupt" in rows[2]["text"]
    again = moecheck("bisect", TOY, *options, *more)
    assert "one of 1.6, 1.7" in again.out
    assert " bit " not in again.err


def verdict(status: Status, kind: str = "", check: str = "") -> Verdict:
    agrees = Comparison("z", 1, 0, 0.0, 1.0, 1.0, 2.0, 0.0, 0, 0, ())
    findings = (Finding(check, "text"),) if check else ()
    diagnosis = Diagnosis(kind, "text") if kind else None
    return Verdict("case", "toy", status, Stage.DONE, "why", findings, agrees, diagnosis, {TOY: "1"})


@pytest.mark.parametrize(
    ("seen", "answer", "text"),
    [
        (verdict(Status.PASSED), Answer.GOOD, "PASSED"),
        (verdict(Status.WRONG, "constant_factor"), Answer.BAD, "WRONG constant_factor"),
        (verdict(Status.WRONG, "zeros"), Answer.UNKNOWN, "another failure: WRONG zeros"),
        (verdict(Status.CRASHED, check="exception"), Answer.UNKNOWN, "another failure: CRASHED exception"),
        (verdict(Status.UNAVAILABLE), Answer.UNKNOWN, "UNAVAILABLE: why"),
        (verdict(Status.UNTRUSTED), Answer.UNKNOWN, "UNTRUSTED: why"),
        (CannotTell("no wheel"), Answer.UNKNOWN, "no wheel"),
    ],
)
def test_the_same_failure_has_the_same_signature(
    seen: Verdict | CannotTell, answer: Answer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*_: object) -> Verdict:
        if isinstance(seen, CannotTell):
            raise seen
        return seen

    monkeypatch.setattr(cases, "judge", judge)
    attempt = Judged(TOY, lambda v: Overlay(Path(), {}), None, Terms("cpu"), "WRONG constant_factor")  # type: ignore[arg-type]
    outcome = attempt("1.0")
    assert (outcome.answer, outcome.text) == (answer, text)
    first = Judged(TOY, lambda v: Overlay(Path(), {}), None, Terms("cpu"), None)  # type: ignore[arg-type]
    assert first("1.0").answer is (Answer.BAD if "failure" in text or "factor" in text else answer)
    assert signature(verdict(Status.CORRUPTING, "zeros", "mutated")) == "CORRUPTING mutated zeros"


def test_a_stored_contract_that_lacks_the_entry_needs_no_overlay() -> None:
    entry = "flashinfer.fused_moe.trtllm_mxint4_block_scale_routed_moe"
    with pytest.raises(CannotTell, match=f"flashinfer-python==0.6.5: its contract lacks {entry}"):
        lacking("flashinfer-python", "0.6.5", [entry])
    lacking("flashinfer-python", "0.7.2.post1", [entry, "elsewhere.function"])
    lacking(TOY, "1.0", ["moecheck_toy.scale"])


BISECT = """
import os, sys
from pathlib import Path
from harness.versions import axes, env
from harness.versions.bisect import Command, Journal, Question, bisect
from harness.versions.search import Model

os.setpgrp()
Path(started).touch()
axis = axes.releases("moecheck-toy", env.Source(wheelhouse=Path(wheels)), Path(cache), print)
question = Question("moecheck-toy", "1.1", "1.12", "toy", by="command")
journal = Journal(Path(path), question)
test = "import moecheck_toy; f = open(%r, 'a'); f.write('{version} '); f.close(); raise SystemExit(moecheck_toy.scale(1) != 1)"
attempt = Command([sys.executable, "-S", "-c", test % tried], 60, None, axis.overlay)
result = bisect(question, axis.span("1.1", "1.12"), attempt, journal, lambda run, test: None, Model())
Path(answer).write_text(f"{result.before} {result.first} {len(result.runs)}")
"""


class Bisect:
    """One bisect of the toy, in processes that may be killed; what it leaves lies in `folder`."""

    def __init__(self, wheels: Path, folder: Path) -> None:
        folder.mkdir()
        self.files = {name: folder / name for name in ("path", "tried", "answer", "started", "cache")}
        self._names = {"wheels": str(wheels)} | {name: str(path) for name, path in self.files.items()}
        self._context = multiprocessing.get_context("fork")  # the imports are here already; nothing but files is shared

    def run(self, limit_s: float | None) -> bool:
        """Run for so many seconds once it has begun, then kill -9 it and what it started; True if it was still at it."""
        self.files["started"].unlink(missing_ok=True)
        process = self._context.Process(target=exec, args=(BISECT, dict(self._names)))
        with warnings.catch_warnings(action="ignore"):  # of threads, from Python 3.12 on: this child uses none
            process.start()
        while not self.files["started"].exists() and process.is_alive():
            time.sleep(0.002)
        process.join(limit_s)
        if alive := process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        assert alive or process.exitcode == 0
        return alive

    def runs(self) -> list[tuple[str, str, str]]:
        """(version, answer, text) of the journal."""
        rows = [json.loads(line) for line in self.files["path"].read_text().splitlines()[1:]]
        return [(r["version"], r["answer"], r["text"]) for r in rows]


def test_killed_at_ten_random_points_and_resumed(wheels: Path, tmp_path: Path) -> None:
    """kill -9 of the bisect and of what it had started, uv or the test: the same runs, none of those recorded twice."""
    whole, killed, dice = Bisect(wheels, tmp_path / "whole"), Bisect(wheels, tmp_path / "killed"), random.Random(0)
    began = time.monotonic()
    assert not whole.run(None)
    took = time.monotonic() - began
    points = [killed.run(dice.uniform(0, took / 8)) for _ in range(10)]
    assert all(points)
    assert not killed.run(None)
    assert killed.files["answer"].read_text() == whole.files["answer"].read_text()
    assert killed.files["answer"].read_text().startswith("1.5 1.7 ")
    assert killed.runs() == whole.runs()
    tried = {which: which.files["tried"].read_text().split() for which in (whole, killed)}
    assert len(tried[whole]) == sum(answer != "cannot tell" for _, answer, _ in whole.runs())
    assert len(tried[whole]) <= len(tried[killed]) <= len(tried[whole]) + 10  # at most the one in flight is tried again
    assert not [
        p for p in (tmp_path / "killed" / "cache" / "overlays").iterdir() if p.name.startswith(".") and p.suffix != ".dead"
    ]


# what goes wrong

TEST = f"{sys.executable} -S -c 'import moecheck_toy; raise SystemExit(moecheck_toy.scale(1) != 1)'"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """1.1 is good, 1.7 bad; of those between one is yanked, one early, one cut off, one wants an old torch."""
    folder = tmp_path / "simple" / TOY
    folder.mkdir(parents=True)
    rows = []
    for version in ("1.1", "1.2", "1.3rc1", "1.4", "1.5", "1.7"):
        needs = "Requires-Dist: torch<2\n" if version == "1.4" else ""
        path = toy(folder, version, f"def scale(x):\n    return x * {2 if version == '1.7' else 1}\n", needs)
        path.write_bytes(path.read_bytes()[: 100 if version == "1.5" else None])
        rows.append(f'<a href="{path.name}"{" data-yanked=" if version == "1.2" else ""}>{path.name}</a>')
    torch = folder.parent / "torch"
    torch.mkdir()
    old = torch / "torch-1.0-py3-none-any.whl"
    with ZipFile(old, "w") as archive:
        archive.writestr("torch-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
        archive.writestr("torch-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("torch-1.0.dist-info/RECORD", "")
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{'<br>'.join(rows)}</body></html>")
    (torch / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{old.name}">{old.name}</a></body></html>')
    monkeypatch.setattr(env, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    return (tmp_path / "simple").as_uri()


def test_each_release_that_cannot_be_told_is_a_sentence(moecheck: Callable[..., Any], index: str) -> None:
    """Yanked, cut off, a downgrade of torch: stepped around, with the reason. A pre-release only as an end."""
    ends = ("--good", "1.1", "--bad", "1.7", "--command", TEST, "--axis", "release", "--index", index)
    answer = moecheck("bisect", TOY, *ends)
    assert answer.code == 0, answer.err
    assert "introduced in one of 1.2, 1.4, 1.5, 1.7 (those between could not be tested)" in answer.out
    assert "1.2: cannot tell, moecheck-toy==1.2 is yanked: " in answer.out
    torch = f"1.4: cannot tell, moecheck-toy==1.4: it would replace torch {metadata.version('torch')} -> 1.0, a downgrade;"
    assert f"{torch} --allow torch lets it be replaced, in the overlay only\n" in answer.out
    assert "1.5: cannot tell, moecheck-toy==1.5: its wheel is corrupt: " in answer.out
    assert "1.3rc1" not in answer.out
    early = moecheck("bisect", TOY, "--good", "1.3rc1", *ends[2:])
    assert "last release without the change: 1.3rc1" in early.out


def test_what_is_no_answer_of_a_release_stops_the_bisect(
    moecheck: Callable[..., Any], wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network, a full disk: one sentence, exit code 3, and what was learnt is kept."""
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    nowhere = ("--axis", "release", "--index", "http://127.0.0.1:9/simple")
    cut = moecheck("bisect", TOY, "--good", "1.1", "--bad", "1.12", "--command", TEST, *nowhere)
    assert (cut.code, cut.out) == (3, "")
    assert "the index cannot be reached: [Errno 111] Connection refused" in cut.err
    known = moecheck("bisect", "flashinfer-python", "--good", "0.6.4", "--bad", "0.6.5", "--command", "true", *nowhere)
    assert known.code == 3
    assert "the releases whose contracts are stored are taken, without dates" in known.err
    assert "give --wheelhouse DIR, a folder of wheels" in known.err
    toy(wheels, "1.11", "def scale(x):\n    return 1\n" + "#" * 300_000)
    journal = tmp_path / "j"
    options = ("--good", "1.11", "--bad", "1.12", "--command", TEST, "--wheelhouse", str(wheels), "--journal", str(journal))
    with files_of_at_most(100_000):
        full = moecheck("bisect", TOY, *options)
    assert full.code == 3
    assert f"moecheck: moecheck-toy==1.11: no room under {tmp_path / 'cache'}: " in full.err
    assert "Traceback" not in full.err
    assert len(journal.read_text().splitlines()) == 2  # the question, and the bad end
    assert "introduced in 1.12**" in moecheck("bisect", TOY, *options).out


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit on the size of files stands in for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_journal_on_a_full_disk_loses_one_run(tmp_path: Path) -> None:
    """What fits of the line is dropped by the next reader."""
    question = Question(TOY, "1.1", "1.2", "x", by="command")
    journal = Journal(tmp_path / "j", question)
    run = Run("1.1", Answer.GOOD, "exit 0", 1.0)
    journal.append(run)
    with (
        files_of_at_most((tmp_path / "j").stat().st_size + 9),
        pytest.raises(RunFolderError, match="free some room, only this"),
    ):
        journal.append(run)
    journal.close()
    again = Journal(tmp_path / "j", question)
    assert again.runs == (run,)
    again.append(run)
    again.close()
    assert Journal(tmp_path / "j", question).runs == (run, run)


def test_no_room_in_a_child_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the library is imported, when moecheck runs over it, when the kernel is built."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "moecheck_toy.py").write_text("raise OSError(28, 'No space left on device', 'cache')\n")
    overlay = Overlay(tmp_path / "full", {TOY: "1"}, {TOY: "1"})
    with pytest.raises(OverlayError, match=r"moecheck-toy==1: a child over it found no room: .*No space left on device"):
        judging.importable(overlay, ("moecheck_toy.scale",))
    monkeypatch.setattr(judging, "importable", lambda *_: None)
    monkeypatch.setattr(judging, "_run", lambda c, o, limit, log: os.write(log, b"OSError: [Errno 28] No space left on device"))
    with pytest.raises(OverlayError, match="found no room"):
        judging.judge(overlay, Item(CASE, "toy"), "cpu")
    monkeypatch.setattr(judging.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    monkeypatch.setattr(judging.tempfile, "TemporaryDirectory", lambda prefix: (tmp_path / "gone" / prefix).mkdir())
    with pytest.raises(OverlayError, match=r"gone: cannot be written: No such file or directory; free some room"):
        judging.judge(overlay, Item(CASE, "toy"), "cpu")
    died = replace(verdict(Status.CRASHED), reason="OSError: [Errno 28] No space left on device: 'cache'")
    monkeypatch.setattr(cases, "judge", lambda *_: died)
    with pytest.raises(OverlayError, match="that says nothing of it, free some room"):
        Judged(TOY, lambda v: overlay, None, Terms("cpu"), None)("1.0")  # type: ignore[arg-type]


def test_questions_that_cannot_be_asked(moecheck: Callable[..., Any], wheels: Path) -> None:
    ends = ("--good", "1.1", "--bad", "1.12")
    for options, text in (
        (("--case", CASE), "--case needs --backend"),
        (("--case", CASE, "--command", "true"), "give either"),
        (("--command", "true", "--axis", "git"), "say with --repo"),
        (("--command", "true", "--axis", "wheelhouse"), "say with --wheelhouse"),
        (("--command", "true", "--axis", "sideways"), "there are release, wheelhouse, git"),
        (("--contract", "x", "--wheelhouse", str(wheels)), "reads the stored contracts"),
        (("--command", "true", "--wheelhouse", str(wheels), "--good", "0.1"), "none of the 12 releases"),
        (("--command", "true", "--axis", "git", "--repo", str(wheels)), "cannot be cloned"),
    ):
        refused = moecheck("bisect", TOY, *ends, *options)
        assert refused.code == 3
        assert text in refused.err
