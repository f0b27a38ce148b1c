"""The fused MoE of CUTLASS and TensorRT-LLM: routes itself, permutes tokens by expert, grouped GEMMs over offsets, finalizes.

Gate and up rows are interleaved one by one in storage, block scales lie in 128x4 tiles per expert, workspaces are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.inputs import Inputs
from harness.twins.base import Gemm, Twin
from harness.twins.memory import load, store
from harness.twins.router import ROUTERS


@dataclass
class Permutation:
    """offsets int64 [local experts + 1]: first permuted row of each expert; row_of int64 [tokens, top_k]: permuted row of a
    slot, -1 for experts of other ranks; weights float32 [tokens, top_k]."""

    offsets: Tensor
    row_of: Tensor
    weights: Tensor


class GroupedMoe(Twin):
    """Grouped GEMMs: in-kernel routing, permute, GEMM over expert offsets, activation, GEMM, finalize."""

    NAME: ClassVar[str] = "twin_grouped"
    RECIPES: ClassVar[tuple[str, ...]] = ("bf16", "fp16", "nvfp4", "mxfp4", "fp8_tensor", "mxint4")
    ROUTINGS: ClassVar[tuple[str, ...]] = tuple(ROUTERS)
    SWIZZLED: ClassVar[bool] = True

    def __init__(self, case: object, inputs: Inputs) -> None:
        self.kept: dict[tuple[str, int, int], Tensor] = {}
        super().__init__(case, inputs)  # type: ignore[arg-type]

    def step_buffers(self, inputs: Inputs) -> dict[str, Tensor]:
        """x, the logits, and the bias where the rule has one."""
        found = {"x": inputs.x, "logits": inputs.logits, "bias": inputs.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def row_order(self, rows: Tensor) -> Tensor:
        """Row by row: g0, u0, g1, u1, ..."""
        return torch.stack(rows.chunk(2), 1).flatten(0, 1) if self.gated else rows

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Even columns are gates."""
        return pre[..., 0::2], pre[..., 1::2]

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] of x's dtype, uninitialised at the first call and kept for the next ones."""
        key = (name, rows, columns)
        if key not in self.kept:
            self.kept[key] = self.empty(rows, columns)
        return self.kept[key]

    def run(self, out: Tensor) -> None:
        """Route, permute, GEMM 1, activation, GEMM 2, finalize."""
        plan = self.permute(*self.route())
        slots = self.shape.tokens * self.shape.top_k
        a = self.workspace("a", slots, self.shape.hidden)
        self.expand(a, plan)
        pre = self.workspace("pre", slots, self.w13.rows)
        self.gemm(Gemm(a, self.w13, pre), plan)
        middle = self.workspace("middle", slots, self.shape.inter)
        self.activation_kernel(pre, middle, plan)
        rows = self.workspace("rows", slots, self.shape.hidden)
        self.gemm(Gemm(middle, self.w2, rows), plan)
        self.finalize(rows, plan, out)

    def route(self) -> tuple[Tensor, Tensor]:
        """(ids, weights) [tokens, top_k] from the logits."""
        return ROUTERS[self.case.routing]()(self.step["logits"], self.step.get("bias"), self.shape.top_k)

    def permute(self, ids: Tensor, weights: Tensor) -> Permutation:
        """Local slots sorted by expert, equal experts in slot order."""
        flat = ids.flatten()
        local = torch.where((flat >= self.local.start) & (flat < self.local.stop), flat - self.local.start, len(self.local))
        order = local.argsort(stable=True)
        counts = torch.bincount(local, minlength=len(self.local) + 1)[: len(self.local)]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row_of = torch.empty_like(flat)
        row_of[order] = torch.arange(len(flat))
        row_of = torch.where(local < len(self.local), row_of, -1)
        return Permutation(offsets, row_of.view(ids.shape), weights)

    def expand(self, a: Tensor, plan: Permutation) -> None:
        """Copy every token to its permuted rows."""
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            rows = plan.row_of[:, k, None]
            x = self.step["x"]
            values = load(x, torch.arange(self.shape.tokens)[:, None] * x.stride(0) + columns * x.stride(1))
            store(a, rows * a.stride(0) + columns, values, (rows >= 0).expand(-1, len(columns)))

    def gemm(self, gemm: Gemm, plan: Permutation) -> None:
        """Each expert's rows in blocks, every column tile."""
        for expert in range(len(self.local)):
            for block in range(self.grid_m(plan, expert)):
                for tile in range(self.grid_n(gemm.weights.rows)):
                    self.program(gemm, plan, (expert, block), tile)

    def grid_m(self, plan: Permutation, expert: int) -> int:
        """Row blocks of one expert."""
        return -(-int(plan.offsets[expert + 1] - plan.offsets[expert]) // self.BLOCK_M)

    def program(self, gemm: Gemm, plan: Permutation, place: tuple[int, int], tile: int) -> None:
        """One tile of one expert's rows."""
        expert, block = place
        rows = plan.offsets[expert] + block * self.BLOCK_M + torch.arange(self.BLOCK_M)
        mask = rows < plan.offsets[expert + 1]
        self.write(gemm, self.multiply(gemm, expert, rows, mask, tile), rows, mask, tile)

    def activation_kernel(self, pre: Tensor, middle: Tensor, plan: Permutation) -> None:
        """act(gate) * up in fp32 of the rows in use."""
        used = int(plan.offsets[-1])
        middle[:used] = self.activate(pre[:used].float()).to(middle.dtype)

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """Sum each token's rows with their routing weights in fp32; slots of other ranks add nothing."""
        total = torch.zeros(self.shape.tokens, self.shape.hidden)
        columns = torch.arange(self.shape.hidden)
        for k in range(self.shape.top_k):
            source = plan.row_of[:, k, None]
            mask = (source >= 0).expand(-1, len(columns))
            row = load(rows, source * rows.stride(0) + columns, mask).float()
            total = total + row * plan.weights[:, k, None]
        out.copy_(total)

    def tactics(self) -> dict[str, Callable[[], Tensor]]:
        """Two tile shapes."""
        return {"64x64": self, "32x32": self._narrow}

    def _narrow(self) -> Tensor:
        self.BLOCK_N, self.BLOCK_K = 32, 32  # type: ignore[misc]
        try:
            return self()
        finally:
            del self.BLOCK_N, self.BLOCK_K
