"""The bisect over overlays: a case and commands over a wheelhouse, killed at random points and resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from harness.errors import CannotTell
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict
from harness.versions import cases, env
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


def toy(folder: Path, version: str, body: str) -> None:
    """A wheel of the toy."""
    info = f"moecheck_toy-{version}.dist-info"
    with ZipFile(folder / f"moecheck_toy-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr("moecheck_toy/__init__.py", body)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {TOY}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


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
