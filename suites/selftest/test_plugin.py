"""pytest and moecheck are two ways to ask the same question: same cases, same verdicts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from harness import cli, distributed, journal, plan
from harness.errors import MoecheckError
from harness.known import Outcome, outcome
from harness.select import Item
from harness.verdict import Status, Verdict

ROOT = Path(__file__).resolve().parents[2]
LAYER = str(ROOT / "suites" / "layer")
EXAMPLES = str(ROOT / "examples" / "broken_backends.py")
CASE = "moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"
BACKENDS = ("torch_grouped_mm", "onnxruntime_moe", "triton_moe", "broken_gate_up_swapped", "broken_abort")
MIXED = ("--platform", "cpu", "--case", CASE, "--plugin", EXAMPLES, *(x for name in BACKENDS for x in ("--backend", name)))
PATTERN = ("--platform", "cpu", "--backend", "torch_grouped_mm", "--case", "moe.bf16.t33.h64.i32.e[45]*")
QUIET = ("-p", "no:terminal", "-p", "no:cacheprovider")


class Witness:
    """Listens to a pytest run: the verdicts, and what pytest made of each test."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.reports: dict[str, str] = {}

    def pytest_moecheck_verdict(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped:
            name = report.nodeid.split("[")[1].rstrip("]")
            self.reports[name] = "xfailed" if hasattr(report, "wasxfail") else report.outcome


@pytest.fixture(scope="module")
def pytest_run() -> Witness:
    """Plain pytest over a pass, a skip, a known issue, a wrong result and a crash."""
    witness = Witness()
    assert pytest.main([LAYER, *MIXED, *QUIET], plugins=[witness]) == pytest.ExitCode.TESTS_FAILED
    return witness


@pytest.fixture(scope="module")
def moecheck_run(tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    """`moecheck run` over the same selection."""
    folder = tmp_path_factory.mktemp("run") / "out"
    assert moecheck("run", *MIXED, "--out", str(folder)) == 1
    return journal.read(folder)


def moecheck(*arguments: str) -> object:
    """The exit code of the console script, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moecheck", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return caught.value.code


def comparable(verdict: Verdict) -> Verdict:
    """Without what two runs may differ in: the time, addresses in the output of a dead process, a folder for pictures."""
    return replace(verdict, seconds=0.0, picture="", findings=tuple(replace(f, evidence={}) for f in verdict.findings))


def test_pytest_reaches_the_verdicts_of_moecheck_run(pytest_run: Witness, moecheck_run: list[Verdict]) -> None:
    """Equal ids are not enough: a suite without the worker or the known issues would judge the same cases otherwise."""
    assert [comparable(v) for v in pytest_run.verdicts] == [comparable(v) for v in moecheck_run]
    assert {v.subject for v in moecheck_run} == set(BACKENDS)


def test_every_outcome_is_pytests_own(pytest_run: Witness) -> None:
    """A known issue as a pass, or a crash as an error of the fixture, would be green or ours."""
    words = {Outcome.GREEN: "passed", Outcome.SKIPPED: "skipped", Outcome.KNOWN: "xfailed", Outcome.RED: "failed"}
    assert pytest_run.reports == {f"{v.subject}:{v.case_id}": words[outcome(v)] for v in pytest_run.verdicts}
    assert set(pytest_run.reports.values()) == set(words.values())


def test_a_case_without_a_verdict_fails_nobody_elses(moecheck_run: list[Verdict]) -> None:
    """The abort came first in the plan: those behind it were judged by another child."""
    statuses = {v.subject: v.status for v in moecheck_run}
    assert (statuses["broken_abort"], statuses["torch_grouped_mm"]) == (Status.CRASHED, Status.PASSED)


def test_pytest_in_several_processes_judges_every_case_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Workers that expanded the plan in another order would refuse to run, or run some cases twice."""
    pytest.importorskip("xdist")
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", LAYER, *PATTERN, "-n", "2", "--dist", "worksteal", "-q", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = xml.parse(report).getroot().iter("testcase")
    ran = sorted(str(case.get("name")).split("[")[1].rstrip("]") for case in cases)
    assert moecheck("list", *PATTERN) == 0
    assert ran == sorted(":".join(row.split()) for row in capfd.readouterr().out.splitlines())


def test_a_run_in_several_processes_has_one_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case once, whoever judged it; the crash of a kernel costs nobody else's; the notes of a green one are told."""
    pytest.importorskip("xdist")
    chosen = [x for name in ("torch_grouped_mm", "deadly_segfault", "deadly_complains") for x in ("--backend", name)]
    selection = ("--platform", "cpu", "--plugin", "harness.faults.deadly", "--case", "moe.bf16.t17.h64*", *chosen)
    assert moecheck("run", "-n", "2", *selection, "--out", str(tmp_path), "-v") == 1
    printed = capsys.readouterr().out
    verdicts = journal.read(tmp_path)
    planned = plan.load(tmp_path).items
    assert sorted(Item(v.case_id, v.subject) for v in verdicts) == sorted(planned)
    assert {v.subject for v in verdicts if v.status is Status.CRASHED} == {"deadly_segfault"}
    assert all(f"{v.status:<13} {v.subject:<18} {v.case_id}" in printed for v in verdicts)
    assert "it printed and carried on: CUDA error" in printed
    logs = {path.name.split("-")[1] for path in (tmp_path / "log").iterdir()}
    assert len(logs) == 2, "one supervisor did all the work"


@pytest.mark.parametrize("mode", ["loadscope", "loadfile", "loadgroup", "each"])
def test_distributions_that_lose_or_double_verdicts_are_refused(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a crash of an xdist worker they end green with tests missing."""
    pytest.importorskip("xdist")
    assert pytest.main([LAYER, *PATTERN, "--dist", mode]) == pytest.ExitCode.USAGE_ERROR
    assert "use --dist load" in capsys.readouterr().err
    monkeypatch.setenv("PYTEST_ADDOPTS", f"--dist {mode}")
    assert moecheck("run", *PATTERN, "--out", str(tmp_path)) == 3
    assert "use --dist load" in capsys.readouterr().err


def test_a_soak_is_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xdist")
    assert pytest.main([LAYER, *PATTERN, "--soak", "-n", "2"]) == pytest.ExitCode.USAGE_ERROR
    assert moecheck("run", *PATTERN, "--soak", "-n", "2", "--out", str(tmp_path)) == 3
    assert capsys.readouterr().err.count("--soak is one process") == 2


def test_every_process_takes_a_device_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two supervisors on one GPU blame each other's kernels for memory and time."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    held = []
    for wanted in ("3", "5"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        held.append(distributed.take_device({"locks": str(tmp_path)}))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(MoecheckError, match=r"2 devices.*use -n 2 or less"):
        distributed.take_device({"locks": str(tmp_path)})
    for lock in held:
        os.close(lock)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--platform", "cup"), "did you mean cpu"),
        (("--platform", "cpu", "--tier", "smoek"), "did you mean smoke"),
        (("--platform", "cpu", "--backend", "torch_groupd_mm"), "did you mean torch_grouped_mm"),
        (("--platform", "cpu", "--backend", "torch_grouped_mm", "--case", "moe.bf61.*"), "nothing to run"),
        (("--platform", "cpu", "--plugin", "missing.py"), "no such file"),
        (("--run-dir", "missing"), "not a moecheck plan"),
    ],
)
def test_a_fault_of_the_user_ends_pytest_with_3_and_a_message(
    options: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tests collected is 5, which CI scripts are used to ignore."""
    assert pytest.main([LAYER, *options, "-p", "no:cacheprovider"]) == 3
    assert hint in capsys.readouterr().out


def test_a_run_is_not_narrowed_by_the_users_pytest_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTEST_ADDOPTS=-x would end the run at its first failure, and call it incomplete."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-x")
    two = ("--backend", "broken_zeros", "--backend", "broken_gate_up_swapped", "--plugin", EXAMPLES)
    assert moecheck("run", "--platform", "cpu", "--case", CASE, *two, "--out", str(tmp_path)) == 1
