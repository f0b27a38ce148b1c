"""Deaths become verdicts, and the run goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import Pipe
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from harness.backends.base import CPU, Device
from harness.case import Case
from harness.diagnose import KINDS
from harness.errors import PluginError
from harness.verdict import Status
from harness.worker import process
from harness.worker.health import sticky
from harness.worker.log import Log
from harness.worker.protocol import Channel
from harness.worker.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = str(ROOT / "examples" / "broken_backends.py")
CASE = Case.parse("moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0")
RIGHT = {
    "gate_up_swapped": (Status.WRONG, "gate_up_swap"),
    "zeros": (Status.WRONG, "zeros"),
    "expert_dropped": (Status.WRONG, "missing_expert"),
    "rows_permuted": (Status.WRONG, "row_permutation"),
    "nan_in_tile": (Status.WRONG, "non_finite"),
    "wrong_dtype": (Status.MALFORMED, "torch.float32, wanted torch.bfloat16"),
    "input_mutated": (Status.CORRUPTING, "input x"),
    "segfault": (Status.CRASHED, "SIGSEGV"),
    "abort": (Status.CRASHED, "SIGABRT"),
    "hang": (Status.HUNG, "no answer within"),
    "exception_after_yes": (Status.CRASHED, "gemm_grouped.cu:42"),
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("run")
    with Supervisor(CPU, (EXAMPLES,), folder, 5, folder) as supervisor:
        supervisor.probe("torch_grouped_mm")
        supervisor.folder = folder  # type: ignore[attr-defined]
        yield supervisor


@pytest.mark.parametrize("name", RIGHT)
def test_each_broken_example_gets_its_status(worker: Supervisor, name: str) -> None:
    """All through one worker: a crash or a scribble of one must not change the next one's verdict."""
    verdict = worker.judge(CASE, f"broken_{name}")
    status, text = RIGHT[name]
    assert verdict.status is status
    assert text in verdict.reason
    assert f"--backend broken_{name} --plugin" in verdict.rerun
    assert verdict.environment["torch"]
    if status is Status.WRONG:
        assert verdict.diagnosis is not None
        assert verdict.diagnosis.kind in KINDS
        assert (worker.folder / verdict.picture).is_file()  # type: ignore[attr-defined]
        assert verdict.picture == f"pictures/broken_{name}__{CASE}.png"
    assert worker.judge(CASE, "torch_grouped_mm").status is Status.PASSED


def test_a_dead_childs_stack_is_kept(worker: Supervisor) -> None:
    verdict = worker.judge(CASE, "broken_segfault")
    assert "in segfault" in verdict.findings[0].evidence["output"]


def test_a_child_killed_between_cases_is_replaced(worker: Supervisor) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    verdicts = [worker.judge(CASE, "torch_grouped_mm") for _ in range(2)]
    assert verdicts[-1].status is Status.PASSED


PLUGIN = """
from dataclasses import replace
from harness.backends.base import Support
from harness.backends.torch_grouped_mm import BACKENDS as ORIGINAL
def probe(device): {probe}
def prepare(case, inputs): {prepare}
BACKENDS = (replace(ORIGINAL[0], name="odd", probe=probe, prepare=prepare),)
"""


def judge_plugin(tmp_path: Path, probe: str = "return Support(True)", prepare: str = "return None"):  # type: ignore[no-untyped-def]
    file = tmp_path / "odd.py"
    file.write_text(PLUGIN.format(probe=probe, prepare=prepare))
    with Supervisor(CPU, (str(file),), tmp_path, limit_s=20) as supervisor:
        return supervisor.judge(CASE, "odd")


@pytest.mark.parametrize(
    ("prepare", "status", "text"),
    [
        ("raise MemoryError('no room')", Status.OUT_OF_MEMORY, "no room"),
        ("raise SystemExit(5)", Status.CRASHED, "SystemExit: 5"),
        ("import os; os._exit(7)", Status.CRASHED, "exited with code 7"),
        ("return None", Status.CONTRACT, "Launch"),
    ],
)
def test_other_ways_to_die_are_verdicts_too(tmp_path: Path, prepare: str, status: Status, text: str) -> None:
    verdict = judge_plugin(tmp_path, prepare=prepare)
    assert verdict.status is status
    assert text in verdict.reason


def test_a_library_that_is_not_here_is_unavailable(tmp_path: Path) -> None:
    verdict = judge_plugin(tmp_path, probe="return Support.no('library', 'libfoo is missing')")
    assert (verdict.status, verdict.reason) == (Status.UNAVAILABLE, "libfoo is missing")


@pytest.mark.parametrize("probe", ["return True", "raise KeyError('x')", "return Support(False)"])
def test_a_lying_probe_is_the_users_error(tmp_path: Path, probe: str) -> None:
    with pytest.raises(PluginError, match="odd"):
        judge_plugin(tmp_path, probe=probe)


def test_a_context_that_answers_with_errors_issticky(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every CUDA call raises until the process is gone: the child must be replaced."""
    gpu = Device("cuda", "sm90")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", broken)
    assert sticky(gpu)
    assert not sticky(CPU)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert not sticky(gpu)


def heard(tmp_path: Path) -> tuple[process.Child, Channel]:
    """A child that is this process, and the other end of its pipe."""
    ours, theirs = Pipe()
    silent, _held = os.pipe()
    running = cast(ForkServerProcess, SimpleNamespace(sentinel=silent, pid=os.getpid()))
    return process.Child(running, Channel(ours), Log(tmp_path / "log"), None), Channel(theirs)


def test_messages_that_came_together_are_heard_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply was read with the stage before it: waiting for more cost a slice, 0.1 s a case where children are fast."""
    monkeypatch.setattr(process, "SLICE_S", 20.0)
    child, theirs = heard(tmp_path)
    theirs.send({"stage": "done"})
    theirs.send({"ready": True})
    deadline = time.monotonic() + 10
    assert [child.next(deadline), child.next(deadline)] == [{"stage": "done"}, {"ready": True}]
    assert time.monotonic() < deadline - 5


def test_a_message_without_an_end_does_not_outlive_the_limit(tmp_path: Path) -> None:
    """A kernel that keeps scribbling into the pipe is a hang, not a conversation."""
    child, theirs = heard(tmp_path)
    drip = threading.Event()

    def scribble() -> None:
        while not drip.wait(0.005):
            os.write(theirs.pipe.fileno(), b"x")

    thread = threading.Thread(target=scribble)
    thread.start()
    started = time.monotonic()
    assert child.next(started + 0.3) is None
    assert time.monotonic() < started + 3
    drip.set()
    thread.join()
