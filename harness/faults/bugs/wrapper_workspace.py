"""Faults of workspaces, tuners and replays: sized for another path, zeroed once, a wrong dummy, no wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.weights import Stack


class Chunked(BatchedMoe):
    """Clean: chunks of tokens in turn; a short last one takes the masked kernels, whose slabs have a fixed size."""

    CHUNK: ClassVar[int] = 8  # 128 in the thread, where a batch of 130 leaves a chunk of 2
    FEW: ClassVar[int] = 4  # tokens up to which a chunk takes the masked kernels
    MASKED_ROWS: ClassVar[int] = 64  # rows of their slabs: FEW tokens of up to 16 slots, in whole tiles

    def run(self, out: Tensor) -> None:
        """Each chunk is a layer of its own on a part of the step's data."""
        step, shape = self.step, self.shape
        try:
            for start in range(0, shape.tokens, self.CHUNK):
                self.enter(start)
                self.step = {name: tensor[start : start + self.CHUNK] for name, tensor in step.items()}
                self.shape = replace(shape, tokens=len(self.step["x"]))
                super().run(out[start : start + self.CHUNK])
        finally:
            self.step, self.shape = step, shape

    def enter(self, start: int) -> None:
        """Before the chunk that begins with token `start`: new workspaces."""
        self.arenas: dict[str, Tensor] = {}

    def capacity(self) -> int:
        """By the implementation that the chunk takes."""
        return self.MASKED_ROWS if self.shape.tokens <= self.FEW else self.CHUNK * self.shape.top_k

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """A view of the arena, which the first use sizes."""
        if name not in self.arenas:
            self.arenas[name] = self.empty(rows * columns)
        return self.arenas[name][: rows * columns].view(rows, columns)


class WorkspaceOfFirstChunk(Chunked):
    """Workspaces are sized once, by the first chunk's implementation; a short last chunk takes one that needs more."""

    def enter(self, start: int) -> None:
        """Once per call."""
        if start == 0:
            super().enter(start)


class CountsOfFirstChunk(Chunked):
    """expert_num_tokens is not computed again per chunk: later chunks multiply as many rows per expert as the first."""

    def dispatch(self, ids: Tensor) -> Slabs:
        """The rows themselves are the chunk's own."""
        slabs = super().dispatch(ids)
        self.arenas.setdefault("counts", slabs.masked_m)
        return replace(slabs, masked_m=self.arenas["counts"])

    def enter(self, start: int) -> None:
        """The counts outlive the chunk."""
        counts = {"counts": self.arenas["counts"]} if start else {}
        super().enter(start)
        self.arenas |= counts


class LastArriverFinalizes(GroupedMoe):
    """Clean: experts count arrivals in a zeroed scratchpad; the last one runs the finalize and resets the counter."""

    scratch: Tensor | None = None

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """Every expert arrives once."""
        if self.scratch is None:
            self.scratch = self.new_scratch()
        for _ in self.local:
            self.scratch += 1
            if int(self.scratch) == len(self.local):
                super().finalize(rows, plan, out)
                self.scratch.zero_()

    def new_scratch(self) -> Tensor:
        """int32 counter, allocated at the first launch."""
        return torch.empty((), dtype=torch.int32).zero_()


class ScratchZeroedOncePerProcess(LastArriverFinalizes):
    """A static bool zeroes the scratchpad at the process's first launch only: another layer's counter starts anywhere."""

    zeroed: ClassVar[bool] = False

    def new_scratch(self) -> Tensor:
        """Right for the first layer of the process."""
        if not ScratchZeroedOncePerProcess.zeroed:
            ScratchZeroedOncePerProcess.zeroed = True
            return super().new_scratch()
        return torch.empty((), dtype=torch.int32)


class Autotuned(GroupedMoe):
    """Clean: the tuner profiles the GEMMs on dummy weights of the real ones' layout, then runs the layer."""

    def tactics(self) -> dict[str, Callable[[], Tensor]]:
        """Serving without tuning, and with."""
        return {"untuned": self, "autotuned": self.tuned}

    def tuned(self) -> Tensor:
        """Profile the last expert of both projections, then the call."""
        for weights in (self.w13, self.w2):
            dummy = replace(weights, codes=torch.zeros_like(weights.codes), scales=self.dummy_scales(weights))
            probe = Gemm(torch.zeros(1, weights.columns, dtype=self.dtype), dummy, self.empty(1, weights.rows))
            for tile in range(self.grid_n(weights.rows)):
                self.multiply(probe, weights.experts - 1, torch.zeros(1).long(), torch.ones(1).bool(), tile)
        return self()

    def dummy_scales(self, weights: Stack) -> Tensor | None:
        """As many as the 128x4 tiles hold, padding included."""
        return None if weights.scales is None else torch.zeros_like(weights.scales)


class DummyScalesUnpadded(Autotuned):
    """The tuner's dummy of the swizzled scales has their logical size: profiling reads past it, serving is right."""

    def dummy_scales(self, weights: Stack) -> Tensor | None:
        """Rows times blocks, without the padding that the layout derives."""
        if weights.scales is None:
            return None
        return torch.zeros(weights.experts * weights.rows * weights.blocks, dtype=weights.scales.dtype)


class HostExecutor(AlignedMoe):
    """Clean: experts run on the host; a replay hands the step over, waits for the executor, and copies its result."""

    def capture(self) -> Callable[[], Tensor]:
        """The eager call before a capture fills the executor's buffer."""
        out, host = (self.empty(self.shape.tokens, self.shape.hidden) for _ in range(2))
        self.run(host)

        def replay() -> Tensor:
            self.handshake(host, out)
            return out

        return replay

    def handshake(self, host: Tensor, out: Tensor) -> None:
        """The copy waits for the executor."""
        self.run(host)
        out.copy_(host)


class ReplayWithoutHandshake(HostExecutor):
    """The stream's wait for the host executor is missing under replay: the copy takes the previous step's result."""

    def handshake(self, host: Tensor, out: Tensor) -> None:
        """The copy does not wait."""
        out.copy_(host)
        self.run(host)


FAULTS = (
    planted("B016", WorkspaceOfFirstChunk, "https://github.com/vllm-project/vllm/pull/20392", ("exception",)),
    planted(
        "B016",
        CountsOfFirstChunk,
        "https://github.com/vllm-project/vllm/pull/20392",
        ("non_finite", "nan_from_padding", "poison", "missing_expert"),
    ),
    planted(
        "B132",
        ScratchZeroedOncePerProcess,
        "https://github.com/flashinfer-ai/flashinfer/pull/3424",
        ("never_written", "non_finite", "repeat", "poison", "out_buffer", "out_strided", "other_weights"),
    ),
    planted(
        "B106",
        DummyScalesUnpadded,
        "https://github.com/flashinfer-ai/flashinfer/issues/3558",
        ("exception", "tactic"),
    ),
    planted("B224", ReplayWithoutHandshake, "https://github.com/FlashML-org/FreeToken/issues/350", ("graph", "stale")),
)
