"""A wrong probe names what was read: which column, expert or row of w13 gives exactly the output that came."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.case import Case
from harness.oracle import Expected
from harness.verdict import Diagnosis
from harness.whatif import Layer, Loader
from reference.activation import ACTIVATIONS
from reference.experts import forward
from reference.formats import get

PROBES = ("onehot", "idcode")
MOST = 1 << 24  # elements of a table of all experts, columns and rows: 0.1 GiB
LOOKED_AT = 64  # hit tokens
TOLD = 3  # places in the text


@dataclass(frozen=True)
class Table:
    """What every expert makes of a token with its entry in any column: rows [experts, columns, hidden], neurons
    [experts, columns, inter], float64; reads, signs [experts, hidden]: the neuron that an output reads, and how."""

    rows: Tensor
    neurons: Tensor
    reads: Tensor
    signs: Tensor


def named(diagnosis: Diagnosis, expected: Expected, got: Tensor) -> Diagnosis:
    """`diagnosis`, of a probe with what was read where something else was due, if that explains the error bit for bit.
    got [tokens, hidden] as the kernel wrote it, CPU."""
    layer = expected.layer
    if layer is None or not _readable(layer.case) or not bool(got.isfinite().all()):
        return diagnosis
    found = Reader(expected, layer, got.double()).found()
    if not found:
        return diagnosis
    told = "; ".join(found[:TOLD]) + (f"; and {len(found) - TOLD} more" if len(found) > TOLD else "")
    return replace(diagnosis, text=f"{diagnosis.text}; {told}", evidence={**diagnosis.evidence, "read": found[:LOOKED_AT]})


def _readable(case: Case) -> bool:
    shape = case.shape
    plain = all(get(name).scaling is None for name in (case.recipe.acts, case.recipe.middle))
    small = shape.experts * shape.hidden * max(shape.hidden, shape.inter) <= MOST
    return case.fill in PROBES and plain and small


class Reader:
    """Searches the places that a wrong output can come from, token by token, then output column by output column."""

    def __init__(self, expected: Expected, layer: Layer, got: Tensor) -> None:
        self.value, self.routing, self.layer, self.got = expected.value, expected.routing, layer, got
        self.bad = (got != expected.value) & ~expected.ambiguous[:, None]
        self.x = layer.inputs.x.double().cpu()
        self.column = self.x[:, :-1].abs().argmax(-1).tolist()
        self._tables: dict[float, Table] = {}

    def found(self) -> list[str]:
        """What was read, the commonest first; empty if it does not explain every token that is looked at."""
        tokens = self.bad.any(-1).nonzero().flatten().tolist()[:LOOKED_AT]
        told = [self._column(t) or self._expert(t) for t in tokens]
        if all(told):
            return [text for text, _ in Counter(t for t in told if t).most_common()]
        return self._neurons() if self.layer.case.fill == "idcode" else []

    def table(self, token: int) -> Table:
        """For a token's entry, 1 or 2."""
        entry = float(self.x[token, self.column[token]])
        if entry not in self._tables:
            self._tables[entry] = self._made(entry)
        return self._tables[entry]

    def _made(self, entry: float) -> Table:
        case, loader = self.layer.case, Loader(self.layer.inputs)
        x = entry * torch.eye(case.shape.hidden, dtype=torch.float64, device=self.layer.device)[:-1]
        x[:, -1] = 1
        passes, reads, signs = [], [], []
        for expert in range(case.shape.experts):
            weights = loader.weights(expert)
            passes.append(forward(x, weights, ACTIVATIONS[case.activation], self.layer.rounding))
            reads.append(weights.down.abs().argmax(-1))
            signs.append(weights.down.gather(1, reads[-1][:, None])[:, 0])
        rows, neurons = (torch.stack([getattr(p, name) for p in passes]).cpu() for name in ("row", "middle"))
        return Table(rows, neurons, torch.stack(reads).cpu(), torch.stack(signs).cpu())

    def _column(self, token: int) -> str:
        """All slots of the token read another column of x or of w13."""
        ids, weights, bad = self.routing.ids[token], self.routing.weights[token], self.bad[token]
        outputs = (self.table(token).rows[ids] * weights[:, None, None]).sum(0)
        place = _only((outputs[:, bad] == self.got[token, bad]).all(-1))
        return "" if place is None else f"column {place} of w13 was read where column {self.column[token]} was due"

    def _expert(self, token: int) -> str:
        """One slot of the token went to another expert."""
        bad, rows = self.bad[token], self.table(token).rows[:, self.column[token]]
        slots = zip(self.routing.ids[token].tolist(), self.routing.weights[token].tolist(), strict=True)
        error = (self.got - self.value)[token, bad]
        texts = []
        for expert, weight in slots:
            place = _only(((rows - rows[expert])[:, bad] * weight == error).all(-1))
            texts += [] if place is None else [f"expert {place}'s weights were read where expert {expert}'s were due"]
        return texts[0] if len(texts) == 1 else ""

    def _neurons(self) -> list[str]:
        """For each output column and expert: the one row of w13 that gives what came in all of the expert's tokens, or in
        all of its bad ones."""
        found, ids = [], self.routing.ids
        for output in self.bad.any(0).nonzero().flatten().tolist():
            for expert in ids[self.bad[:, output]].unique().tolist():
                slots = (ids == expert).nonzero()
                bad = slots[self.bad[slots[:, 0], output]]
                text = self._neuron(output, expert, slots) or self._neuron(output, expert, bad)
                found += [text] if text else []
        return list(dict.fromkeys(found))

    def _neuron(self, output: int, expert: int, slots: Tensor) -> str:
        """The row that the output of these slots [n, 2] of an expert was made of."""
        table, tokens = self.table(0), slots[:, 0]
        columns = torch.tensor(self.column)[tokens]
        due, sign = int(table.reads[expert, output]), table.signs[expert, output]
        error = (self.got - self.value)[tokens, output]
        came = error / (self.routing.weights[tokens, slots[:, 1]] * sign) + table.neurons[expert, columns, due]
        same = (table.neurons[:, columns] == came[None, :, None]).all(1)
        place = _only(same.flatten())
        if place is None or place == expert * same.shape[1] + due:
            return ""
        other, row = divmod(place, same.shape[1])
        return f"expert {other}'s row {row} of w13 was read where expert {expert}'s row {due} was due"


def _only(matches: Tensor) -> int | None:
    """The one place of matches [n] that is True, or None."""
    places = matches.nonzero().flatten()
    return int(places[0]) if len(places) == 1 else None
