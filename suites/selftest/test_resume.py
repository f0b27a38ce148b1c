"""A run can be killed at any moment: --resume finishes it, repeats nothing, loses nothing, and nobody survives it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from harness import cli, journal, plan
from harness.select import Item
from harness.verdict import Status

ROOT = Path(__file__).resolve().parents[2]
VICTIMS = ("child", "server", "run", "group")  # group: the run and all that it started and that did not leave its group
KILLS = int(os.environ.get("MOECHECK_KILLS", str(len(VICTIMS))))
LIMIT_S = 60.0
GRACE_S = 10.0  # a fork server that was killed while it imports torch ends after that
CASE = "moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"
SELECTION = ("--platform", "cpu", "--backend", "torch_grouped_mm", "--case", "moe.bf16.t1[67]*")
HANGS = """
import os, time
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as B
def prepare(case, inputs):
    open(os.path.join(os.path.dirname(__file__), "hanging"), "w").close()
    while True:
        time.sleep(60)
BACKENDS = (replace(B[0], name="hangs", prepare=prepare),)
"""


def start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`moecheck run` in its own process, from a clone on the path: pytest sees the clone's metadata there and warns that
    it cannot rewrite what is imported already. It prints to a file: whoever outlives it would keep a pipe open."""
    command = [sys.executable, "-c", "from harness.cli import main; main()", "run", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def wait(condition: Callable[[], object], limit_s: float = LIMIT_S) -> bool:
    """True once the condition holds, False after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def parents() -> dict[int, int]:
    """pid -> parent of every process; zombies are dead."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """Children, their children and so on, as of now."""
    tree, found = parents(), {pid}
    while more := {child for child, parent in tree.items() if parent in found} - found:
        found |= more
    return found - {pid}


def writers(folder: Path) -> set[int]:
    """Processes that hold a file below `folder` open: a worker's stdout is its log."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{folder}/"):
                found.add(int(link.parts[2]))
    return found & set(parents())


def killed(process: subprocess.Popen[bytes], folder: Path) -> set[int]:
    """kill -9 of this one process; returns who is left of its family after some seconds."""
    family = descendants(process.pid)
    process.kill()
    process.wait()
    return left(family, folder)


def struck(victim: str, process: subprocess.Popen[bytes], folder: Path) -> set[int]:
    """kill -9 of a part of a run, or of all of it; returns who is left of a run that this ends."""
    family = descendants(process.pid)
    if victim in ("run", "group"):
        (process.kill if victim == "run" else partial(os.killpg, process.pid, signal.SIGKILL))()
        process.wait()
        return left(family, folder)
    servers = {pid for pid in family if parents().get(pid) == process.pid and b"forkserver" in command_line(pid)}
    children = {pid for pid, parent in parents().items() if parent in servers}
    if targets := sorted(servers if victim == "server" else children):
        with suppress(ProcessLookupError):
            os.kill(random.choice(targets), signal.SIGKILL)
    return set()


def command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def left(family: set[int], folder: Path) -> set[int]:
    """Who of a family, or of the writers below `folder`, is still there after some seconds; they are ended then."""
    wait(lambda: not (family & set(parents())) | writers(folder), GRACE_S)
    survivors = (family & set(parents())) | writers(folder)
    for pid in survivors:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return survivors


def seen(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until a process makes a file; fail with what it printed if it ends without."""
    if not wait(lambda: path.exists() or process.poll() is not None) or process.poll() is not None:
        process.kill()
        pytest.fail(f"the run made no {path.name}; exit code {process.wait()}")


def lines(folder: Path) -> int:
    path = folder / journal.NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclass(frozen=True)
class Finished:
    """A run that was killed and resumed until it ended."""

    folder: Path
    code: int
    interrupted: list[int]  # verdicts at each kill
    survivors: set[int]
    children: int  # kills of a child, which may each cost a case its verdict


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Kills at random moments: some before the first verdict, some between, some in the middle of a line's case."""
    folder = tmp_path_factory.mktemp("run") / "out"
    survivors, interrupted, children = set[int](), list[int](), 0
    log = folder.with_name("output.txt")
    process = start(log, *SELECTION, "--out", str(folder))
    seen(process, folder / plan.NAME)
    for number in range(KILLS):
        victim = VICTIMS[number % len(VICTIMS)]
        ahead = random.randint(0, 3)
        target = lines(folder) + ahead
        wait(lambda: lines(folder) >= target or process.poll() is not None)  # noqa: B023 - called before the next turn
        time.sleep(random.uniform(0, 0.05 if ahead else 1.0))
        survivors |= struck(victim, process, folder)
        interrupted.append(lines(folder))
        children += victim == "child"
        if process.poll() is not None:
            process = start(log, "--resume", str(folder))
    assert process.wait(LIMIT_S) in (0, 1), log.read_text()
    return Finished(folder, process.returncode, interrupted, survivors, children)


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """(exit code, stderr) of `moecheck run --resume ...` in this process."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moecheck", "run", "--resume", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


def test_a_killed_run_ends_with_every_planned_case_exactly_once(finished: Finished) -> None:
    """Counting lines would miss a case judged twice in place of one that was lost."""
    recorded = Counter(Item(v.case_id, v.subject) for v in journal.read(finished.folder))
    planned = json.loads((finished.folder / plan.NAME).read_text())["items"]
    assert recorded == Counter(Item(**item) for item in planned)
    assert min(finished.interrupted) < len(planned), "every kill came too late to interrupt anything"


def test_only_a_killed_child_costs_a_case_its_verdict(finished: Finished) -> None:
    """A fork server's death is nobody's fault; a child's is told from a kernel's by nobody, and by the replay that passes."""
    red = [v for v in journal.read(finished.folder) if v.status is not Status.PASSED]
    assert len(red) <= finished.children
    assert finished.code == bool(red)
    for verdict in red:
        assert verdict.reason.startswith("killed by SIGKILL"), verdict


def test_nobody_survives_a_killed_run(finished: Finished) -> None:
    assert not finished.survivors


def test_resuming_a_finished_run_changes_nothing(finished: Finished, resume: Callable[..., tuple[int, str]]) -> None:
    """The exit code too: a resume that judges nothing must not turn a red run green."""
    before = (finished.folder / journal.NAME).read_bytes()
    assert resume(str(finished.folder))[0] == finished.code
    assert (finished.folder / journal.NAME).read_bytes() == before


def test_a_finished_red_run_stays_red(finished: Finished, tmp_path: Path, resume: Callable[..., tuple[int, str]]) -> None:
    folder = copied(finished, tmp_path)
    edited(journal.NAME, '"status": "PASSED"', '"status": "WRONG"')(folder)
    assert resume(str(folder))[0] == 1


def test_a_hanging_kernel_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    """A child that waits for its next case notices the closed pipe; one inside a kernel never looks."""
    process = hanging(tmp_path)
    assert not killed(process, tmp_path / "out")


def test_ctrl_c_is_incomplete_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Exit code 1 would say that a kernel failed."""
    process = hanging(tmp_path)
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    code = process.wait(LIMIT_S)
    output = (tmp_path / "output.txt").read_text()
    assert code == 2, output
    assert f"1 of 1 cases have no verdict; continue with: moecheck run --resume {tmp_path / 'out'}" in output
    assert not left(family, tmp_path / "out")


def hanging(folder: Path) -> subprocess.Popen[bytes]:
    """A run whose only case hangs in a kernel by now."""
    (folder / "hangs.py").write_text(HANGS)
    given = ("--platform", "cpu", "--plugin", str(folder / "hangs.py"), "--backend", "hangs", "--case", CASE)
    process = start(folder / "output.txt", *given, "--out", str(folder / "out"))
    seen(process, folder / "hanging")
    return process


def copied(run: Finished, folder: Path) -> Path:
    return Path(shutil.copytree(run.folder, folder / "copy"))


def edited(name: str, old: str, new: str) -> Callable[[Path], object]:
    """An edit of one file of a run folder."""
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (lambda folder: shutil.rmtree(folder), "not a moecheck plan"),
        (lambda folder: (folder / plan.NAME).unlink(), "not a moecheck plan"),
        (lambda folder: (folder / plan.NAME).write_text("{"), "not a moecheck plan"),
        (lambda folder: (folder / plan.NAME).write_text("[]"), "not a moecheck plan"),
        (edited(plan.NAME, '"schema": 1', '"schema": 2'), "reads 1"),
        (edited(plan.NAME, ".t16.", ".t18."), "edited, start a new run"),
        (edited(plan.NAME, '"platform": "cpu"', '"platform": "sm09"'), "platform 'sm09' is unknown"),
        (edited(plan.NAME, '"subject"', '"sbject"'), "not a moecheck plan"),
        (edited(journal.NAME, ".t16.", ".t18."), "1 verdicts that are not in its plan"),
        (edited(journal.NAME, "{", ""), "journal.jsonl:1: not a verdict"),
    ],
)
def test_a_folder_that_is_not_a_whole_run_is_refused(
    finished: Finished, tmp_path: Path, resume: Callable[..., tuple[int, str]], damage: Callable[[Path], object], hint: str
) -> None:
    """One message, no traceback, and nothing written: it may be somebody else's folder."""
    folder = copied(finished, tmp_path)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, err = resume(str(folder))
    assert (code, "Traceback" in err or "harness/" in err) == (3, False), err
    assert err.startswith("moecheck: ")
    assert hint in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "more",
    [
        ("--platform", "cpu"),
        ("--tier", "ci"),
        ("--backend", "torch_grouped_mm"),
        ("--op", "moe"),
        ("--case", CASE),
        ("--plugin", "x.py"),
        ("--out", "x"),
        ("--limit", "5"),
    ],
)
def test_resume_takes_no_other_selection(
    finished: Finished, resume: Callable[..., tuple[int, str]], more: tuple[str, str]
) -> None:
    """Ignored silently, the flag looks obeyed."""
    code, err = resume(str(finished.folder), *more)
    assert code == 3
    assert "--resume continues the plan in its folder" in err
