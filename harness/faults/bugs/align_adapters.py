"""Faults of moe_lora_align_block_size: one set of blocks per adapter, and one for the tokens without an adapter.

The adapters here add nothing (rank 0), so that the layer's answer is known: what is judged is the alignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.memory import load, store

ADAPTERS = 2  # of max_loras; tokens take turns, and every third has none
SETS = ADAPTERS + 1


@dataclass
class AdapterBlocks(Blocks):
    """Blocks of every adapter, one set behind the other; adapters int32 [SETS]: post_padded of each."""

    adapters: Tensor


class AdapterMoe(AlignedMoe):
    """Clean: slots are aligned per adapter, and every GEMM runs once per adapter."""

    def needed(self, slots: int) -> int:
        """max_num_tokens_padded: every slot, and all but one place of a block per expert and for the experts elsewhere."""
        return slots + (len(self.local) + 1) * (self.BLOCK_M - 1)

    def allocated(self, slots: int) -> int:
        """Places of one adapter: whole blocks."""
        return -(-self.needed(slots) // self.BLOCK_M) * self.BLOCK_M

    def active(self) -> int:
        """Sets that have a token: the first ones."""
        return min(SETS, self.shape.tokens)

    def grid(self) -> int:
        """Programs of the alignment kernel: none counts as an adapter."""
        return SETS

    def align(self, ids: Tensor) -> AdapterBlocks:
        """One program per adapter fills its part of the three outputs."""
        slots = ids.numel()
        sizes = (SETS * self.allocated(slots), SETS * (-(-self.needed(slots) // self.BLOCK_M)), SETS)
        sorted_ids, expert_ids, adapters = (torch.empty(size, dtype=torch.int32) for size in sizes)
        found = AdapterBlocks(sorted_ids, expert_ids, 0, adapters)
        for adapter in range(min(self.grid(), self.active())):
            self.align_adapter(adapter, ids, found)
        return found

    def align_adapter(self, adapter: int, ids: Tensor, found: AdapterBlocks) -> None:
        """Initialise whole blocks with the sentinel, then sort the adapter's slots into them."""
        slots, blocks = ids.numel(), len(found.expert_ids) // SETS
        tokens = torch.arange(len(ids)) % SETS == adapter
        mine = super().align(ids[tokens])
        at = adapter * self.allocated(slots) + torch.arange(blocks * self.BLOCK_M)
        store(found.sorted_ids, at, torch.tensor(slots))
        names = torch.cat([torch.arange(slots).view(ids.shape)[tokens].flatten(), torch.tensor([slots])])
        used = mine.post_padded
        store(found.sorted_ids, at[:used], names[mine.sorted_ids[:used].long()])
        store(found.expert_ids, adapter * blocks + torch.arange(used // self.BLOCK_M), mine.expert_ids[: used // self.BLOCK_M])
        store(found.adapters, torch.tensor([adapter]), torch.tensor([used]))

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """Once per adapter, over its part of the metadata."""
        assert isinstance(blocks, AdapterBlocks)
        places, each = self.allocated(gemm.out.shape[0]), len(blocks.expert_ids) // SETS
        for adapter in range(self.active()):
            sorted_ids = load(blocks.sorted_ids, adapter * places + torch.arange(places))
            expert_ids = load(blocks.expert_ids, adapter * each + torch.arange(each))
            super().gemm(gemm, Blocks(sorted_ids, expert_ids, int(blocks.adapters[adapter])))


class CapacityNotRounded(AdapterMoe):
    """The kernel rounds max_num_tokens_padded up to whole blocks, the caller allocates without: it fills past the end."""

    def allocated(self, slots: int) -> int:
        """As computed in Python."""
        return self.needed(slots)


class GridForgetsNoAdapter(AdapterMoe):
    """The grid has max_loras programs, not one more for tokens without an adapter: their metadata is never written."""

    def grid(self) -> int:
        """Enough unless all adapters are active and some token has none."""
        return ADAPTERS


FAULTS = (
    planted("B027", CapacityNotRounded, "https://github.com/vllm-project/vllm/pull/27311", ("exception",)),
    planted(
        "B028",
        GridForgetsNoAdapter,
        "https://github.com/vllm-project/vllm/pull/40131",
        ("non_finite", "never_written", "poison", "exception", "zeros"),
    ),
)
