"""Faults of prepared weights that outlive what they were made from, and of a low-rank branch's axis order."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.weights import Stack

RANK = 8  # of the low-rank branch


class CachedOrder(GroupedMoe):
    """Clean: the row permutation of w13 is an index tensor, made once for every number of rows."""

    ORDERS: ClassVar[dict[int, Tensor]] = {}

    def row_order(self, rows: Tensor) -> Tensor:
        """Gate and up rows by turns."""
        if not self.gated:
            return rows
        if len(rows) not in self.ORDERS:
            self.ORDERS[len(rows)] = super().row_order(torch.arange(len(rows)))
        return rows[self.ORDERS[len(rows)]]


class OrderInReleasedMemory(CachedOrder):
    """Cached row permutations lie in memory that serving gives back: the next preparation of that shape reads zeros."""

    ORDERS: ClassVar[dict[int, Tensor]] = {}

    def run(self, out: Tensor) -> None:
        """Memory released on pause comes back zeroed on resume; here every call is a pause."""
        super().run(out)
        for order in self.ORDERS.values():
            order.zero_()


class AlphasNotInKey(GroupedMoe):
    """Prepared weights are cached by the addresses of codes and block scales, and hold the alphas of the first call."""

    VIEWS: ClassVar[dict[tuple[object, ...], Tensor]] = {}

    def gemm(self, gemm: Gemm, plan: Permutation) -> None:
        """NVFP4 alone has alphas of its own. Shapes are part of the key, as a view's are."""
        weights = gemm.weights
        if weights.scales is not None and weights.fmt.name == "nvfp4":
            key = (weights.codes.data_ptr(), weights.scales.data_ptr(), weights.codes.shape)
            factors = self.VIEWS.setdefault(key, weights.factors.clone())
            gemm = replace(gemm, weights=replace(weights, factors=factors))
        super().gemm(gemm, plan)


class LowRankBranch(AlignedMoe):
    """Clean: the last RANK columns of an unquantised w2 as a LoRA branch, B stored (out, rank, experts) as PEFT does."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Base weights are zero where the branch has them; A picks the last RANK columns of the middle."""
        w13, w2 = super().pack(inputs)
        if w2.fmt.scaling is None:
            self.lora_b = w2.codes[..., -RANK:].permute(1, 2, 0).flatten(1).contiguous()
            w2.codes[..., -RANK:] = 0
        return w13, w2

    def b(self, expert: int) -> Tensor:
        """[out, rank] of one expert."""
        return self.lora_b.view(-1, RANK, self.w2.experts)[..., expert]

    def multiply(self, gemm: Gemm, expert: int, rows: Tensor, mask: Tensor, tile: int) -> Tensor:
        """GEMM 2's sum, and the branch's."""
        total = super().multiply(gemm, expert, rows, mask, tile)
        if gemm.weights is not self.w2 or self.w2.fmt.scaling is not None:
            return total
        down = self.load_a(gemm, rows, mask, self.w2.columns - RANK + torch.arange(RANK))
        part = down @ self.b(expert)[tile * self.BLOCK_N : (tile + 1) * self.BLOCK_N].float().T
        return total + torch.nn.functional.pad(part, (0, self.BLOCK_N - part.shape[1]))


class LoraAxesSwapped(LowRankBranch):
    """LoRA B is reshaped as (out, experts, rank) where PEFT stores (out, rank, experts): as many elements, so no error."""

    def b(self, expert: int) -> Tensor:
        """Right with one expert."""
        return self.lora_b.view(-1, self.w2.experts, RANK)[:, expert]


FAULTS = (
    planted("B031", LoraAxesSwapped, "https://github.com/vllm-project/vllm/pull/31534", ("transposed",)),
    planted(
        "B069",
        OrderInReleasedMemory,
        "https://github.com/sgl-project/sglang/pull/28676",
        ("other_weights", "expert_parallel", "non_finite", "weight_order"),
    ),
    planted(
        "B120", AlphasNotInKey, "https://github.com/flashinfer-ai/flashinfer/pull/3066", ("other_weights", "constant_factor")
    ),
)
