"""Judges the items of a plan on a group of ranks: support, oracle, one request to all, blame or judgement."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from harness import config, device
from harness.backends import discover
from harness.backends.base import Backend, Device, Support
from harness.case import Case
from harness.errors import MoecheckError
from harness.inputs import Inputs, make_inputs
from harness.known import mark
from harness.parallel import blame
from harness.parallel.cases import indivisible, split
from harness.parallel.expected import Traffic, traffic, whole
from harness.parallel.group import Group
from harness.parallel.judge import Layer
from harness.parallel.part import by_slots, case_of
from harness.parallel.placement import Placement
from harness.parallel.rank import HOST, RankSetup
from harness.select import Item
from harness.verdict import Stage, Status, Verdict

TRANSPORTS = {"gloo": "cpu", "nccl": "cuda"}


def transport_of(here: Device, wanted: str | None, ranks: int) -> str:
    """gloo on CPUs, NCCL on GPUs; MoecheckError where that many ranks cannot be."""
    natural = next(name for name, kind in TRANSPORTS.items() if kind == here.kind)
    if (wanted or natural) != natural:
        raise MoecheckError(
            f"--transport {wanted}: on {here.arch} the ranks talk over {natural}; another platform is --platform"
        )
    if here.kind == "cuda" and len(device.visible()) < ranks:
        raise MoecheckError(f"--ranks {ranks}: NCCL wants a GPU for each, and this machine shows {len(device.visible())}")
    return natural


class Ranks:
    """One group, one case in flight. Use as a context manager."""

    def __init__(self, here: Device, ranks: int, limit_s: float, plugins: tuple[str, ...], host: str = HOST) -> None:
        self.device, self.ranks, self.limit_s = here, ranks, limit_s
        self._backends = discover(plugins)
        self._scratch = tempfile.TemporaryDirectory(prefix="moecheck-")
        folder = Path(self._scratch.name)
        setup = RankSetup(here, plugins, "", ranks=ranks, transport=transport_of(here, None, ranks), host=host, limit_s=limit_s)
        self.group = Group(setup, folder, limit_s)
        self._known, self._facts = config.known_issues(), dict[str, tuple[Support, dict[str, str]]]()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.group.close()
        self._scratch.cleanup()

    def judge(self, item: Item) -> Verdict:
        """The verdict on one item of a plan."""
        started = time.perf_counter()
        name, ranks = split(item.subject)
        assert ranks == self.ranks
        backend = self._backends[name]
        support, environment = self._probed(name)
        if support.ok:
            verdict = self._judged(Case.parse(item.case_id), item.subject, backend)
        else:
            verdict = Verdict(item.case_id, item.subject, Status.UNAVAILABLE, Stage.SUPPORT, support.reason)
        setup = self.group.setup
        environment = {"ranks": str(ranks), "transport": setup.transport, "host": setup.host, **environment}
        seconds = round(time.perf_counter() - started, 4)
        verdict = replace(verdict, environment=environment, seconds=seconds, plugins=setup.plugins)
        return self._excused(verdict, name)

    def _excused(self, verdict: Verdict, name: str) -> Verdict:
        """With the kernel's known issue, where a rank's kernel is what failed; on several ranks the issue need not show."""
        if any(finding.evidence.get("during") == "launch" for finding in verdict.findings):
            return replace(verdict, known=mark(replace(verdict, subject=name), self._known).known)
        return verdict

    def _probed(self, name: str) -> tuple[Support, dict[str, str]]:
        """Can the backend run on every rank, and what it runs in."""
        if name not in self._facts:
            answers = self.group.ask([{"probe": name}] * self.ranks)
            replies = [answer.reply for answer in answers]
            found = [Support(**r["support"]) if r else Support.no("library", "its probe died") for r in replies]
            worst = next((support for support in found if not support.ok), found[0])
            self._facts[name] = worst, {} if replies[0] is None else dict(replies[0]["environment"])
        return self._facts[name]

    def _judged(self, case: Case, subject: str, backend: Backend) -> Verdict:
        inputs = make_inputs(case)
        placement = Placement(self.ranks, case.shape.tokens, case.shape.experts, by_slots(backend))
        plan = traffic(inputs, placement)
        calls, refusal = self._calls(backend, inputs, plan)
        if refusal:
            return Verdict(case.id, subject, Status.UNSUPPORTED, Stage.SUPPORT, refusal)
        layer = Layer(subject, backend, inputs, plan, whole(backend, inputs, plan))
        if (verdict := layer.untrusted()) is not None:
            return verdict
        with tempfile.TemporaryDirectory(dir=self._scratch.name) as folder:
            paths = [Path(folder) / f"rank{rank}.safetensors" for rank in range(self.ranks)]
            request = {"judge": case.id, "subject": backend.name, "calls": calls}
            answers = self.group.ask([{**request, "trace": str(path)} for path in paths])
            for answer in answers:
                if answer.reply is not None and "user_error" in answer.reply:
                    raise MoecheckError(str(answer.reply["user_error"]))
            if any(answer.bad for answer in answers):
                return blame.verdict(case, subject, answers, self.limit_s, plan.due())
            traces = [load_file(path) for path in paths]
        wrong = blame.misrouted(answers, plan.due())
        verdict = layer.judge(traces)
        return blame.accused(verdict, wrong) if wrong and verdict.status.failed else verdict

    def _calls(self, backend: Backend, inputs: Inputs, plan: Traffic) -> tuple[list[int], str]:
        """(the ranks whose kernel is called, why the case cannot be run). A rank without packets is called if its kernel takes
        an empty batch, and skipped otherwise, as engines do."""
        if reason := indivisible(backend, inputs.case):
            return [], reason
        calls = []
        for rank in range(self.ranks):
            rows = sum(len(packets[rank]) for packets in plan.packets)
            support = backend.supports(case_of(inputs.case, plan.placement, rank, rows), self.device)
            if support.ok:
                calls.append(rank)
            elif rows:
                return [], f"rank {rank}: {support.reason}"
        return calls, ""
