"""What a death is called, from its facts; and which cases a death depends on, from a few replays."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from harness.backends.base import CPU
from harness.case import Case
from harness.verdict import Comparison, Stage, Status, Verdict
from harness.worker import coredump, death, hang, health, log, vitals
from harness.worker.death import Death
from harness.worker.log import Log
from harness.worker.protocol import MAX_MESSAGE, Channel, CorruptedReply
from harness.worker.replay import ddmin
from harness.worker.soak import Canaries

CASE = Case.parse("moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")
GIB = 1 << 30
STACK = 'Stack (most recent call first):\n  File "/lib/gemm.py", line 7 in launch\n  File "/lib/moe.py", line 1 in moe\n'
DEEP = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n"
SEGV, KILL, ABRT = -signal.SIGSEGV, -signal.SIGKILL, -signal.SIGABRT


def named(facts: Death) -> tuple[Status, str]:
    verdict = death.verdict(CASE, "ours", facts, 5, 16 * GIB)
    assert verdict.findings[0].text == verdict.reason
    return verdict.status, verdict.reason


@pytest.mark.parametrize(
    ("facts", "status", "text"),
    [
        (Death(Stage.LAUNCH, SEGV), Status.CRASHED, "killed by SIGSEGV during launch"),
        (Death(Stage.LAUNCH, -37), Status.CRASHED, "killed by signal 37 during launch"),
        (Death(Stage.LAUNCH, KILL, resident=GIB), Status.CRASHED, "killed by SIGKILL during launch"),
        (Death(Stage.LAUNCH, KILL, oom_kills=1), Status.OUT_OF_MEMORY, "out-of-memory killer struck meanwhile"),
        (Death(Stage.LAUNCH, KILL, resident=15 * GIB), Status.OUT_OF_MEMORY, "15360 MiB resident of 16384 MiB"),
        (Death(Stage.LAUNCH, ABRT, output="a\nb\nFatal Python error: Aborted\n"), Status.CRASHED, "having said: a b"),
        (Death(Stage.LAUNCH, ABRT, output="what():  std::bad_alloc\n"), Status.OUT_OF_MEMORY, "(std::bad_alloc)"),
        (Death(Stage.LAUNCH, SEGV, output="out of memory: retrying\nall is well\nx\n"), Status.CRASHED, "all is well x"),
        (Death(Stage.LAUNCH, 3), Status.CRASHED, "the process exited with code 3 during launch"),
        (Death(Stage.LAUNCH, None, link="closed"), Status.CRASHED, "it lives on, but its pipe is closed"),
        (Death(Stage.LAUNCH, 0, link="corrupted reply: b'x'"), Status.CRASHED, "corrupted reply: b'x' during launch"),
        (Death(Stage.LAUNCH, None, hang="it is stopped"), Status.HUNG, "no answer within 5 s: it is stopped during launch"),
    ],
)
def test_a_death_is_called_what_its_facts_say(facts: Death, status: Status, text: str) -> None:
    """SIGKILL alone is not lack of memory, and a line about memory long before a crash is not its cause."""
    assert named(facts)[0] is status
    assert text in named(facts)[1]


@pytest.mark.parametrize(("frames", "deep"), [(99, False), (100, True)])
def test_a_stack_overflow_is_claimed_only_of_a_deep_stack(frames: int, deep: bool) -> None:
    output = DEEP + '  File "/lib/parse.py", line 3 in visit\n' * frames
    assert (
        "stack overflow: 100 of the 100 innermost Python frames are visit" in named(Death(Stage.LAUNCH, SEGV, output=output))[1]
    ) is deep
    assert "overflow" not in named(Death(Stage.LAUNCH, ABRT, output=output))[1]


@pytest.mark.parametrize(
    ("output", "letter", "text"),
    [
        (STACK + hang.GIL_FREE + "\n" + hang.IN_PYTHON, "R", "it runs Python code at gemm.py:7 in launch"),
        (STACK + hang.GIL_FREE, "S", "it is waiting in C code called from gemm.py:7 in launch, the GIL released"),
        (STACK, "R", "it is computing in C code called from gemm.py:7 in launch, the GIL held"),
        ("", "T", "it is stopped, so where it hangs is not known"),
        ("", "S", "it does not handle a signal, so where it hangs is not known"),
    ],
)
def test_a_hang_is_placed_by_who_still_answers(output: str, letter: str, text: str) -> None:
    assert hang.where("noise\n" + output, letter) == text


@pytest.mark.parametrize(
    "line", ["CUDA error: x", "Segmentation fault (core dumped)", "free(): invalid pointer", "QX-7 gave up"]
)
def test_an_error_that_a_library_only_prints_is_a_note(line: str) -> None:
    notes = death.alarms(f"hello\n  {line}\nbye\n", (r"QX-\d+ gave up",))
    assert [note.evidence["lines"] for note in notes] == [[line]]
    assert not death.alarms("compiled 3 kernels\n", ())


def test_passing_verdicts_carry_notes() -> None:
    """A note is no finding: PASSED stands, and the journal keeps both."""
    good = Comparison("exact", 1, 0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 0, ())
    verdict = Verdict(CASE.id, "ours", Status.PASSED, Stage.DONE, comparison=good, notes=death.alarms("CUDA error", ()))
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("culprits", [{3}, {96}, {2, 61}, {0, 50, 99}])
def test_the_shortest_sequence_is_found_in_few_runs(culprits: set[int]) -> None:
    runs = []

    def dies(sequence: Sequence[int]) -> bool:
        runs.append(sequence)
        return culprits <= set(sequence)

    assert set(ddmin(range(100), dies)) == culprits
    assert len(runs) <= {1: 16, 2: 60, 3: 130}[len(culprits)]


def test_a_spent_budget_leaves_what_was_proved_so_far() -> None:
    answers = iter([False, True])
    found = ddmin(range(8), lambda sequence: next(answers, None))
    assert found == [0, 1, 2, 3]


def test_a_log_stays_small_and_keeps_its_end(tmp_path: Path) -> None:
    """Cutting must not lose the last words, nor count bytes twice."""
    written = Log(tmp_path / "worker-1-1.log")
    with written.path.open("ab", buffering=0) as file:
        file.write(b"before\n")
        mark = written.mark()
        file.write(b"x" * (log.CAP + 1) + b"\nlast words\n")
        assert written.since(mark).endswith("last words\n")
        written.bound()
        assert written.path.stat().st_size == 0
        file.write(b"and more\n")
    assert written.since(mark).endswith("x\nlast words\nand more\n")
    assert len(written.since(mark)) <= log.KEPT
    assert written.since(written.mark()) == ""


@pytest.mark.parametrize(
    "garbage", [b"\x00\x01\x02\n", b"[" * 100_000 + b"\n", b"[]\n", b"x" * (MAX_MESSAGE + 1), b'{"a": 1e999999}x\n', b"\xff\n"]
)
def test_garbage_in_the_pipe_is_told_from_a_closed_one(garbage: bytes) -> None:
    """A length that a kernel scribbled would make the reader wait for bytes that never come."""
    ours, theirs = multiprocessing.Pipe()
    writer = threading.Thread(target=lambda: os.write(theirs.fileno(), garbage))
    writer.start()
    channel = Channel(ours)
    with pytest.raises(CorruptedReply, match="corrupted reply"):
        channel.receive()
    ours.close()
    writer.join()


def test_half_a_message_does_not_block_beyond_the_deadline() -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), b'{"stage": ')
    channel = Channel(ours)
    assert channel.receive(time.monotonic() + 0.05) is None
    os.write(theirs.fileno(), b'"launch"}\n')
    assert channel.receive(time.monotonic() + 5) == {"stage": "launch"}
    theirs.close()
    with pytest.raises(EOFError, match="closed"):
        channel.receive()


def test_the_memory_of_a_process_is_read() -> None:
    child = subprocess.Popen([sys.executable, "-c", "x = b'x' * 2**26; input()"], stdin=subprocess.PIPE)
    while vitals.resident(child.pid) < 2**26 and child.poll() is None:
        pass
    assert vitals.state(child.pid) in "RSD"
    child.communicate(b"\n")
    assert (vitals.resident(child.pid), vitals.state(child.pid)) == (0, "")
    assert vitals.memory_limit() > 2**28


@pytest.mark.parametrize(("name", "text"), [("memory.events", "low 0\noom_kill 3\n"), ("memory.oom_control", "oom_kill 3\n")])
def test_the_out_of_memory_killers_victims_are_counted(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(vitals, "_groups", lambda: (tmp_path,))
    assert vitals.oom_kills() == 3
    monkeypatch.setattr(vitals, "_groups", lambda: ())
    assert vitals.oom_kills() == 0


def test_a_process_that_a_case_changed_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = health.look()
    assert health.problem(before, CPU) is None
    torch.set_grad_enabled(False)
    assert "torch" in str(health.problem(before, CPU))
    torch.set_grad_enabled(True)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a)
    assert health.problem(before, CPU) == "a small matmul gives a wrong result"
    monkeypatch.undo()
    monkeypatch.setattr(health, "resident", lambda pid: before.resident + health.GROWTH + 1)
    assert "MiB more are resident" in str(health.problem(before, CPU))


def test_a_write_into_memory_of_no_call_is_corrupting() -> None:
    """The case itself is right: only what lies between calls shows it."""
    good = Comparison("exact", 1, 0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 0, ())
    verdict = Verdict(CASE.id, "ours", Status.PASSED, Stage.DONE, comparison=good)
    canaries = Canaries(CPU)
    assert canaries.after(CASE, verdict) == verdict
    canaries._held[0][1][1] = 0
    judged = canaries.after(CASE, verdict)
    assert judged.status is Status.CORRUPTING
    assert f"1 bytes of a block that no call owns, freed by ours:{CASE.id} or before it, were written" in judged.reason
    assert canaries.after(CASE, verdict) == verdict


def test_a_call_that_raised_is_told_with_the_kernel_of_the_device_assertion() -> None:
    """torch says "unspecified launch failure" and no name; the device's own line has one."""
    said = (
        "/pytorch/aten/src/ATen/native/cuda/IndexKernelUtils.cu:16: vectorized_gather_kernel: block: [1,0,0], "
        "thread: [20,0,0] Assertion `ind >=0 && ind < ind_dim_size` failed.\n"
    )
    raised = Verdict(CASE.id, "ours", Status.CRASHED, Stage.LAUNCH, "AcceleratorError: unspecified launch failure")
    facts = coredump.parse_log(said)
    assert facts is not None
    told = death.on_device(raised, facts)
    assert "in vectorized_gather_kernel at IndexKernelUtils.cu:16" in told.reason
    assert told.findings[-1].evidence["gpu"]["exception"] == "Assert: ind >=0 && ind < ind_dim_size"
    unharmed = dataclasses.replace(raised, status=Status.HUNG)
    assert death.on_device(unharmed, facts) is unharmed
