"""Faults of moe_align_block_size and of the kernels that read its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.memory import load


class ExpertIdsTailZero(AlignedMoe):
    """The unused tail of expert_ids is 0, not -1: kernels that skip by -1 run it as expert 0 on undefined slots."""

    def align(self, ids: Tensor) -> Blocks:
        """The consumer goes by expert id alone, so post_padded does not stop it; sorted_ids has no defined tail."""
        blocks = super().align(ids)
        blocks.expert_ids[blocks.post_padded // self.BLOCK_M :] = 0
        undefined = torch.empty_like(blocks.sorted_ids)
        undefined[: blocks.post_padded] = blocks.sorted_ids[: blocks.post_padded]
        return Blocks(undefined, blocks.expert_ids, len(undefined))


class FloorDividedGrid(AlignedMoe):
    """The grid of the last kernel is hidden // 256 blocks: columns behind the last whole block are never written."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Whole blocks only."""
        whole = self.shape.hidden // 256 * 256
        full = torch.empty_like(out)
        super().combine(rows, full)
        out[:, :whole] = full[:, :whole]


class PaddedLanesReadSlotZero(AlignedMoe):
    """The masked load of slot ids has other=0 where the sentinel was due: padding lanes rewrite slot 0 with a wrong expert."""

    def program(self, gemm: Gemm, blocks: Blocks, block: int, tile: int) -> None:
        """The sentinel check passes for slot 0."""
        if block * self.BLOCK_M < blocks.post_padded:
            at = block * self.BLOCK_M + torch.arange(self.BLOCK_M)
            slots = load(blocks.sorted_ids, at)
            blocks.sorted_ids[at] = torch.where(slots >= gemm.out.shape[0], 0, slots)
        super().program(gemm, blocks, block, tile)


FAULTS = (
    planted(
        "B007",
        ExpertIdsTailZero,
        "https://github.com/vllm-project/vllm/pull/35161",
        ("red_zone", "exception", "crashed", "poison"),
    ),
    planted(
        "B022",
        FloorDividedGrid,
        "https://github.com/vllm-project/vllm/pull/49087",
        ("never_written", "non_finite", "tail_tile", "out_buffer", "out_strided"),
    ),
    planted(
        "B030",
        PaddedLanesReadSlotZero,
        "https://github.com/vllm-project/vllm/pull/32279",
        ("wrong_expert", "row_permutation"),
    ),
)
