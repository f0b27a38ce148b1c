"""Faults of sorting slots by expert: a kernel that does nothing, lost slots, counted padding, an early return."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.grouped import GroupedMoe, Permutation

HISTOGRAM_BLOCK = 64  # slots of a program of the histogram; 1024 there, where batches are larger


class AlignKernelDoesNothing(AlignedMoe):
    """The binary has no code for this GPU: moe_align_block_size returns without having written its outputs."""

    def align(self, ids: Tensor) -> Blocks:
        """All three outputs as they were allocated."""
        capacity = self.capacity(ids.numel())
        sorted_ids, expert_ids = (torch.empty(n, dtype=torch.int32) for n in (capacity, capacity // self.BLOCK_M))
        return Blocks(sorted_ids, expert_ids, int(torch.empty(1, dtype=torch.int32)))


class DuplicateExpertCountedOnce(AlignedMoe):
    """The compaction asks whether any lane of a token names the expert: named twice, one of the two slots is lost."""

    def align(self, ids: Tensor) -> Blocks:
        """Two lanes race for one place; the later one wins, the other's slot is in no block."""
        blocks = super().align(ids)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        lost = ((ids[:, :, None] == ids[:, None, :]) & later & (ids >= 0)[:, :, None]).any(-1).flatten()
        slots = blocks.sorted_ids.long()
        blocks.sorted_ids[torch.cat([lost, lost.new_zeros(1)])[slots]] = ids.numel()
        return blocks


class PaddingLanesCounted(GroupedMoe):
    """Masked lanes of the histogram load 0 and are summed unmasked: expert 0 counts the last block's padding."""

    def permute(self, ids: Tensor, weights: Tensor) -> Permutation:
        """Every later expert's rows move up by as much."""
        plan = super().permute(ids, weights)
        padding = -ids.numel() % HISTOGRAM_BLOCK
        first = int(plan.offsets[1])
        plan.offsets[1:] += padding
        plan.row_of[plan.row_of >= first] += padding
        return plan


class OneSlotPerExpert(AlignedMoe):
    """The scatter does not advance an expert's position: one of its slots stays, the others' places keep the sentinel."""

    def align(self, ids: Tensor) -> Blocks:
        """Counts and expert_ids are right."""
        blocks = super().align(ids)
        experts = blocks.expert_ids.repeat_interleave(self.BLOCK_M)
        first = torch.ones_like(experts, dtype=torch.bool)
        first[1:] = experts[1:] != experts[:-1]
        blocks.sorted_ids[~first] = ids.numel()
        return blocks


class NoTokensReturnTheMap(GroupedMoe):
    """Without a token the permutation returns early with its row map beside the output: a pair instead of a tensor."""

    def __call__(self) -> Tensor:
        """Another arity for zero tokens."""
        if self.shape.tokens:
            return super().__call__()
        return self.step["x"], torch.empty(0, dtype=torch.int32)  # type: ignore[return-value]


UNWRITTEN = (
    "non_finite",
    "nan_from_padding",
    "never_written",
    "poison",
    "exception",
    "missing_slot",
    "missing_expert",
    "zeros",
)
FAULTS = (
    planted("B078", AlignKernelDoesNothing, "https://github.com/sgl-project/sglang/issues/30245", (*UNWRITTEN, "stale")),
    planted("B174", NoTokensReturnTheMap, "https://github.com/ROCm/TransformerEngine/pull/161", ("output_type",)),
    planted("B188", DuplicateExpertCountedOnce, "https://github.com/ggml-org/llama.cpp/pull/26294", ("duplicate_expert",)),
    planted("B203", PaddingLanesCounted, "https://github.com/ByteDance-Seed/Triton-distributed/issues/181", ("exception",)),
    planted(
        "B205",
        OneSlotPerExpert,
        "https://github.com/vllm-project/vllm-xpu-kernels/issues/453",
        (*UNWRITTEN, "duplicate_expert"),
    ),
)
