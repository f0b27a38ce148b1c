"""Faults of finalize: which rows a token's sum takes, in which type, and what is returned when there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import NOWHERE, AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.memory import load

LOSSY = range(2, 5)  # top_k for which vLLM's moe_sum had a kernel of its own


class MarkedSlots(AlignedMoe):
    """Clean: dispatch marks the slots of other ranks with -1, and a table maps the other ids to local ones."""

    def expert_map(self, ids: Tensor) -> Tensor:
        """Marked slots stay marked."""
        marked = torch.where((ids >= self.local.start) & (ids < self.local.stop), ids, NOWHERE)
        table = torch.full((self.shape.experts,), NOWHERE)
        table[self.local.start : self.local.stop] = torch.arange(len(self.local))
        return self.looked_up(table, marked)

    def looked_up(self, table: Tensor, marked: Tensor) -> Tensor:
        """table[id], NOWHERE for marked ones."""
        return torch.where(marked < 0, NOWHERE, table[marked.clamp(min=0)])


class MarkedSlotsWrap(MarkedSlots):
    """expert_map[topk_ids] with id -1 is the map's last entry: marked slots go to the last expert, where a rank holds it."""

    def looked_up(self, table: Tensor, marked: Tensor) -> Tensor:
        """Negative indices count from the end."""
        return table[marked]


class SumsUnwrittenSlots(AlignedMoe):
    """The GEMMs leave the rows of -1 slots unwritten, and moe_sum adds all top_k rows of a token."""

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """Blocks of no local expert return at once."""
        if int(load(blocks.expert_ids, torch.tensor([block]))) != NOWHERE:
            super().program(gemm, blocks, block, tile)


class EmptyRankReturnsItsInput(GroupedMoe):
    """Unpermute returns its input if that is empty: a rank without rows gives [0, hidden], not [tokens, hidden] of 0."""

    def __call__(self) -> Tensor:
        """The early return."""
        out = super().__call__()
        return out if self.received else out[:0]

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """Remember how many rows there were."""
        self.received = int(plan.offsets[-1])
        super().finalize(rows, plan, out)


class SumsInOutputType(AlignedMoe):
    """moe_sum for top_k 2 to 4 keeps its running sum in bf16: one rounding more per expert after the second."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Left to right."""
        if self.shape.top_k not in LOSSY:
            super().combine(rows, out)
            return
        slots = rows.view(self.shape.tokens, self.shape.top_k, self.shape.hidden)
        total = slots[:, 0].clone()
        for k in range(1, self.shape.top_k):
            total += slots[:, k]
        out.copy_(total)


class DenseInputAssumed(AlignedMoe):
    """The GEMM on x takes it for dense, whatever its strides and offset say: other memory, and no error."""

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """Row stride hidden."""
        if gemm.a is not self.step["x"]:
            return super().load_a(gemm, rows, mask, k)
        inside = mask[:, None] & (k < gemm.weights.columns)
        return load(gemm.a, rows[:, None] * gemm.weights.columns + k, inside).float()


VLLM = "https://github.com/vllm-project/vllm/pull"
FAULTS = (
    planted("B033", MarkedSlotsWrap, f"{VLLM}/46408", ("expert_parallel",)),
    planted("B033", SumsUnwrittenSlots, f"{VLLM}/46408", ("expert_parallel",)),
    planted("B135", DenseInputAssumed, "https://github.com/NVIDIA/TensorRT-LLM/pull/17088", ("strided_inputs",)),
    planted(
        "B176",
        EmptyRankReturnsItsInput,
        "https://github.com/ROCm/Megatron-LM/pull/155",
        ("expert_parallel", "output_shape"),
    ),
    planted("B231", SumsInOutputType, f"{VLLM}/46643", ("precision",)),
)
