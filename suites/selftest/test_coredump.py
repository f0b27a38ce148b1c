"""A death on the device gets a name: from the coredump where cuda-gdb can read it, else from the log, else the file's alone.

The texts are those of the vLLM articles on CUDA core dumps, vllm#39522, the CUDA-GDB manual and a device assertion of torch.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from harness.backends import load_file
from harness.backends.base import CPU, Device
from harness.case import Case
from harness.pipeline import run
from harness.verdict import Status
from harness.worker import coredump
from harness.worker.coredump import Facts, parse_debugger, parse_log, pipe, read, trigger, variables
from harness.worker.supervisor import Supervisor

CASE = Case.parse("moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0")
GPU = Device("cuda", "sm90", "NVIDIA H200")

ILLEGAL = """\
Opening GPU coredump: /tmp/cuda_coredump_xxx.1799919.1754898045

CUDA Exception: Warp Illegal Address
The exception was triggered at PC 0x7f31abb9f6d0  illegalMemoryAccessKernel(int*, int)
[Current focus set to CUDA kernel 0, grid 1, block (0,0,0), thread (0,0,0), device 0, sm 124, warp 0, lane 0]
#0  0x00007f31abb9f6e0 in illegalMemoryAccessKernel(int*, int)<<<(1,1,1),(256,1,1)>>> ()
"""
WITH_LINES = """\
CUDA Exception: Warp Misaligned Address
The exception was triggered at PC 0x7fff20cd8fb0  flash_attn_ext_vec<64, 1>(char const*, float)  (common.cuh:692)
[Current focus set to CUDA kernel 0, grid 1399, block (0,1,15), thread (0,3,0), device 0, sm 0, warp 4, lane 0]
#0  0x00007fff20cd8fe0 in ggml_cuda_memcpy_1<16, 0> (dst=0x7fff9bfffc88) at ggml-cuda/common.cuh:682
#1  0x00007fff20cd8fe0 in flash_attn_ext_vec<64, 1>(char const*, float)<<<(1,3,28),(32,4,1)>>> () at fattn.cuh:12
"""
LINE_ALONE = """\
CUDA Exception: Warp Illegal Address
The exception was triggered at PC 0x7ff4dc82f930 (cuda_gpujoin.h:1159)
"""
EXITED = """\
CUDA Exception: Warp Illegal Address
The exception was triggered at PC 0x7f31abb9f6d0  illegalMemoryAccessKernel(int*, int)
"""
BUSY = """\
Opening GPU coredump: gpu.7.nvcudmp
[Current focus set to CUDA kernel 0, grid 4, block (0,0,0), thread (0,0,0), device 0, sm 124, warp 3, lane 0]
#0  0x00007ff533bb91d0 in spin_kernel<<<(1,1,1),(32,1,1)>>> ()
"""
AT_LINE_START = """\
[Current focus set to CUDA kernel 0, grid 4, block (0,0,0), thread (0,0,0), device 0, sm 0, warp 0, lane 0]
#0  endless_kernel<<<(1,1,1),(128,1,1)>>> () at gpu_faults.py:72
"""
LOG = """\
[06:43:15.109195] coredump: SM 123/132 has finished state collection
[06:43:15.209195] coredump: Detected an exception of type CUDBG_EXCEPTION_WARP_ILLEGAL_ADDRESS (14)
[06:43:15.209202] coredump:   - Device: 0
[06:43:15.209206] coredump:   - SM: 124
[06:43:15.209210] coredump:   - PC 0x7462c3bac310
[06:43:15.209477] coredump: Stack trace (lane masks: active 0xFFFFFFFF, valid 0xFFFFFFFF):
[06:43:15.209486] coredump:   #0\t0x7462c3bac620\t_Z25illegalMemoryAccessKernelPii

[00:40:46.806153] coredump: Writing ELF file to /tmp/cuda_coredump_xxx.1799919.1754898045
"""
OLD_LOG = "[00:40:46.611453] coredump: Detected an exception of type CUDBG_EXCEPTION_WARP_ILLEGAL_ADDRESS (14)\n"
ASSERT = (
    "/pytorch/aten/src/ATen/native/cuda/IndexKernel.cu:111: operator(): block: [0,0,0], thread: [5,0,0] "
    "Assertion `-sizes[i] <= index && index < sizes[i]` failed.\n"
)


@pytest.mark.parametrize(
    ("said", "exception", "kernel", "place"),
    [
        (ILLEGAL, "Warp Illegal Address", "illegalMemoryAccessKernel(int*, int)", ""),
        (WITH_LINES, "Warp Misaligned Address", "flash_attn_ext_vec<64, 1>(char const*, float)", "common.cuh:692"),
        (LINE_ALONE, "Warp Illegal Address", "", "cuda_gpujoin.h:1159"),
        (EXITED, "Warp Illegal Address", "illegalMemoryAccessKernel(int*, int)", ""),
        (BUSY, "", "spin_kernel", ""),
        (AT_LINE_START, "", "endless_kernel", "gpu_faults.py:72"),
    ],
)
def test_cuda_gdb_names_exception_kernel_and_line(said: str, exception: str, kernel: str, place: str) -> None:
    assert parse_debugger(said, "/d") == Facts("cuda-gdb", exception, kernel, place, "/d")


def test_what_names_nothing_is_no_fact() -> None:
    assert parse_debugger("cuda-gdb: no such file\n", "/d") is None
    assert parse_log("torch says hello\n") is None


@pytest.mark.parametrize(
    ("log", "exception", "kernel", "place"),
    [
        (LOG, "Warp Illegal Address", "_Z25illegalMemoryAccessKernelPii", ""),
        (OLD_LOG, "Warp Illegal Address", "", ""),
        (ASSERT, "Assert: -sizes[i] <= index && index < sizes[i]", "operator()", "IndexKernel.cu:111"),
        (ASSERT + LOG, "Assert: -sizes[i] <= index && index < sizes[i]", "operator()", "IndexKernel.cu:111"),
    ],
)
def test_the_log_speaks_where_nobody_reads_the_dump(log: str, exception: str, kernel: str, place: str) -> None:
    assert parse_log(log) == Facts("log", exception, kernel, place)


def test_the_text_says_where_it_is_from() -> None:
    facts = parse_debugger(ILLEGAL, "/d")
    assert facts is not None
    assert facts.text == "CUDA exception Warp Illegal Address in illegalMemoryAccessKernel(int*, int) (said by the coredump)"
    assert (
        Facts("file", dump="/run/gpu.7.nvcudmp").text
        == "a GPU coredump lies in /run/gpu.7.nvcudmp; cuda-gdb could not read it here"
    )
    assert Facts("cuda-gdb", kernel="spin").text == "the device was busy in spin (said by the coredump)"
    assert len(Facts("log", "Trap", "k" * 5000).text) < 500


def test_the_environment_asks_for_light_dumps_in_the_folder(tmp_path: Path) -> None:
    """`skip_abort` can swallow the error that the dump is about."""
    asked = variables(tmp_path)
    assert asked["CUDA_ENABLE_COREDUMP_ON_EXCEPTION"] == asked["CUDA_ENABLE_USER_TRIGGERED_COREDUMP"] == "1"
    assert asked["CUDA_COREDUMP_FILE"] == f"{tmp_path}/gpu.%p.nvcudmp"
    assert asked["CUDA_COREDUMP_PIPE"] == f"{tmp_path}/gpu.%p.pipe"
    assert "skip_global_memory" in asked["CUDA_COREDUMP_GENERATION_FLAGS"]
    assert "abort" not in asked["CUDA_COREDUMP_GENERATION_FLAGS"]


def debugger(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """A cuda-gdb that says `said` of a dump it can open."""
    tool = folder / "cuda-gdb"
    (folder / "said").write_text(said)
    tool.write_text(f'#!/bin/sh\ncase "$*" in *"target cudacore gpu.7.nvcudmp"*) cat {folder}/said;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(coredump, "DEBUGGERS", (str(tool),))


def test_the_dump_is_read_first_then_the_log_then_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coredump, "DEBUGGERS", ())
    assert read(tmp_path, 7, "nothing") is None
    assert read(tmp_path, 7, LOG) == parse_log(LOG)
    dump = tmp_path / "gpu.7.nvcudmp"
    dump.write_bytes(b"ELF")
    assert read(tmp_path, 7, "nothing") == Facts("file", dump=str(dump))
    assert read(tmp_path, 8, "nothing") is None  # another process's dump
    debugger(tmp_path, monkeypatch, "cannot read it")
    assert read(tmp_path, 7, LOG) == parse_log(LOG, str(dump))
    debugger(tmp_path, monkeypatch, ILLEGAL)
    assert read(tmp_path, 7, LOG) == parse_debugger(ILLEGAL, str(dump))


def test_an_assertion_that_the_debugger_takes_for_a_busy_kernel_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on an H200: cuda-gdb 13.0 shows no `CUDA Exception` for a failed device assertion."""
    dump = tmp_path / "gpu.7.nvcudmp"
    dump.write_bytes(b"ELF")
    debugger(tmp_path, monkeypatch, BUSY)
    log = LOG.replace("WARP_ILLEGAL_ADDRESS (14)", "WARP_ASSERT (12)")
    assert read(tmp_path, 7, log) == Facts("cuda-gdb", "Warp Assert", "spin_kernel", "", str(dump))
    assert read(tmp_path, 7, "a hung child says nothing") == Facts("cuda-gdb", "", "spin_kernel", "", str(dump))


def driver(folder: Path, pid: int, got: list[int]) -> threading.Thread:
    """What the CUDA driver does: waits at the pipe, then writes a dump."""
    os.mkfifo(pipe(folder, pid))

    def serve() -> None:
        with pipe(folder, pid).open("rb") as request:
            got.append(len(request.read()))
        (folder / f"gpu.{pid}.nvcudmp").write_bytes(b"ELF")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_hung_device_is_asked_for_a_dump(tmp_path: Path) -> None:
    got: list[int] = []
    thread = driver(tmp_path, 7, got)
    while not trigger(tmp_path, 7, 5) and thread.is_alive():  # the thread may not be reading yet
        pass
    thread.join(5)
    assert got == [coredump.TRIGGER_BYTES]


def test_asking_nobody_costs_nothing(tmp_path: Path) -> None:
    assert not trigger(tmp_path, 7, 30)
    os.mkfifo(pipe(tmp_path, 8))
    assert not trigger(tmp_path, 8, 30)
    coredump.tidy(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_planted_gpu_faults_are_unavailable_on_a_cpu() -> None:
    file = Path(__file__).resolve().parents[2] / "examples" / "gpu_faults.py"
    case = Case.parse("moe.bf16.t33.h512.i256.e5.k2.renormalize.swiglu.standard.real.s0")
    backends = load_file(str(file)).BACKENDS
    assert len(backends) == 7
    for backend in backends:
        verdict = run(case, backend, CPU)
        assert (verdict.status, verdict.reason) == (Status.UNAVAILABLE, "plants faults on a GPU; this is cpu")


PLUGIN = """
import os, sys, threading, time
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as ORIGINAL
def place(name): return os.environ[name].replace("%p", str(os.getpid()))
def dump(): open(place("CUDA_COREDUMP_FILE"), "wb").write(b"ELF")
def traps(device):
    print('''{log}''', file=sys.stderr, flush=True)
    dump()
    os.abort()
def serve():
    with open(place("CUDA_COREDUMP_PIPE"), "rb") as request:
        request.read()
    dump()
def hangs(device):
    os.mkfifo(place("CUDA_COREDUMP_PIPE"))
    threading.Thread(target=serve, daemon=True).start()
    time.sleep(60)
BACKENDS = (replace(ORIGINAL[0], name="traps", probe=traps), replace(ORIGINAL[0], name="hangs", probe=hangs))
"""


def test_a_death_on_the_device_is_named_in_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child believes in a GPU and dies as one would kill it, before it ever asks for one."""
    monkeypatch.setattr(coredump, "DEBUGGERS", ())
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN.format(log=LOG.replace("\\", "\\\\")))
    with Supervisor(GPU, (str(plugin),), tmp_path, limit_s=20) as worker:
        worker._environments = {name: {"arch": GPU.arch} for name in ("traps", "hangs")}  # asked for again, it dies again
        crashed = worker.judge(CASE, "traps")
        worker.limit_s = 1.5
        hung = worker.judge(CASE, "hangs")
    assert crashed.status is Status.CRASHED
    assert "SIGABRT" in crashed.reason
    assert "CUDA exception Warp Illegal Address in _Z25illegalMemoryAccessKernelPii" in crashed.reason
    assert Path(crashed.findings[0].evidence["gpu"]["dump"]).is_file()
    assert hung.status is Status.HUNG
    assert "a GPU coredump lies in" in hung.reason
