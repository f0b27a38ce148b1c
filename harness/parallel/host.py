"""The host of a kernel on several ranks: all-to-all dispatch to the ranks that hold the experts, and combine back home.

A host of somebody else's is a class with the same three methods (`moecheck parallel --host MODULE:CLASS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from harness.parallel.placement import Placement

Message = dict[str, object]
Splits = tuple[list[int], list[int]]


@dataclass
class Wire:
    """all-to-all between the ranks. tell(message): to the supervisor, before and after each wait for the other ranks."""

    tell: Callable[[Message], None]
    device: torch.device

    def counts(self, stage: str, send: Tensor) -> Tensor:
        """What each rank is about to send here, of what this one sends to each: int64 [ranks]."""
        receive = torch.empty_like(send)
        self._wait(stage, receive, send, None, {})
        return receive

    def rows(self, stage: str, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """rows [sum(send), columns], those for rank 0 first -> [sum(receive), columns], those of rank 0 first. They travel as
        bytes: gloo has no bf16 and no 8-bit floats."""
        found = rows.new_empty((sum(receive), rows.shape[1]))
        told = {"send": list(send), "receive": list(receive)}
        self._wait(stage, _bytes(found), _bytes(rows.contiguous()), (list(receive), list(send)), told)
        return found

    def _wait(self, stage: str, to: Tensor, data: Tensor, splits: Splits | None, told: Mapping[str, object]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a kernel's hang or error is not the wire's
        self.tell({"stage": stage, "waits": True, **told})
        dist.all_to_all_single(to, data, *(splits or ()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.tell({"stage": stage})


def _bytes(rows: Tensor) -> Tensor:
    """The same memory, [rows, bytes of a row]."""
    return rows.view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


@dataclass
class Sent:
    """What a rank sent, in the order of its packets: token int64 [n], counted from its own first; column int64 [n]: the
    slot, or the rank it went to; weights float32 [n], what a row is worth at home; send, receive: packets to and from each
    rank."""

    token: Tensor
    column: Tensor
    weights: Tensor
    send: list[int]
    receive: list[int]


@dataclass
class Received:
    """What a rank has to compute: x [n, hidden]; ids int64 [n, slots], global expert numbers; weights float32 [n, slots]."""

    x: Tensor
    ids: Tensor
    weights: Tensor


class Host:
    """One rank's side. Packets to a rank are in the order of tokens, then slots."""

    def __init__(self, wire: Wire, placement: Placement, rank: int) -> None:
        self.wire, self.placement, self.rank = wire, placement, rank

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Received, Sent]:
        """x [tokens, hidden], ids and weights [tokens, top_k] of this rank's tokens -> what it received, and what it sent."""
        target = self._ranks_of(ids)
        packets = [self._packets(target, rank) for rank in range(self.placement.ranks)]
        token, column = (torch.cat([packet[i] for packet in packets]) for i in (0, 1))
        send = torch.tensor([len(packet[0]) for packet in packets], device=x.device)
        receive = self.wire.counts("dispatch", send)
        counts = send.tolist(), receive.tolist()
        if self.placement.slots:
            worth, given = weights[token, column], (ids[token, column, None], weights.new_ones(len(token), 1))
        else:
            worth, given = weights.new_ones(len(token)), (ids[token], weights[token])
        sent = Sent(token, column, worth, *counts)
        return Received(*(self.wire.rows("dispatch", rows, *counts) for rows in (x[token], *given))), sent

    def give_back(self, rows: Tensor, sent: Sent) -> Tensor:
        """rows [n, hidden] of what was received -> the rows of what was sent, in the order of its packets."""
        return self.wire.rows("return", rows, sent.receive, sent.send)

    def combine(self, rows: Tensor, sent: Sent, tokens: int) -> Tensor:
        """The layer's output [tokens, hidden] for this rank's tokens: the weighted sum in fp32, rounded once."""
        columns = int(sent.column.max()) + 1 if len(sent.column) else 1
        parts = torch.zeros(tokens, columns, rows.shape[1], device=rows.device)
        parts[sent.token, sent.column] = rows.float() * sent.weights[:, None]
        return parts.sum(1).to(rows.dtype)

    def _ranks_of(self, ids: Tensor) -> Tensor:
        """The rank that holds each expert."""
        starts = [self.placement.experts_of(rank).start for rank in range(self.placement.ranks)]
        return torch.searchsorted(torch.tensor(starts, device=ids.device), ids, right=True) - 1

    def _packets(self, target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(token, column) of the packets for one rank."""
        hit = target == rank
        if self.placement.slots:
            token, column = hit.nonzero(as_tuple=True)
            return token, column
        token = hit.any(-1).nonzero().flatten()
        return token, torch.full_like(token, rank)
