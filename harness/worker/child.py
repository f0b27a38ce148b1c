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

import torch

from harness.backends import discover
from harness.backends.base import Backend, Device, checked_probe
from harness.case import Case
from harness.device import environment
from harness.errors import MoecheckError, UnknownName
from harness.pipeline import Options, OracleCache, Progress, run
from harness.report.heatmap import artist
from harness.worker import coredump
from harness.worker.protocol import Message, receive, send

PR_SET_PDEATHSIG = 1  # linux/prctl.h
THREADS = 1  # small GEMMs: a second OpenMP thread costs more in barriers than it computes, and cores are shared


@dataclass(frozen=True)
class Setup:
    """What a child needs to know before its first case. run_folder: where pictures go, "" for nowhere."""

    device: Device
    plugins: tuple[str, ...]
    log: str
    run_folder: str = ""


def main(pipe: Connection, setup: Setup) -> None:
    """Serve requests from `pipe`. Never returns normally: os._exit skips atexit hooks of a library in a bad state."""
    _die_with_parent()
    _redirect_output(Path(setup.log))
    _prepare_libraries(setup)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the supervisor is gone
        _serve(pipe, setup)
    util._exit_function()  # type: ignore[attr-defined]  # unlinks the semaphores that libraries (tqdm) made; os._exit would leave them to a warning
    os._exit(0)


def _die_with_parent() -> None:
    """The fork server exits with the supervisor; without this a hung child would outlive both."""
    # every child gets a copy of the descriptor whose closing ends the fork server: a hung child would keep both alive
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor


def _redirect_output(log: Path) -> None:
    """What a kernel prints goes to the log; faulthandler writes the Python stack of a death there, or on SIGUSR1."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.enable(file=sys.stderr, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=False)


def _prepare_libraries(setup: Setup) -> None:
    """Set before any kernel library is imported and CUDA is initialised."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker pool does not survive in a forked child
    if setup.device.kind == "cuda":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the driver aborts behind its dump; a host dump would be gigabytes
        for name, value in coredump.variables(Path(setup.log).parent).items():
            os.environ.setdefault(name, value)
    if setup.device.kind == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(THREADS)


def _serve(pipe: Connection, setup: Setup) -> None:
    cache = OracleCache()
    backends: dict[str, Backend] = {}
    with suppress(MoecheckError):  # a spare has time for the imports; an error is told to whoever asks first
        backends = discover(setup.plugins)
    send(pipe, {"ready": os.getpid()})
    while True:
        request = receive(pipe)
        if "stop" in request:
            return
        try:
            backends = backends or discover(setup.plugins)
            reply = _answer(request, backends, setup, pipe, cache)
            send(pipe, reply)
            if reply.get("retire"):
                return
        except MoecheckError as error:
            send(pipe, {"user_error": type(error).__name__, "text": str(error)})
        except Exception:
            send(pipe, {"bug": traceback.format_exc()})


def _answer(request: Message, backends: dict[str, Backend], setup: Setup, pipe: Connection, cache: OracleCache) -> Message:
    name = str(request.get("probe") or request["subject"])
    if name not in backends:
        raise UnknownName("backend", name, backends)
    backend = backends[name]
    if "probe" in request:
        return {"support": asdict(checked_probe(backend, setup.device)), "environment": environment(backend, setup.device)}
    case = Case.parse(str(request["judge"]))
    progress = Progress(lambda stage: send(pipe, {"stage": stage.value}))
    if setup.run_folder:
        progress.show = artist(Path(setup.run_folder))
    verdict = run(case, backend, setup.device, progress, cache, _options(request))
    reply = {"verdict": verdict.to_json(), "environment": environment(backend, setup.device)}
    return {**reply, "retire": True} if verdict.status.failed and _sticky(setup.device) else reply


def _options(request: Message) -> Options:
    """The rules in use need the faults' tools, which a plain run never loads."""
    if not request.get("rules"):
        return Options(request.get("checks"))
    from harness.faults.layer import rules_in_use

    return Options(request.get("checks"), rules_in_use)


def _sticky(device: Device) -> bool:
    """A CUDA context that has seen an illegal access answers every call with that error until its process is gone."""
    if device.kind != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
