"""Commits as versions: a case and commands over checkouts, killed at random points and resumed; merges, builds, no room."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.versions import env
from harness.versions.bisect import Outcome, Question, bisect
from harness.versions.env import Overlay
from harness.versions.git import Commits
from harness.versions.judging import environment, importable
from harness.versions.search import Answer, Model

TOY = "moecheck-toy"
KILLS = int(os.environ.get("MOECHECK_KILLS", "10"))
GRACE_S = 10.0  # a child that was killed while it imports torch ends after that


def git(folder: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Eight commits on main, wrong from the sixth on, the fourth of which does not build, and a merge between."""
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "--quiet")
    for number in range(1, 9):
        (folder / "moecheck_toy.py").write_text(f"NUMBER = {number}\ndef scale(x):\n    return x * {2 if number >= 6 else 1}\n")
        (folder / "setup.sh").write_text("exit 3\n" if number == 4 else 'mkdir -p "$1" && cp moecheck_toy.py "$1"\n')
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", f"change {number}")
        if number == 2:
            git(folder, "checkout", "--quiet", "-b", "side")
            git(folder, "commit", "--quiet", "--allow-empty", "-m", "aside")
            git(folder, "checkout", "--quiet", "main")
            git(folder, "merge", "--quiet", "--no-ff", "side", "-m", "merge side")
    return folder


TEST = f"{sys.executable} -S -c 'import moecheck_toy; raise SystemExit(moecheck_toy.scale(1) != 1)'"


@pytest.mark.parametrize("build", ["", "sh setup.sh {target}"])
def test_commits_are_checked_out_built_and_tried(
    moecheck: Callable[..., Any], repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: str
) -> None:
    monkeypatch.setattr(env, "cache_folder", lambda: tmp_path / "cache")
    before = git(repo, "for-each-ref"), git(repo, "worktree", "list"), git(repo, "status", "--porcelain")
    first = git(repo, "rev-list", "--max-parents=0", "HEAD")
    options = ("--good", first, "--bad", "newest", "--command", TEST, "--axis", "git", "--repo", str(repo), "--build", build)
    answer = moecheck("bisect", TOY, *options, "--files")
    assert answer.code == 0, answer.err
    assert "change 6\n" in answer.out
    assert "M moecheck_toy.py" in answer.out
    assert "the last time" not in answer.err
    assert (git(repo, "for-each-ref"), git(repo, "worktree", "list"), git(repo, "status", "--porcelain")) == before
    swapped = moecheck("bisect", TOY, "--good", "main", "--bad", first, *options[4:], "--find-fix")
    assert "the bad end never fails" in swapped.out
    repo.rename(tmp_path / "away")  # as without a network
    again = moecheck("bisect", TOY, "--good", "nowhere", *options[2:])
    assert f"--repo {repo} cannot be read now, what was known of it the last time is taken: fatal: " in again.err
    assert (again.code, again.out) == (3, "")


def test_a_commit_says_which_it_is_and_why_it_does_not_build(repo: Path, tmp_path: Path) -> None:
    commits = Commits(str(repo), TOY, "sh setup.sh {target}", tmp_path / "cache")
    span = commits.between(commits.resolve("main~7"), commits.resolve("main"))
    assert [commits.told(c).split(" ", 1)[1].split(";")[0] for c in span][1:3] == ["merge side", "change 3"]  # first parents
    fourth = span[3]
    with pytest.raises(CannotTell, match=rf"{fourth[:12]} does not build \(exit status 3\)"):
        commits.overlay(fourth)
    overlay = commits.overlay(span[-1])
    code = "import moecheck_toy, importlib.metadata as m; print(moecheck_toy.NUMBER, m.version('moecheck-toy'))"
    said = subprocess.run([sys.executable, "-c", code], env=environment(overlay), capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["8", f"0+g{span[-1][:12]}"]
    git(repo, "commit", "--quiet", "--allow-empty", "-m", "later")
    later = Commits(str(repo), TOY, "", tmp_path / "cache")
    assert later.told(later.resolve("main")).endswith("later")
    assert later.resolve("newest") == later.resolve("main")
    for call in (lambda: later.resolve("nowhere"), lambda: later.between(span[3], span[1])):
        with pytest.raises(MoecheckError, match=r"no revision|not an ancestor"):
            call()


def test_in_a_hook_of_the_repository_nothing_of_it_is_touched(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in (("GIT_DIR", ".git"), ("GIT_INDEX_FILE", ".git/index"), ("GIT_WORK_TREE", ".")):
        monkeypatch.setenv(name, str(repo / place))
    commits = Commits(str(repo), TOY, "git rev-parse --absolute-git-dir > where", tmp_path / "cache")
    built = commits.overlay(commits.resolve("main~5")).path
    assert (built / "where").read_text().startswith(str(tmp_path / "cache"))
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    assert not git(repo, "status", "--porcelain")


def test_a_merge_says_between_which_ends_its_branch_is_bisected(repo: Path, tmp_path: Path) -> None:
    commits = Commits(str(repo), TOY, "", tmp_path / "cache")
    merge = commits.resolve("main~6")
    ends = re.search(r" merge side; a merge: its branch is from (\w+) to (\w+),", commits.told(merge))
    assert ends is not None
    inside = commits.between(commits.resolve(ends[1]), commits.resolve(ends[2]))
    assert [commits.told(c).split(" ", 1)[1] for c in inside] == ["change 2", "aside"]
    assert "merge" not in commits.told(commits.resolve("main~7"))


def test_what_is_installed_is_not_taken_for_a_checkout_without_the_package(tmp_path: Path) -> None:
    """An earlier layout of the repository, or a package deeper in it: nothing may be judged on the installed release."""
    folder = tmp_path / "repo"
    (folder / "python" / "iniconfig").mkdir(parents=True)
    (folder / "python" / "iniconfig" / "__init__.py").write_text("class IniConfig: ...\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "deep")
    for entries in (("iniconfig.IniConfig",), ()):
        with pytest.raises(
            CannotTell, match=r"iniconfig==0\+g\w{12}: it has no iniconfig: what is imported is .*site-packages"
        ):
            importable(overlay_of(folder, "", tmp_path), entries)
    importable(overlay_of(folder, "cp -r python {target}", tmp_path), ("iniconfig.IniConfig",))
    with pytest.raises(CannotTell, match=r"it has no iniconfig\.gone"):
        importable(overlay_of(folder, "cp -r python {target}", tmp_path), ("iniconfig.gone",))


def overlay_of(repo: Path, build: str, place: Path) -> Overlay:
    commits = Commits(str(repo), "iniconfig", build, place / "cache")
    return commits.overlay(commits.resolve("newest"))


def test_a_package_that_must_be_built_is_told_how(moecheck: Callable[..., Any], repo: Path, tmp_path: Path) -> None:
    """No commit has the entry point: the bisect ends at once and says what to do."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN.replace("moecheck_toy.scale", "moecheck_toy.built"))
    options = ("--axis", "git", "--repo", str(repo), "--platform", "cpu", "--plugin", str(plugin), "--backend", "toy")
    answer = moecheck("bisect", TOY, "--good", "main~2", "--bad", "main", "--case", CASE, *options)
    assert answer.code == 2
    assert "no answer: 2 versions cannot be told and no two are left; the last of them, moecheck-toy==0+g" in answer.out
    assert "it has no moecheck_toy.built" in answer.out
    assert "a package that must be built, or lies deeper than the root or src, needs --build CMD" in answer.err


def test_a_full_disk_is_no_answer_of_a_commit(repo: Path, tmp_path: Path) -> None:
    """Of a checkout, of a build, of the folder: the next try has room."""
    (repo / "data").write_text("x" * 300_000)
    git(repo, "add", ".")
    git(repo, "commit", "--quiet", "-m", "large")
    commits = Commits(str(repo), TOY, "", tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OverlayError, match=r"git worktree in .*free some room, or set XDG_CACHE_HOME"):
            commits.overlay(commits.resolve("main"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (commits.overlay(commits.resolve("main")).path / "data").stat().st_size == 300_000
    full = Commits(str(repo), TOY, "echo 'cp: No space left on device'; exit 1", tmp_path / "cache")
    with pytest.raises(OverlayError, match="does not build, there is no room"):
        full.overlay(full.resolve("main"))
    (tmp_path / "file").touch()
    with pytest.raises(OverlayError, match=r"file/git/.*: cannot be written: Not a directory; free some room"):
        Commits(str(repo), TOY, "", tmp_path / "file")


def test_what_a_killed_git_leaves_is_in_nobodys_way(repo: Path, tmp_path: Path) -> None:
    """The lock of a worktree that was being made, half a checkout, the lock of a ref."""
    commits = Commits(str(repo), TOY, "", tmp_path / "cache")
    made = commits.overlay(commits.resolve("main")).path
    bare = made.parent / "repo.git"
    (bare / "worktrees" / made.name / "locked").write_text("initializing")
    made.with_name(f"{made.name}.ready").unlink()
    (made / "moecheck_toy.py").unlink()
    git(repo, "commit", "--quiet", "--allow-empty", "-m", "later")
    (bare / "refs" / "moecheck" / "heads").mkdir(parents=True)
    (bare / "refs" / "moecheck" / "heads" / "main.lock").touch()
    (bare / "packed-refs.lock").touch()
    again = Commits(str(repo), TOY, "", tmp_path / "cache")
    assert again.told(again.resolve("main")).endswith("later")
    assert (again.overlay(again.resolve("main~1")).path / "moecheck_toy.py").is_file()


# a case, killed and resumed

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
GOOD, BAD = "def scale(x):\n    return x\n", "def scale(x):\n    return x * 2\n"
BROKEN, LACKING = "import moecheck_nothing\n", "NUMBER = 3\n"
# what main was; FIRST is the merge of a branch that breaks it. The short one is judged twice, the other five times.
MAIN, FIRST = ((BROKEN, GOOD, BAD, LACKING), 2) if KILLS == 10 else ((GOOD, BAD, BROKEN, LACKING, BAD, BAD), 1)
EARLY_S = 1.5  # a run takes longer than that: two interpreters import torch


@dataclass(frozen=True)
class Killed:
    """A bisect of a case over commits that was killed and resumed until it ended."""

    repo: Path
    commits: list[str]  # of main, oldest first
    folder: Path
    kills: int

    def rows(self) -> list[tuple[str, str, str]]:
        """(commit, answer, text) of the journal."""
        rows = [json.loads(line) for line in (self.folder / "journal").read_text().splitlines()[1:]]
        return [(r["version"], r["answer"], r["text"]) for r in rows]

    def said(self) -> str:
        """What all of its lives printed."""
        return (self.folder / "said").read_text()


def history(folder: Path) -> list[str]:
    """A repository whose main is MAIN; the branch breaks it in the second of its three commits."""
    folder.mkdir()
    git(folder, "init", "--quiet")

    def commit(body: str, text: str) -> None:
        (folder / "moecheck_toy.py").write_text(body)
        (folder / "text").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", text)

    for number, body in enumerate(MAIN[:FIRST]):
        commit(body, f"main {number}")
    git(folder, "checkout", "--quiet", "-b", "side")
    for number, body in enumerate((GOOD, BAD, BAD)):
        commit(body, f"side {number}")
    git(folder, "checkout", "--quiet", "main")
    git(folder, "merge", "--quiet", "--no-ff", "side", "-m", f"main {FIRST}")
    for number, body in enumerate(MAIN[FIRST + 1 :], start=FIRST + 1):
        commit(body, f"main {number}")
    return git(folder, "rev-list", "--first-parent", "--reverse", "main").split()


def command_line(folder: Path, arguments: list[str]) -> None:
    """`moecheck` in a child that leads its own group, printing to a file."""
    os.setpgrp()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    sys.argv = ["moecheck", *arguments]
    sys.stdout = sys.stderr = (folder / "said").open("a", buffering=1)
    cli.main()


class Victim:
    """The same bisect again and again, each time from its journal."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._arguments, self.kills = folder, arguments, 0

    def live(self, rows: int | None, more_s: float) -> float:
        """Run until the journal has so many rows, and for some seconds more; then kill -9 the group. None: to the end. How
        long it took to get there."""
        began = time.monotonic()
        process = multiprocessing.get_context("fork").Process(target=command_line, args=(self._folder, self._arguments))
        with warnings.catch_warnings(action="ignore"):  # of threads, from Python 3.12 on: this child uses none
            process.start()
        while rows is not None and self._rows() < rows and process.is_alive():
            time.sleep(0.005)
        took = time.monotonic() - began
        process.join(None if rows is None else more_s)
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            self.kills += 1
        process.join()
        return took

    def _rows(self) -> int:
        path = self._folder / "journal"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def expected(commits: list[str]) -> list[str]:
    """The commits in the order in which an uninterrupted bisect runs them: the search is pure."""
    truth = {GOOD: Answer.GOOD, BAD: Answer.BAD}
    answers = {commit: truth.get(body, Answer.UNKNOWN) for commit, body in zip(commits, MAIN, strict=True)}
    question = Question(TOY, commits[0], commits[-1], "", by="case", axis="git")
    whole = bisect(question, commits, lambda c: Outcome(answers[c], ""), None, lambda run, test: None, Model())
    assert whole.first == commits[FIRST]
    return [run.version for run in whole.runs]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Killed while it clones or checks out, then early in the second run, then at moments spread over the others: at a row of
    the journal and a part of the time that the second run took after it."""
    folder = tmp_path_factory.mktemp("bisect")
    commits = history(folder / "repo")
    (folder / "plugin.py").write_text(PLUGIN)
    arguments = ["bisect", TOY, "--good", commits[0], "--bad", "main", "--case", CASE, "--backend", "toy", "--platform", "cpu"]
    arguments += ["--plugin", str(folder / "plugin.py"), "--axis", "git", "--repo", str(folder / "repo")]
    arguments += ["--journal", str(folder / "journal")]
    victim, dice = Victim(folder, arguments), random.Random(7)
    early = KILLS * 2 // 5
    victim.live(0, dice.uniform(0.0, 0.2))
    for _ in range(early):
        victim.live(1, dice.uniform(0.0, EARLY_S))
    one = victim.live(2, 0.0)
    for moment in sorted(dice.uniform(2, len(expected(commits))) for _ in range(KILLS - early - 2)):
        victim.live(int(moment), 0.6 * (moment % 1) * one)
    victim.live(None, 0.0)
    return Killed(folder / "repo", commits, folder, victim.kills)


def test_killed_at_ten_random_points_a_case_over_commits_has_the_same_answer(killed: Killed) -> None:
    assert killed.kills == KILLS
    order = expected(killed.commits)
    assert [commit for commit, _, _ in killed.rows()] == order  # those of an uninterrupted one, none lost, none twice
    told = Counter(re.findall(r"^(\w{14}) (?:good|bad|cannot tell) .* bit ", killed.said(), re.MULTILINE))
    assert told <= Counter(commit[:14] for commit in order)
    report = killed.said()[killed.said().rindex(f"**{TOY}: toy on {CASE}: ") :]
    assert f"introduced in {killed.commits[FIRST]}**\n" in report
    assert "a merge: its branch is from" in report
    assert f"{TOY} 0+g" in report  # in the environment of the last run
    assert "--axis git --repo" in report


def test_each_run_of_a_killed_bisect_says_what_its_commit_is(killed: Killed) -> None:
    bodies = dict(zip(killed.commits, MAIN, strict=True))
    for commit, answer, text in killed.rows():
        said = {
            GOOD: ("good", "PASSED"),
            BAD: ("bad", "WRONG constant_factor"),
            BROKEN: ("cannot tell", "does not import here: ModuleNotFoundError: No module named 'moecheck_nothing'"),
            LACKING: ("cannot tell", ": it has no moecheck_toy.scale"),
        }[bodies[commit]]
        assert (answer, text[-len(said[1]) :]) == said
    assert {answer for _, answer, _ in killed.rows()} == {"good", "bad", "cannot tell"}


def test_a_killed_bisect_leaves_nobody_behind_and_the_repository_alone(killed: Killed) -> None:
    assert git(killed.repo, "worktree", "list").count("\n") == 0
    assert git(killed.repo, "for-each-ref", "--format", "%(refname)").split() == ["refs/heads/main", "refs/heads/side"]
    assert not git(killed.repo, "status", "--porcelain")
    end = time.monotonic() + GRACE_S
    while (left := over(killed.folder)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def over(folder: Path) -> list[str]:
    """The processes that were started over an overlay in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PYTHONPATH={folder}/".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it ended, or is another user's
            continue
    return found
