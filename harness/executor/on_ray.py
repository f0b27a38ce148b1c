"""The shards of a run on the devices of a Ray cluster: an actor for each, our own supervisor in it, verdicts streamed home.

Ray places and carries; it never retries: a crash is judged by whoever saw it.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from harness import __version__, config
from harness.errors import MoecheckError, WorkerBug
from harness.executor.board import Board
from harness.plan import Plan
from harness.select import Item
from harness.shard import costs
from harness.verdict import Verdict

DEPTH = 2  # items that an actor has: while one verdict is on its way home, the next is judged
STARTS = 3  # actors in a row that may die before their first verdict
STOP_S = 10.0  # for an actor to stop its supervisor


class Worker:
    """An actor: one device, one supervisor, one item at a time."""

    def __init__(self, plan: Plan) -> None:
        from harness.session import Session  # imports torch: once, in the actor

        self._fault, self._session = "", None
        try:
            self._session = Session(plan, None)
        except MoecheckError as error:
            self._fault = str(error)

    def where(self) -> dict[str, str]:
        """Node, process and version; a fault of the user's, where it cannot judge."""
        ray = _ray()
        node = str(ray.get_runtime_context().get_node_id())
        place = f"{socket.gethostname()} (Ray node {node[:8]}, process {os.getpid()})"
        return {"node": node, "place": place, "process": str(os.getpid()), "version": __version__, "fault": self._fault}

    def judge(self, case_id: str, subject: str) -> dict[str, str]:
        """The verdict as JSON text, or whose fault it is that there is none."""
        assert self._session is not None
        try:
            return {"verdict": json.dumps(self._session.judge(Item(case_id, subject)).to_json())}
        except MoecheckError as error:
            return {"fault": str(error)}
        except WorkerBug as error:
            return {"bug": str(error)}

    def close(self) -> None:
        """Stop the supervisor."""
        if self._session is not None:
            self._session.close()


@dataclass
class _Hired:
    """An actor as the driver sees it. started: the answer of `where`, until it has come."""

    name: str
    actor: Any
    started: Any
    node: str = ""
    place: str = "a node that it never told of"
    process: int = 0


class Cluster:
    """Actors on every device of the platform, fed from the driver."""

    def __init__(self, plan: Plan, items: list[Item], workers: int | None) -> None:
        seconds = dict(zip(plan.items, plan.seconds or costs(plan.items, {}), strict=True))
        self._ray, self._board = _ray(), Board(items, [seconds[item] for item in items])
        platform = config.platform(plan.request.platform)
        self._needs = needs(platform.name, platform.device, dict(self._ray.cluster_resources()))
        room = places(self._needs, dict(self._ray.cluster_resources()))
        if not room:
            raise MoecheckError(
                f"--executor ray: no node offers {_text(self._needs)} for platform {platform.name}; start one with "
                f"`ray start --address=... {_flags(self._needs)}`, or give RAY_ADDRESS of another cluster"
            )
        self._plan, self._number, self._failures = self._ray.put(replace(plan, items=(), seconds=())), 0, 0
        self._hired: dict[str, _Hired] = {}
        self._pending: dict[Any, tuple[str, Item | None]] = {}
        for _ in range(min(room, len(items), workers or room)):
            self._hire()

    def verdicts(self) -> Iterator[Verdict]:
        """Each as it comes home; ends early where no worker is left."""
        while self._board.left and self._pending:
            ready, _ = self._ray.wait(list(self._pending), num_returns=1)
            for reference in ready:
                name, item = self._pending.pop(reference, ("", None))
                if name and (verdict := self._heard(name, item, reference)) is not None:
                    yield verdict

    def close(self) -> None:
        """Stop all actors and free their devices."""
        ends = [hired.actor.close.remote() for hired in self._hired.values() if hired.node]
        if ends:
            self._ray.wait(ends, num_returns=len(ends), timeout=STOP_S)
        for hired in self._hired.values():
            self._ray.kill(hired.actor, no_restart=True)

    @property
    def hired(self) -> list[_Hired]:
        """The actors that are not lost, as far as is known."""
        return list(self._hired.values())

    def _hire(self) -> None:
        self._number += 1
        name = f"worker {self._number}"
        options = {**self._needs, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
        actor = self._ray.remote(Worker).options(**options).remote(self._plan)
        hired = self._hired[name] = _Hired(name, actor, actor.where.remote())
        self._pending[hired.started] = name, None

    def _heard(self, name: str, item: Item | None, reference: Any) -> Verdict | None:
        hired = self._hired[name]
        try:
            reply = self._ray.get(reference)
        except self._ray.exceptions.RayActorError:
            return self._lost(hired)
        _accepted(reply, hired.place)
        if item is None:
            hired.node, hired.place, hired.process = reply["node"], reply["place"], int(reply["process"])
            for _ in range(DEPTH):
                self._feed(hired)
            return None
        self._failures = 0
        self._board.judged(name, item)
        self._feed(hired)
        return Verdict.from_json(json.loads(reply["verdict"]))

    def _feed(self, hired: _Hired) -> None:
        if (item := self._board.next(hired.name)) is not None:
            self._pending[hired.actor.judge.remote(item.case_id, item.subject)] = hired.name, item

    def _lost(self, hired: _Hired) -> Verdict | None:
        """Its items go to the others; another actor where its node lives on and only the process died."""
        del self._hired[hired.name]
        self._pending = {ref: (name, item) for ref, (name, item) in self._pending.items() if name != hired.name}
        verdict = self._board.lost(hired.name, hired.place)
        self._failures += 1
        if hired.node in self._alive() and self._failures < STARTS:
            self._hire()
        for other in self._hired.values():  # those that had nothing left to do
            busy = sum(name == other.name for name, _ in self._pending.values())
            for _ in range(DEPTH - busy if other.node else 0):
                self._feed(other)
        return verdict

    def _alive(self) -> set[str]:
        return {str(node["NodeID"]) for node in self._ray.nodes() if node["Alive"]}


@contextmanager
def cluster(plan: Plan, items: list[Item], workers: int | None) -> Iterator[Cluster]:
    """Actors for these items of a plan, on the cluster of RAY_ADDRESS, or on this machine alone without one."""
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR", configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise MoecheckError(f"--executor ray: {str(error).splitlines()[0]}; check RAY_ADDRESS") from error
    found = None
    try:
        found = Cluster(plan, items, workers)
        yield found
    finally:
        if found is not None:
            with suppress(ray.exceptions.RayError):
                found.close()
        if ours:
            ray.shutdown()


def needs(platform: str, kind: str, offered: dict[str, float]) -> dict[str, Any]:
    """What an actor asks Ray for: the resource moecheck_PLATFORM where a node offers it, a GPU for each on CUDA, else a CPU."""
    named = f"moecheck_{platform}"
    wanted: dict[str, Any] = {"num_gpus": 1} if kind == "cuda" else {"num_cpus": 1}
    return {**wanted, "resources": {named: 1}} if named in offered else wanted


def places(wanted: dict[str, Any], offered: dict[str, float]) -> int:
    """Actors that find room."""
    units = {"GPU": wanted.get("num_gpus", 0), "CPU": wanted.get("num_cpus", 0), **wanted.get("resources", {})}
    return min(int(offered.get(name, 0) // unit) for name, unit in units.items() if unit)


def _text(wanted: dict[str, Any]) -> str:
    named = ", ".join(wanted.get("resources", ()))
    return named or ("a GPU" if "num_gpus" in wanted else "a CPU")


def _flags(wanted: dict[str, Any]) -> str:
    return "--num-gpus=N" if "num_gpus" in wanted else "--num-cpus=N"


def _accepted(reply: dict[str, str], place: str) -> None:
    """MoecheckError or WorkerBug for an answer that says that there is no verdict."""
    if reply.get("fault"):
        raise MoecheckError(f"{reply.get('place', place)}: {reply['fault']}")
    if "bug" in reply:
        raise WorkerBug(f"{place}: {reply['bug']}")
    if reply.get("version", __version__) != __version__:
        where = reply.get("place", place)
        raise MoecheckError(f"{where} has moecheck {reply['version']}, this is {__version__}; install one release on all nodes")


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MoecheckError("--executor ray: ray is not installed; pip install 'moecheck[ray]'") from error
