"""The child: judges one case at a time until it is told to stop, is killed, or dies of a kernel."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from harness.backends import discover
from harness.backends.base import Backend, Device, checked_probe
from harness.case import Case
from harness.device import environment
from harness.errors import MoecheckError, UnknownName
from harness.pipeline import Options, OracleCache, Progress, run
from harness.report.heatmap import artist
from harness.verdict import Status, Verdict
from harness.worker import coredump, health, soak
from harness.worker.hang import listen
from harness.worker.protocol import Channel, Message

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOST = os.EX_IOERR  # exit code of a child whose pipe was closed under it; death.py knows it
LINE_BUFFERED = 1  # stdio.h, _IOLBF
THREADS = 1  # small GEMMs: a second OpenMP thread costs more in barriers than it computes, and cores are shared


@dataclass(frozen=True)
class Setup:
    """What a child needs to know before its first case. run_folder: where pictures go, "" for nowhere; soak: it
    is meant to live through the whole plan; visible: its value of CUDA_VISIBLE_DEVICES, "" for the one it inherits; overlay:
    folder in front of its sys.path; timed: without what a coredump of the device needs."""

    device: Device
    plugins: tuple[str, ...]
    log: str
    run_folder: str = ""
    soak: bool = False
    visible: str = ""
    overlay: str = ""
    timed: bool = False


def main(pipe: Connection, setup: Setup) -> None:
    """Serve requests from `pipe`. Never returns normally: os._exit skips atexit hooks of a library in a bad state."""
    settle(setup)
    with suppress(EOFError, KeyboardInterrupt):  # the supervisor is gone
        try:
            _serve(Link(pipe), setup)
        except OSError:
            os._exit(LOST)
    util._exit_function()  # type: ignore[attr-defined]  # unlinks the semaphores that libraries (tqdm) made; os._exit would leave them to a warning
    os._exit(0)


def settle(setup: Setup) -> None:
    """What every child does first: it dies with its parent, prints to its log, and is ready for kernel libraries."""
    _die_with_parent()
    _redirect_output(Path(setup.log))
    _prepare_libraries(setup)


class Link(Channel):
    """The child's end. A kernel that forks leaves a copy of this process behind, which must not answer in its name."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(pipe)
        self._owner = os.getpid()

    def send(self, message: Message) -> None:
        """Write one message; a copy ends here."""
        if os.getpid() != self._owner:
            os._exit(0)
        super().send(message)


def _die_with_parent() -> None:
    """The fork server exits with the supervisor; without this a hung child would outlive both."""
    # every child gets a copy of the descriptor whose closing ends the fork server: a hung child would keep both alive
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgrp()  # what a kernel starts is killed with the child
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor


def _redirect_output(log: Path) -> None:
    """What a kernel prints goes to the log; faulthandler writes the Python stack of a death there, or on hang.ASK."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, LINE_BUFFERED, 0)  # or a library's last words die in its buffer
    faulthandler.enable(file=sys.stderr, all_threads=False)
    listen()


def _prepare_libraries(setup: Setup) -> None:
    """Set before any kernel library is imported and CUDA is initialised."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker pool does not survive in a forked child
    if setup.overlay:
        sys.path.insert(0, setup.overlay)
    if setup.visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = setup.visible
    if setup.device.kind == "cuda":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the driver aborts behind its dump; a host dump would be gigabytes
        for name, value in () if setup.timed else coredump.variables(Path(setup.log).parent).items():
            os.environ.setdefault(name, value)
    if setup.device.kind == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(THREADS)


def _serve(link: Channel, setup: Setup) -> None:
    bench = Bench(setup, link)
    with suppress(MoecheckError):  # a spare has time for the imports; an error is told to whoever asks first
        bench.backends = discover(setup.plugins)
    link.send({"ready": True})
    while True:
        request = link.receive()
        if request is None or "stop" in request:
            return
        try:
            bench.backends = bench.backends or discover(setup.plugins)
            link.send(bench.answer(request))
        except MoecheckError as error:
            link.send({"user_error": type(error).__name__, "text": str(error)})
        except Exception:
            link.send({"bug": traceback.format_exc()})


class Bench:
    """What a child keeps from one case to the next."""

    def __init__(self, setup: Setup, link: Channel) -> None:
        self.setup, self.backends = setup, dict[str, Backend]()
        self._cache = OracleCache()
        self._timed: dict[str, Any] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self._canaries = soak.Canaries(setup.device) if setup.soak else None
        self._progress = Progress(lambda stage: link.send({"stage": stage.value}))
        if setup.run_folder:
            self._progress.show = artist(Path(setup.run_folder))

    def answer(self, request: Message) -> Message:
        """The reply to one request; MoecheckError for a user's fault."""
        name = str(request.get("probe") or request["subject"])
        if name not in self.backends:
            raise UnknownName("backend", name, self.backends)
        backend, device = self.backends[name], self.setup.device
        if name not in self._environments:  # reading a distribution's metadata takes a millisecond
            self._environments[name] = environment(backend, device)
        facts = {"environment": self._environments[name]}
        if "probe" in request:
            return {"support": asdict(checked_probe(backend, device)), **facts}
        if "bundle" in request:  # safetensors is nobody else's business
            from harness.bundle.collect import collect

            return {"collected": collect(Case.parse(str(request["bundle"])), backend, device, Path(request["folder"]))}
        if "latency" in request:  # nor is timing
            from harness.latency.measure import answer

            return {**answer(self._timed, backend, device, request), **facts}
        case, before = Case.parse(str(request["judge"])), health.look()
        verdict = self._judged(case, backend, _options(request))
        reply = {"verdict": verdict.to_json(), "prints": backend.prints, **facts}
        if verdict.status.failed and (reason := self._unfit(before)):
            reply["retire"] = reason
        return reply

    def _judged(self, case: Case, backend: Backend, options: Options) -> Verdict:
        try:
            verdict = run(case, backend, self.setup.device, self._progress, self._cache, options)
        except MemoryError as error:  # ours, but for what the subject left or the case asks
            self._cache.forget()
            text = f"no memory left for moecheck itself during {self._progress.stage}: {error}"
            return Verdict(case.id, backend.name, Status.OUT_OF_MEMORY, self._progress.stage, text)
        return verdict if self._canaries is None else self._canaries.after(case, verdict)

    def _unfit(self, before: health.State) -> str | None:
        """A soak goes on in a shabby process, but not where every call fails."""
        if self.setup.soak:
            return "every call on the device fails" if health.sticky(self.setup.device) else None
        return health.problem(before, self.setup.device)


def _options(request: Message) -> Options:
    """The rules in use need the faults' tools, which a plain run never loads."""
    if not request.get("rules"):
        return Options(request.get("checks"), repeats=request.get("repeats", 0))
    from harness.faults.layer import rules_in_use

    return Options(request.get("checks"), rules_in_use, repeats=request.get("repeats", 0))
