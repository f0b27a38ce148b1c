"""compute-sanitizer's reports become findings; a tool that is missing, cut short or unreadable is never a pass.

The reports are the examples of NVIDIA's manual (Compute Sanitizer v2026.4), of pytorch#196209, NVIDIA/cccl#1903 and
NVIDIA/cuCollections#539, and what the tool printed on a machine without a GPU.
"""

from __future__ import annotations

import json
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness import cli
from harness.backends.base import CPU, Device
from harness.verdict import Comparison, Stage, Status, Verdict
from harness.worker import sanitizer
from harness.worker.sanitizer import Order, SanitizerError, combined, command, find, judge
from harness.worker.sanitizer_report import parse

ID = "moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"
GPU = Device("cuda", "sm90", "NVIDIA H200")

OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at unaligned_kernel()+0x100 in memcheck_demo.cu:34
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7cc43aa00001 is misaligned
=========     and is inside the nearest allocation at 0x7cc43aa00000 of size 4 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: run_unaligned() [0xacd4] in memcheck_demo
=========
========= Invalid __global__ read of size 16 bytes
=========     at out_of_bounds_function()+0xb0 in memcheck_demo.cu:39
=========     by thread (31,0,0) in block (2,1,0)
=========     Address 0x87654320 is out of bounds
=========     and is 137,179,965,340,896 bytes before the nearest allocation at 0x7cc43a800000 of size 1,024 bytes
=========         Device Frame: out_of_bounds_kernel()+0x30 in memcheck_demo.cu:44
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main [0xae66] in memcheck_demo
=========
========= ERROR SUMMARY: 2 errors
"""
BULK_COPY = """\
========= COMPUTE-SANITIZER
Success!
========= Invalid __global__ write of size 256 bytes
=========     at bulk_copy_range(unsigned char *, int)+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x147267fff80 is out of bounds
=========     and is inside the nearest allocation at 0x14725400000 of size 20971520 bytes
========= ERROR SUMMARY: 1 error
"""
TEMPLATED = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 1 bytes
=========     at void thrust::assign_value<thrust::tag>(T1 &, T2)::war::device_path(T2)+0xd0 in /a/assign_value.h:58
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7b3c42e0000a is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7b3c42e00000 of size 10 bytes
=========     Device Frame:void thrust::assign_value<thrust::tag>(T1 &, T2)+0xd0 in /a/assign_value.h:62
========= ERROR SUMMARY: 1 error
"""
OLD_STYLE = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x100 in /src/cl/52_sum.cl:30:sum_gpu_2(const int *, int *, unsigned int)
=========     by thread (98,0,0) in block (194,0,0)
=========     Address 0x7fbbca800000
=========
========= Uninitialized __global__ memory read of size 1 bytes
=========     at 0x150 in void cudf::_GLOBAL__N__56::count_set_bits_kernel<int=256>(unsigned int const *,int)
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7fc406200400
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sumKernel(int *, int *)+0x90 in /home/cuda/block_error.cu:41
=========     and Read access at sumKernel(int *, int *)+0x100 in /home/cuda/block_error.cu:51 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BARRIER = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at [clone myKernel(int *, int *)] outlineSync()+0x11f0 in test.cu:42
=========     by thread (32,0,0) in block (0,0,0)
=========         Device Frame: myKernel(int *, int *)+0xe40 in test.cu:60
=========
========= ERROR SUMMARY: 1 error
"""
HOST_COPY = """\
========= COMPUTE-SANITIZER
========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 1 error
"""
CUB = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 8 bytes
=========     at T2::value_type cub::CUB_200500_NS::ThreadLoad<(int)2, const unsigned *>(T2)+0x8a70 in thread_load.cuh:260
=========     by thread (16,0,0) in block (80,0,0)
=========     Address 0x7f615d40daf0
========= ERROR SUMMARY: 1 error
"""
NO_GPU = """\
========= COMPUTE-SANITIZER
========= Error: process didn't terminate successfully
=========     The application may have hit an error when dereferencing Unified Memory from the host.
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_an_invalid_access_is_told_with_kernel_line_thread_and_address() -> None:
    write, read = parse(OUT_OF_BOUNDS, "memcheck").records
    assert (write.access, write.size, write.kernel, write.place) == ("write", 4, "unaligned_kernel()", "memcheck_demo.cu:34")
    assert (write.thread, write.block, write.address) == ("(0,0,0)", "(0,0,0)", "0x7cc43aa00001")
    assert write.detail.startswith("is misaligned and is inside the nearest allocation")
    assert (read.access, read.size, read.thread, read.block) == ("read", 16, "(31,0,0)", "(2,1,0)")
    assert (read.kernel, read.place) == ("out_of_bounds_kernel()", "memcheck_demo.cu:39")  # the kernel, the innermost line
    assert parse(OUT_OF_BOUNDS, "memcheck").findings[0].text == (
        "memcheck: Invalid __global__ write of size 4 bytes in unaligned_kernel() at memcheck_demo.cu:34, thread (0,0,0) of "
        "block (0,0,0), address 0x7cc43aa00001 is misaligned and is inside the nearest allocation at 0x7cc43aa00000 of size "
        "4 bytes"
    )


@pytest.mark.parametrize(
    ("text", "tool", "kernel", "place", "status"),
    [
        (BULK_COPY, "memcheck", "bulk_copy_range(unsigned char *, int)", "", Status.CORRUPTING),
        (TEMPLATED, "memcheck", "void thrust::assign_value<thrust::tag>(T1 &, T2)", "/a/assign_value.h:58", Status.CORRUPTING),
        (OLD_STYLE, "initcheck", "sum_gpu_2(const int *, int *, unsigned int)", "/src/cl/52_sum.cl:30", Status.UNSTABLE),
        (RACE, "racecheck", "sumKernel(int *, int *)", "/home/cuda/block_error.cu:41", Status.UNSTABLE),
        (BARRIER, "synccheck", "myKernel(int *, int *)", "test.cu:42", Status.UNSTABLE),
        (HOST_COPY, "initcheck", "", "", Status.UNSTABLE),
    ],
)
def test_every_tool_is_read(text: str, tool: str, kernel: str, place: str, status: Status) -> None:
    report = parse(text, tool)
    assert (report.records[0].kernel, report.records[0].place) == (kernel, place)
    assert report.status is status


def test_the_other_side_of_a_race_and_an_old_reports_kernel_are_kept() -> None:
    assert (
        parse(RACE, "racecheck").records[0].detail
        == "and Read access in sumKernel(int *, int *) at /home/cuda/block_error.cu:51"
    )
    second = parse(OLD_STYLE, "initcheck").records[1]
    assert second.kernel == "void cudf::_GLOBAL__N__56::count_set_bits_kernel<int=256>(unsigned int const *,int)"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Invalid __shared__ ? of size 2048 bytes", Status.UNSTABLE),
        ("Invalid __global__ atomic of size 4 bytes", Status.CORRUPTING),
        ("Malloc/Free error encountered : Double free", Status.CORRUPTING),
        ("Potential invalid __shared__ read of size 4 bytes", Status.UNSTABLE),
        ("ERROR: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :", Status.UNSTABLE),
        (
            'Program hit cudaErrorMemoryAllocation (error 2) due to "out of memory" on CUDA API call to cudaMalloc.',
            Status.CRASHED,
        ),
        ("Something that no manual knows", Status.CRASHED),
    ],
)
def test_what_an_error_means(head: str, status: Status) -> None:
    report = parse(f"========= COMPUTE-SANITIZER\n========= {head}\n========= ERROR SUMMARY: 1 error\n", "memcheck")
    assert report.status is status


def test_the_worst_record_decides_and_equal_ones_are_counted() -> None:
    lines = OUT_OF_BOUNDS.splitlines()
    many = "\n".join([lines[0], *lines[9:17], *lines[9:17], *lines[1:9], "========= ERROR SUMMARY: 3 errors"])
    report = parse(many, "memcheck")
    assert report.status is Status.CORRUPTING
    assert [f.evidence["count"] for f in report.findings] == [2, 1]
    assert report.findings[0].text.endswith("(2 alike)")


@pytest.mark.parametrize(
    ("text", "tool"), [(CLEAN, "memcheck"), (CLEAN, "initcheck"), (CLEAN, "synccheck"), (CLEAN_RACE, "racecheck")]
)
def test_a_clean_report_is_clean(text: str, tool: str) -> None:
    assert parse(text, tool).status is None
    assert parse("torch says hello\n" + text, tool).findings == ()


@pytest.mark.parametrize(
    ("text", "tool", "says"),
    [
        ("", "memcheck", "no SUMMARY"),
        (OUT_OF_BOUNDS.split("========= ERROR SUMMARY")[0], "memcheck", "no SUMMARY"),
        (CLEAN, "racecheck", "another tool's"),
        (CLEAN_RACE, "memcheck", "another tool's"),
        (NO_GPU, "memcheck", "terminated before first instrumented API call"),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported.\n" + CLEAN, "memcheck", "Device not supported"),
        ("========= Internal Sanitizer Error: didn't track the launch.\n" + CLEAN, "memcheck", "Internal Sanitizer Error"),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 7 errors\n", "memcheck", "none of which can be read"),
        (CUB.replace("1 error", "1,400 errors"), "initcheck", "nothing can be said"),
    ],
)
def test_what_cannot_be_read_is_an_error_never_a_pass(text: str, tool: str, says: str) -> None:
    with pytest.raises(SanitizerError, match=says):
        parse(text, tool)


def test_cubs_look_back_is_left_out_of_initcheck_alone() -> None:
    report = parse(CUB, "initcheck")
    assert (report.status, report.benign) == (None, 1)
    assert parse(CUB, "memcheck").status is Status.UNSTABLE


PASSED = Verdict(
    ID,
    "sut",
    Status.PASSED,
    Stage.DONE,
    comparison=Comparison("real", 10, 0, 1.0, 5.0, 1.0, 1.1, 0.1, 0, 0, ()),
    environment={"arch": "sm90"},
)


def test_errors_overrule_the_ordinary_verdict_and_the_rerun_line_names_the_tool() -> None:
    verdict = combined(PASSED, parse(OUT_OF_BOUNDS, "memcheck"))
    assert verdict.status is Status.CORRUPTING
    assert verdict.findings[0].check == "memcheck"
    assert verdict.reason.startswith("memcheck: Invalid __global__ write")
    assert verdict.rerun.endswith("--platform sm90 --sanitizer memcheck")
    clean = combined(PASSED, parse(CLEAN, "memcheck"))
    assert (clean.status, clean.findings) == (Status.PASSED, ())


def order(folder: Path, device: Device = GPU) -> Order:
    return Order(ID, "torch_grouped_mm", device, (), str(folder / "torch_grouped_mm.json"))


def test_a_missing_tool_is_an_error_that_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA/cudf#12530: a swallowed `command not found` looked like a nightly without findings."""
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name, path=None: None)
    with pytest.raises(SanitizerError, match="pip install nvidia-cuda-sanitizer-api"):
        judge(order(tmp_path), "memcheck", 5)


def test_other_devices_and_tools_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SanitizerError, match="CUDA kernels"):
        judge(order(tmp_path, CPU), "memcheck", 5)
    with pytest.raises(SanitizerError, match="there are: memcheck, racecheck"):
        judge(order(tmp_path), "leakcheck", 5)


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A compute-sanitizer of a few lines of shell; $log is the report's path, $json the verdict's."""
    tool = folder / "compute-sanitizer"
    body = f'log=$(printf "%s\\n" "$@" | sed -n s/^--log-file=//p)\njson={folder}/torch_grouped_mm.json\n'
    tool.write_text(f"#!/bin/sh\n{body}{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name, path=None: str(tool))


def test_report_and_verdict_come_back_from_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text(OUT_OF_BOUNDS)
    (tmp_path / "verdict").write_text(json.dumps(PASSED.to_json()))
    pretend(tmp_path, monkeypatch, f"cp {tmp_path}/report $log; cp {tmp_path}/verdict $json")
    verdict, said = judge(order(tmp_path), "memcheck", 20)
    assert verdict.status is Status.CORRUPTING
    assert "2 errors" in said
    line = command(order(tmp_path), "memcheck", "/l")
    assert line[:3] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "CUDA_LAUNCH_BLOCKING=1"]
    assert "--padding=4096" in line
    assert "--padding=4096" not in command(order(tmp_path), "racecheck", "/l")
    assert not [part for part in line if part.startswith("--injection-path")]


def test_a_target_that_left_the_tools_group_is_killed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that never ends would keep the GPU."""
    pid = tmp_path / "torch_grouped_mm.pid"
    pretend(tmp_path, monkeypatch, f"setsid sleep 30 & echo $! > {pid}; wait")
    with pytest.raises(SanitizerError, match="raise --limit"):
        judge(order(tmp_path), "memcheck", 1)
    state, deadline = Path(f"/proc/{pid.read_text().strip()}/stat"), time.monotonic() + 5
    while state.is_file() and ") Z " not in state.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)  # the signal is on its way
    assert not state.is_file() or ") Z " in state.read_text()


def test_the_wheel_for_cuda_12_is_shown_its_own_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-cuda-sanitizer-api-cu12 12.9: `Unable to find injection library libsanitizer-collection.so`."""
    for name in ("bin", "lib"):
        (tmp_path / name).mkdir()
    (tmp_path / "lib" / "libsanitizer-collection.so").touch()
    pretend(tmp_path / "bin", monkeypatch, "")
    assert f"--injection-path={tmp_path}/lib" in command(order(tmp_path), "memcheck", "/l")


def test_a_process_that_leaves_no_verdict_is_a_crash_with_the_tools_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").write_text(CLEAN)
    pretend(tmp_path, monkeypatch, f"echo Segmentation fault; cp {tmp_path}/report $log")
    verdict, _ = judge(order(tmp_path), "memcheck", 20)
    assert verdict.status is Status.CRASHED
    assert "Segmentation fault" in verdict.findings[0].evidence["output"]


def test_what_the_process_said_is_told_with_a_report_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text(NO_GPU)
    pretend(tmp_path, monkeypatch, f"echo RuntimeError: no NVIDIA driver; cp {tmp_path}/report $log; exit 255")
    with pytest.raises(SanitizerError, match=r"first instrumented API call\n(.|\n)*no NVIDIA driver"):
        judge(order(tmp_path), "memcheck", 20)


@pytest.mark.parametrize(("script", "says"), [("echo no; exit 127", "wrote no report: no"), ("exec sleep 30", "raise --limit")])
def test_a_tool_that_does_not_report_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    pretend(tmp_path, monkeypatch, script)
    with pytest.raises(SanitizerError, match=says):
        judge(order(tmp_path), "memcheck", 1)


def test_the_sanitized_process_judges_without_red_zones(tmp_path: Path) -> None:
    """Its own part runs here too: the same code judges the case on the CPU."""
    wanted = order(tmp_path, CPU)
    sanitizer._main(json.dumps({**vars(wanted), "device": vars(CPU)}))
    verdict = Verdict.from_json(json.loads(Path(wanted.verdict).read_text()))
    assert verdict.status is Status.PASSED
    assert verdict.environment["arch"] == "cpu"
    assert replace(verdict, environment={}).rerun.endswith("torch_grouped_mm")


def test_the_tool_is_looked_for_beyond_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str | None] = []
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name, path=None: places.append(path) or (path and f"{path}/{name}"))
    assert find() == "/usr/local/cuda/bin/compute-sanitizer"
    assert places == [None, "/usr/local/cuda/bin"]


def test_on_a_machine_without_a_gpu_the_option_is_the_users_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sanitized run that looked at nothing must not look green."""
    monkeypatch.setattr(
        "sys.argv", ["moecheck", "repro", ID, "-b", "torch_grouped_mm", "--platform", "cpu", "--sanitizer", "memcheck"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "CUDA kernels" in capsys.readouterr().err
