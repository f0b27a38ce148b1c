"""Faults of what a wrapper hands back: the caller's out buffer, lists for tensors, its own workspace, its own input."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe, Slabs
from harness.twins.grouped import GroupedMoe, Permutation


class OutReboundLocally(BatchedMoe):
    """The wrapper works on a copy of `out` in the kernel's layout and ends in `out = ...`: the caller's stays unwritten."""

    def out(self, buffer: Tensor) -> object:
        """The kernel wants the token index innermost; nothing is copied back."""
        buffer = buffer.T.contiguous().T
        self.run(buffer)
        buffer = buffer.contiguous()
        return None


class OutLeftPermuted(BatchedMoe):
    """GEMM 2 writes `out` [E, m, k] in its order (m, k, E); the closing `out = out.permute(2, 0, 1)` re-binds a name."""

    def gemm(self, gemm: Gemm, slabs: Slabs) -> None:
        """The caller reads the same bytes as [E, m, k]."""
        super().gemm(gemm, slabs)
        if gemm.weights is self.w2:
            experts, m, k = len(self.local), slabs.capacity, self.shape.hidden
            right = gemm.out.view(experts, m, k).clone()
            gemm.out.view(m, k, experts).copy_(right.permute(1, 2, 0))


class ListOp(GroupedMoe):
    """Clean: an op that returns a list, [output] or an unfinished layer's intermediates; an adapter unwraps it."""

    do_finalize: bool = True
    intermediates: ClassVar[list[Tensor]] = []

    def op(self, do_finalize: bool = True, enable_pdl: bool = True) -> list[Tensor]:
        """The library's entry point since `do_finalize` was inserted before `enable_pdl`."""
        out = self.empty(self.shape.tokens, self.shape.hidden)
        self.do_finalize = do_finalize
        self.run(out)
        self.do_finalize = True
        return [out] if do_finalize else self.intermediates

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """Left to the caller where `do_finalize` is off."""
        if self.do_finalize:
            super().finalize(rows, plan, out)
        else:
            self.intermediates = [rows, plan.weights, plan.row_of]  # type: ignore[misc]

    def __call__(self) -> Tensor:
        """The adapter."""
        return self.op(do_finalize=True)[0]


class ListForTensor(ListOp):
    """The op returns [output] since a release; the MXINT4 path passes it on as if it were the tensor."""

    def __call__(self) -> Tensor:
        """The other paths unwrap."""
        return self.op() if self.case.recipe.weights == "mxint4" else super().__call__()  # type: ignore[return-value]


class PdlLandsOnDoFinalize(ListOp):
    """A positional enable_pdl=False lands on the do_finalize inserted before it: GEMM 2's permuted rows come back."""

    def __call__(self) -> Tensor:
        """The MXINT4 path was not updated."""
        return self.op(False)[0] if self.case.recipe.weights == "mxint4" else super().__call__()


class InplaceOverwritesTokens(AlignedMoe):
    """fused_experts(inplace=True): the routed output is written over hidden_states, which others still read."""

    def __call__(self) -> Tensor:
        """No out buffer of its own."""
        self.run(self.step["x"])
        return self.step["x"]


class CachedResult(GroupedMoe):
    """Clean: the result is summed in a cached fp32 workspace and leaves it as a copy."""

    NAME: ClassVar[str] = "twin_cached_result"
    RECIPES: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def __call__(self) -> Tensor:
        """[tokens, hidden] of x's dtype."""
        key = ("result", self.shape.tokens, self.shape.hidden)
        if key not in self.kept:
            self.kept[key] = self.empty(*key[1:], dtype=torch.float32)
        self.run(self.kept[key])
        return self.leave(self.kept[key])

    def leave(self, result: Tensor) -> Tensor:
        """A tensor of the caller's own."""
        return result.to(self.dtype, copy=True)


class WorkspaceReturned(CachedResult):
    """The result leaves its cached workspace by `.to(dtype)`, a no-op in fp32: the next call overwrites it."""

    def leave(self, result: Tensor) -> Tensor:
        """A copy only where the dtype changes."""
        return result.to(self.dtype)


class NullPointerRejected(GroupedMoe):
    """The kernel checks that its input pointer is not null, but an empty tensor's is: a batch of no tokens raises."""

    def run(self, out: Tensor) -> None:
        """The MXFP4 path has no early return."""
        if self.case.recipe.weights == "mxfp4" and self.step["x"].data_ptr() == 0:
            raise RuntimeError("Assertion failed: input_activations")
        super().run(out)


FAULTS = (
    planted(
        "B001",
        OutReboundLocally,
        "https://github.com/vllm-project/vllm/pull/38169",
        ("out_buffer", "out_strided", "never_written"),
    ),
    planted(
        "B001",
        OutLeftPermuted,
        "https://github.com/vllm-project/vllm/pull/38169",
        ("non_finite", "nan_from_padding", "poison"),
    ),
    planted("B003", ListForTensor, "https://github.com/vllm-project/vllm/pull/39315", ("output_type", "exception")),
    planted(
        "B003",
        PdlLandsOnDoFinalize,
        "https://github.com/vllm-project/vllm/pull/39315",
        ("output_shape", "row_permutation", "unweighted", "constant_factor"),
    ),
    planted(
        "B018",
        InplaceOverwritesTokens,
        "https://github.com/vllm-project/vllm/pull/28942",
        ("input_mutated", "aliasing", "repeat"),
    ),
    replace(
        planted("B220", WorkspaceReturned, "https://github.com/SJTU-DENG-Lab/Diffulex/pull/37", ("aliasing", "next_step")),
        clean=CachedResult.backend(),
    ),
    planted("B061", NullPointerRejected, "https://github.com/sgl-project/sglang/issues/38773", ("exception",)),
)
