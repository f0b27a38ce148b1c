"""Traces of all ranks -> Verdict: the sum over the ranks against the oracle, and where it goes wrong, the first boundary that
something wrong crossed: dispatch, a rank's kernel, the way back, or the combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.backends.base import Backend
from harness.checks import untrusted
from harness.compare import compare
from harness.diagnose import diagnose
from harness.inputs import Inputs
from harness.op_answers import promised
from harness.oracle import Expected
from harness.parallel import expected as answers
from harness.parallel.expected import Traffic
from harness.parallel.part import part
from harness.parallel.rank import received_of
from harness.subject import same
from harness.verdict import Diagnosis, Finding, Stage, Status, Verdict

Trace = dict[str, Tensor]
CLOSE = 2.0**-6  # relative, of a guess at what a wrong combine did: two roundings to bf16 and room; another guess is off by 1


@dataclass(frozen=True)
class Layer:
    """A case over several ranks, and what it should give."""

    subject: str
    backend: Backend
    inputs: Inputs
    traffic: Traffic
    expected: Expected

    def untrusted(self) -> Verdict | None:
        """Where nothing would be tested."""
        case = self.inputs.case
        reason = untrusted(case, self.expected)
        return Verdict(case.id, self.subject, Status.UNTRUSTED, Stage.ORACLE, reason) if reason else None

    def judge(self, traces: Sequence[Trace]) -> Verdict:
        """The verdict on what the ranks gave."""
        case, place = self.inputs.case, self.traffic.placement
        for rank, trace in enumerate(traces):
            wanted = (len(place.tokens_of(rank)), case.shape.hidden), promised(case)[1]
            if (tuple(trace["out"].shape), trace["out"].dtype) != wanted:
                got = f"{trace['out'].dtype} {tuple(trace['out'].shape)}"
                text = f"rank {rank}, during combine: {got}, wanted {wanted[1]} {wanted[0]}"
                return self._verdict(Status.MALFORMED, text, (_finding(rank, "combine", text),))
        output = torch.cat([trace["out"] for trace in traces])
        comparison = compare(self.expected, output)
        if comparison.agrees:
            return Verdict(case.id, self.subject, Status.PASSED, Stage.DONE, comparison=comparison)
        finding = self._dispatched(traces) or self._computed(traces) or self._returned(traces) or self._combined(traces)
        findings = () if finding is None else (finding,)
        diagnosis = diagnose(self.expected, output, comparison, [])
        if finding is not None and diagnosis.kind == "unexplained":
            diagnosis = Diagnosis("unexplained", "see the finding")
        share = f"{comparison.beyond} of {comparison.total} elements beyond the bound, worst z {comparison.worst:.3g}"
        reason = "; ".join([*(f.text for f in findings), f"{diagnosis.kind}: {diagnosis.text} [{share}]"])
        return Verdict(case.id, self.subject, Status.WRONG, Stage.DONE, reason, findings, comparison, diagnosis)

    def _verdict(self, status: Status, text: str, findings: tuple[Finding, ...]) -> Verdict:
        return Verdict(self.inputs.case.id, self.subject, status, Stage.COMPARE, text, findings)

    def _dispatched(self, traces: Sequence[Trace]) -> Finding | None:
        """Every rank has what the others were to send it, bit for bit; who sent the first wrong rows is named."""
        for rank, trace in enumerate(traces):
            due = self.traffic.received(self.inputs, rank)
            for name, wanted in (("x", due.x), ("ids", due.ids), ("weights", due.weights)):
                if len(trace[name]) != len(wanted):
                    text = f"rank {rank}, during dispatch: it received {len(trace[name])} rows, the routing says {len(wanted)}"
                    return _finding(rank, "dispatch", text)
                if same(wanted, trace[name]):
                    continue
                source, bad = self._source(rank, wanted, trace[name])
                what = f"{bad} rows of {name} that it sent to rank {rank} are not those of the tokens"
                text = f"rank {source}, during dispatch: {what}"
                return _finding(source, "dispatch", text)
        return None

    def _source(self, rank: int, wanted: Tensor, got: Tensor) -> tuple[int, int]:
        """(who sent the first wrong row, how many of its rows are wrong)."""
        wrong = (wanted != got).any(-1)
        lengths = [len(packets[rank]) for packets in self.traffic.packets]
        parts = wrong.split(lengths)
        source = next(i for i, part_ in enumerate(parts) if part_.any())
        return source, int(parts[source].sum())

    def _computed(self, traces: Sequence[Trace]) -> Finding | None:
        """Every rank's kernel gave what its experts give for what it received."""
        for rank, trace in enumerate(traces):
            given = part(self.inputs, self.traffic.placement, rank, received_of(trace))
            if not len(given.x):
                continue
            comparison = compare(answers.of_rank(self.backend, given), trace["rows"])
            if not comparison.agrees:
                share = f"{comparison.beyond} of {comparison.total} elements beyond the bound"
                text = f"rank {rank}, during launch: its kernel's rows are wrong: {share}, worst z {comparison.worst:.3g}"
                return _finding(rank, "launch", f"{text} (case {given.case.id} on its experts {_held(given)})")
        return None

    def _returned(self, traces: Sequence[Trace]) -> Finding | None:
        """Every rank has back, bit for bit, what the others' kernels gave for its packets."""
        packets = self.traffic.packets
        computed = [trace["rows"].split([len(row[rank]) for row in packets]) for rank, trace in enumerate(traces)]
        for home, trace in enumerate(traces):
            if len(trace["returned"]) != (due := sum(len(p) for p in packets[home])):
                text = f"rank {home}, during return: {len(trace['returned'])} rows came back, {due} were sent"
                return _finding(home, "return", text)
            for rank, back in enumerate(trace["returned"].split([len(p) for p in packets[home]])):
                if same(computed[rank][home], back):
                    continue
                bad = int((computed[rank][home] != back).any(-1).sum())
                what = "all zero" if not bool(back.any()) else "not those of its kernel"
                text = f"rank {rank}, during return: {bad} of {len(back)} rows that it gave back to rank {home} are {what}"
                return _finding(rank, "return", text)
        return None

    def _combined(self, traces: Sequence[Trace]) -> Finding | None:
        """What is left: a rank adds up rightly what came back, or does not; a guess at what it did instead."""
        place = self.traffic.placement
        for home, trace in enumerate(traces):
            tokens = place.tokens_of(home)
            packets = [p - torch.tensor([tokens.start, 0]) for p in self.traffic.packets[home]]
            weights = self.inputs.topk_weights[tokens.start : tokens.stop]
            added = answers.contributions(trace["returned"], packets, weights, len(tokens))
            if not len(tokens) or _alike(added.sum(0), trace["out"]):
                continue
            twice = answers.contributions(trace["returned"], packets, weights.square(), len(tokens)).sum(0)
            guesses = {f"the results of rank {r} are missing": added.sum(0) - added[r] for r in range(place.ranks)}
            guesses |= {"the routing weights are applied twice": twice} if place.slots else {}
            fitting = [what for what, guess in guesses.items() if _alike(guess, trace["out"])]
            said = fitting[0] if fitting else "its sum is not that of the rows that came back"
            return _finding(home, "combine", f"rank {home}, during combine: {said}")
        return None


def _held(given: Inputs) -> str:
    first = getattr(given, "first", 0)
    return f"{given.local.start + first}..{given.local.stop - 1 + first}"


def _alike(value: Tensor, output: Tensor) -> bool:
    error = (value - output.double()).norm()
    return bool(error <= CLOSE * output.double().norm())


def _finding(rank: int, during: str, text: str) -> Finding:
    return Finding("rank", text, {"rank": rank, "during": during})
