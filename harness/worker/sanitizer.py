"""One case in a fresh process under compute-sanitizer, whose report becomes findings: `moecheck repro ID --sanitizer TOOL`.

The caching allocator is off and the buffers have no red zones: the tool must see each tensor as an allocation of its own size.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.backends import discover
from harness.backends.base import Device
from harness.case import Case
from harness.device import environment
from harness.pipeline import Options, run
from harness.verdict import Finding, Stage, Status, Verdict
from harness.worker.sanitizer_report import Report, SanitizerError, parse

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Without its own allocator torch asks CUDA for each tensor, of exact size; a blocking launch names the right host line.
VARIABLES = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1", "CUDA_LAUNCH_BLOCKING=1", "TORCHINDUCTOR_COMPILE_THREADS=1")
COMMON = (
    "--target-processes=application-only",
    "--destroy-on-device-error=context",  # the error reaches torch, as it would without the tool
    "--print-limit=1000",
    "--launch-timeout=120",  # python imports torch before it first calls CUDA
)
MEMCHECK = (
    "--padding=4096",  # between allocations, so that a write beyond one does not land in the next (triton_kernels/testing.py)
    "--report-api-errors=no",  # torch probes for functions that may be missing; an error that matters is raised
)
HINT = "install it with `pip install nvidia-cuda-sanitizer-api` (CUDA 12: nvidia-cuda-sanitizer-api-cu12) or the CUDA toolkit"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
TAIL = 2000  # characters of the process's output that a verdict without a report of its own carries


@dataclass(frozen=True)
class Order:
    """What the sanitized process is to judge, and where its verdict goes."""

    case: str
    subject: str
    device: Device
    plugins: tuple[str, ...]
    verdict: str


def find() -> str:
    """Path of compute-sanitizer: from PATH, the toolkit, or NVIDIA's wheel. SanitizerError if it is nowhere."""
    wheel = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin"))
    for folder in (None, *PLACES, *map(str, wheel)):
        if found := shutil.which("compute-sanitizer", path=folder):
            return found
    raise SanitizerError(f"compute-sanitizer is not on PATH, in {' or '.join(PLACES)}, nor in NVIDIA's wheel; {HINT}")


def judge(order: Order, tool: str, limit_s: float) -> tuple[Verdict, str]:
    """(the verdict, what the tool said in a line). SanitizerError where the tool has no answer. The report and the verdict
    are left beside `order.verdict`."""
    if tool not in TOOLS:
        raise SanitizerError(f"sanitizer {tool!r} is unknown; there are: {', '.join(TOOLS)}")
    if order.device.kind != "cuda":
        raise SanitizerError(f"compute-sanitizer looks at CUDA kernels; the device of this platform is {order.device.arch}")
    log, answer = Path(order.verdict).with_suffix(f".{tool}.txt"), Path(order.verdict)
    output = _run(command(order, tool, str(log)), limit_s, _pid_file(order.verdict))
    verdict = Verdict.from_json(json.loads(answer.read_text())) if answer.is_file() else None
    if verdict is not None and verdict.status.skipped:
        return verdict, f"{tool}: nothing ran"
    if not log.is_file():
        raise SanitizerError(f"{tool}: compute-sanitizer wrote no report: {output[-TAIL:].strip()}")
    try:
        report = parse(log.read_text(errors="replace"), tool)
    except SanitizerError as error:
        raise SanitizerError(f"{error}\nReport: {log}\nThe process said: {output[-TAIL:].strip()}") from error
    known = f", {report.benign} known ones of cub left out" if report.benign else ""
    return combined(verdict or _died(order, output), report), f"{tool}: {len(report.records)} errors{known}; {log}"


def command(order: Order, tool: str, log: str) -> list[str]:
    """The command line, its environment included."""
    options = [f"--tool={tool}", *COMMON, *(MEMCHECK if tool == "memcheck" else ()), f"--log-file={log}"]
    child = [sys.executable, "-m", "harness.worker.sanitizer", json.dumps(asdict(order))]
    program = find()
    beside = Path(program).parent.parent / "lib"  # where the wheel for CUDA 12 has them, and does not look itself
    if (beside / "libsanitizer-collection.so").is_file():
        options.append(f"--injection-path={beside}")
    return ["env", *VARIABLES, program, *options, *child]


def combined(verdict: Verdict, report: Report) -> Verdict:
    """The ordinary verdict, overruled by the report's errors where it has any."""
    facts = {**verdict.environment, "sanitizer": report.tool}
    if report.status is None:
        return replace(verdict, environment=facts)
    findings = (*report.findings, *verdict.findings)
    reason = "; ".join([report.findings[0].text, *([verdict.reason] if verdict.reason else [])])
    return replace(verdict, status=report.status, reason=reason, findings=findings, environment=facts)


def _pid_file(verdict: str) -> Path:
    return Path(verdict).with_suffix(".pid")


def _run(line: list[str], limit_s: float, target: Path) -> str:
    """What the command printed. SanitizerError if it takes too long: a slow tool is no hung kernel."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root, start_new_session=True)
    try:
        return process.communicate(timeout=limit_s)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        if target.is_file():  # a hung kernel must not outlive its tool, whose launcher may have moved it out of the group
            with suppress(ProcessLookupError):
                os.kill(int(target.read_text()), signal.SIGKILL)
        process.communicate()
        raise SanitizerError(f"no report within {limit_s:g} s: a tool slows a kernel down many times; raise --limit") from None


def _died(order: Order, output: str) -> Verdict:
    """The process left no verdict."""
    finding = Finding("death", "the sanitized process ended without a verdict", {"output": output[-TAIL:]})
    return Verdict(order.case, order.subject, Status.CRASHED, Stage.LAUNCH, finding.text, (finding,), plugins=order.plugins)


def _main(text: str) -> None:
    """The sanitized process: judges one case alone and writes its verdict."""
    given: dict[str, Any] = json.loads(text)
    _pid_file(given["verdict"]).write_text(str(os.getpid()))
    device, plugins = Device(**given["device"]), tuple(given["plugins"])
    backend = discover(plugins)[given["subject"]]
    verdict = run(Case.parse(given["case"]), backend, device, options=Options(checks=0, zones=False))
    verdict = replace(verdict, environment=environment(backend, device), plugins=plugins)
    Path(given["verdict"]).write_text(json.dumps(verdict.to_json()))


if __name__ == "__main__":
    _main(sys.argv[1])
