"""One rank: a child process that runs a backend's kernel on its own experts between the host's dispatch and combine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from harness.backends import discover
from harness.backends.base import Backend, checked_probe
from harness.case import Case
from harness.device import environment
from harness.errors import MoecheckError, PluginError
from harness.guard import Violation
from harness.inputs import make_inputs
from harness.memory import NAN, poisoned
from harness.op_answers import promised
from harness.parallel.host import Host, Received, Wire
from harness.parallel.part import by_slots, part, rows_in
from harness.parallel.placement import Placement
from harness.pipeline import NO_MEMORY, OUT_OF_MEMORY
from harness.subject import SubjectError, guarded, prepared, synchronised
from harness.verdict import Status
from harness.worker.child import LOST, Link, Setup, settle
from harness.worker.protocol import Channel, Message

T = TypeVar("T")
HOST = "harness.parallel.host:Host"
PATIENCE = 4  # times the limit of a case after which the transport gives up by itself: the supervisor is there first


@dataclass(frozen=True)
class RankSetup(Setup):
    """rank of ranks; transport: gloo or nccl; rendezvous: a file that the ranks of this group share; host: MODULE:CLASS."""

    rank: int = 0
    ranks: int = 1
    transport: str = "gloo"
    rendezvous: str = ""
    host: str = HOST
    limit_s: float = 60.0


def main(pipe: Connection, setup: RankSetup) -> None:
    """Serve requests from `pipe` until it closes."""
    settle(setup)
    with suppress(EOFError, KeyboardInterrupt):
        try:
            _serve(Link(pipe), setup)
        except OSError:
            os._exit(LOST)
    os._exit(0)  # no goodbye between ranks: another one may be dead


def _serve(link: Channel, setup: RankSetup) -> None:
    try:
        bench = Bench(link, setup)
    except MoecheckError as error:
        link.send({"user_error": str(error)})
        return
    link.send({"ready": True})
    while True:
        request = link.receive()
        if request is None or "stop" in request:
            return
        try:
            link.send(bench.answer(request))
        except SubjectError as caught:
            link.send({"raised": _said(caught.error)})
        except MoecheckError as error:
            link.send({"user_error": str(error)})


def _said(error: BaseException) -> Message:
    out = isinstance(error, OUT_OF_MEMORY) or NO_MEMORY.search(str(error))
    status = Status.CONTRACT if isinstance(error, Violation) else Status.OUT_OF_MEMORY if out else Status.CRASHED
    return {"status": status.value, "kind": type(error).__name__, "text": str(error)[:2000]}


def host_named(name: str) -> type[Host]:
    """The class called MODULE:CLASS; PluginError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"host {name!r}: {error}; wanted MODULE:CLASS, as {HOST}") from error
    missing = [m for m in ("dispatch", "give_back", "combine") if not callable(getattr(found, m, None))]
    if missing:
        raise PluginError(f"host {name!r}: it has no {', '.join(missing)}; see harness/parallel/host.py")
    return found  # type: ignore[no-any-return]


class Bench:
    """What a rank keeps from one case to the next: its place in the group, and the backends."""

    def __init__(self, link: Channel, setup: RankSetup) -> None:
        self._link, self._setup = link, setup
        self._host, self._backends = host_named(setup.host), discover(setup.plugins)
        device = setup.device.kind
        if device == "cuda":
            torch.cuda.set_device(setup.rank)  # as engines do: every GPU is visible, and a kernel must use the current one
        where = f"file://{setup.rendezvous}"
        patience = timedelta(seconds=PATIENCE * setup.limit_s)
        place = {"rank": setup.rank, "world_size": setup.ranks, "timeout": patience}
        dist.init_process_group(setup.transport, init_method=where, **place)  # type: ignore[arg-type]
        self._wire = Wire(link.send, torch.device(device, setup.rank) if device == "cuda" else torch.device(device))

    def answer(self, request: Message) -> Message:
        """The reply to one request; SubjectError for what the kernel or the host raises."""
        setup, backend = self._setup, self._backends[str(request.get("probe") or request["subject"])]
        if "probe" in request:
            facts = environment(backend, setup.device)
            return {"support": asdict(checked_probe(backend, setup.device)), "environment": facts}
        self._link.send({"stage": "inputs"})
        trace = self._layer(Case.parse(str(request["judge"])), backend, frozenset(request["calls"]))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in trace.items()}, Path(request["trace"]))
        return {"done": True}

    def _layer(self, case: Case, backend: Backend, calls: frozenset[int]) -> dict[str, Tensor]:
        """What went through this rank, by name."""
        setup, device = self._setup, self._setup.device
        inputs = make_inputs(case, device.kind)
        placement = Placement(setup.ranks, case.shape.tokens, case.shape.experts, by_slots(backend))
        mine = placement.tokens_of(setup.rank)
        host = self._host(self._wire, placement, setup.rank)
        own = [rows_in(tensor, mine).clone() for tensor in (inputs.x, inputs.topk_ids, inputs.topk_weights)]
        received, sent = self._at("dispatch", lambda: host.dispatch(*own))
        trace = {"x": received.x, "ids": received.ids, "weights": received.weights}
        trace = {name: tensor.clone() for name, tensor in trace.items()}
        given = part(inputs, placement, setup.rank, received)
        rows = received.x.new_zeros((len(received.x), case.shape.hidden), dtype=promised(case)[1])
        if setup.rank in calls:
            launch = self._at("prepare", lambda: prepared(backend, given, device))
            rows = self._at("launch", lambda: _called(launch.call, device, rows))
        returned = self._at("return", lambda: host.give_back(rows, sent))
        trace |= {"rows": rows, "returned": returned.clone()}
        return trace | {"out": self._at("combine", lambda: host.combine(returned, sent, len(mine)))}

    def _at(self, stage: str, call: Callable[[], T]) -> T:
        self._link.send({"stage": stage})
        return guarded(call)


def _called(call: Callable[[], object], device: Any, like: Tensor) -> Tensor:
    """The kernel's rows; TypeError or ValueError if they are not what was promised."""
    with poisoned(NAN, device):
        found = synchronised(call, device)
    if not isinstance(found, Tensor):
        raise TypeError(f"the kernel returned {type(found).__name__}, wanted a tensor")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(f"the kernel returned {found.dtype} {tuple(found.shape)}, wanted {like.dtype} {tuple(like.shape)}")
    return found


def received_of(trace: dict[str, Tensor]) -> Received:
    """What a rank received, of its trace."""
    return Received(trace["x"], trace["ids"], trace["weights"])
