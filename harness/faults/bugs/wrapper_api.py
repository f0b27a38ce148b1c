"""Faults of what a wrapper passes in or asks for: id types, result classes, features, alignments, builds."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from harness.backends.base import Backend
from harness.case import Case, Limit
from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import NOWHERE, AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe
from harness.twins.memory import IllegalAddress, load
from harness.twins.weights import Stack


class JitBuilt(BatchedMoe):
    """Clean: the NVFP4 kernels are compiled at the first call, against the headers of the image."""

    NEEDS: ClassVar[tuple[str, ...]] = ("cuda_fp4.h", "cublasLt.h")
    IMAGE: ClassVar[tuple[str, ...]] = ("cuda_fp4.h", "cublasLt.h")

    def run(self, out: Tensor) -> None:
        """Build, then run."""
        missing = [header for header in self.NEEDS if header not in self.IMAGE]
        if self.case.recipe.weights == "nvfp4" and missing:
            raise RuntimeError(f"Ninja build failed: fatal error: {missing[0]}: No such file or directory")
        super().run(out)


class JitHeaderMissing(JitBuilt):
    """The image lacks cublasLt.h, which only the just-in-time build of the NVFP4 kernels includes: it raises."""

    IMAGE: ClassVar[tuple[str, ...]] = ("cuda_fp4.h",)


class WarpIllegalAddressAborts(BatchedMoe):
    """The masked NVFP4 GEMM loads whole row tiles of a slab: behind the last one is nothing, and the process aborts."""

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """CUDA reports it at the next synchronisation, in code that is not to blame; the C++ runtime then aborts."""
        if self.case.recipe.weights != "nvfp4":
            return super().load_a(gemm, rows, mask, k)
        try:
            return super().load_a(gemm, rows, torch.ones_like(mask), k)
        except IllegalAddress:
            os.abort()


class SentinelCastToUnsigned(AlignedMoe):
    """Ids are cast to uint32: the sentinel -1 of another rank's expert is 4294967295, not below 0, and an index."""

    def topk(self) -> tuple[Tensor, Tensor]:
        """int64 holds what uint32 would."""
        ids, weights = super().topk()
        return ids % (1 << 32), weights

    def histogram(self, flat: Tensor) -> Tensor:
        """Counters of the local experts and of the sentinel, by address."""
        load(torch.zeros(len(self.local) + 1), torch.where(flat < 0, len(self.local), flat))
        return super().histogram(flat)


@dataclass
class TopkOutput:
    """ids and weights [tokens, top_k]."""

    topk_ids: Tensor
    topk_weights: Tensor


@dataclass
class NormalOutput:
    """What the normal dispatcher returns."""

    topk_output: TopkOutput


@dataclass
class LowLatencyOutput(TopkOutput):
    """What the low-latency dispatcher returns."""

    expected_m: int


class TwoDispatchers(BatchedMoe):
    """Clean: a decode batch goes through the low-latency dispatcher, whose output is of another class."""

    DECODE: ClassVar[int] = 8  # tokens up to which a batch is a decode step

    def expert_map(self, ids: Tensor) -> Tensor:
        """The runner takes the ids from what the dispatcher returned."""
        topk = TopkOutput(ids, self.step["topk_weights"])
        low = self.shape.tokens <= self.DECODE
        sent = LowLatencyOutput(**vars(topk), expected_m=self.capacity()) if low else NormalOutput(topk)
        return super().expert_map(self.ids_of(sent))

    def ids_of(self, sent: NormalOutput | LowLatencyOutput) -> Tensor:
        """int64 [tokens, top_k]."""
        return sent.topk_ids if isinstance(sent, LowLatencyOutput) else sent.topk_output.topk_ids


class RunnerReadsOneOutputClass(TwoDispatchers):
    """The runner reads dispatch_output.topk_output, which the low-latency dispatcher's output does not have."""

    def ids_of(self, sent: NormalOutput | LowLatencyOutput) -> Tensor:
        """Right for the normal dispatcher."""
        return sent.topk_output.topk_ids  # type: ignore[union-attr]


class AutoSelected(AlignedMoe):
    """Clean: top-1 layers whose weight is 1 want the router weight on the input, which one of two kernels can do."""

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """On the input is behind GEMM 1's sum: it is linear."""
        on_input = self.shape.top_k == 1 and self.case.routing in ("renormalize", "minimax2")
        if self.select(on_input) == "flashinfer_cutlass":
            assert not on_input, "apply_router_weight_on_input is not supported for Flashinfer"
        super().gemm(replace(gemm, weighted=not gemm.weighted) if on_input else gemm, blocks)

    def select(self, on_input: bool) -> str:
        """The kernel for a layer."""
        return "triton" if on_input else "flashinfer_cutlass"


class SelectorIgnoresFeature(AutoSelected):
    """Auto-selection does not ask whether the kernel can apply the router weight on the input; the kernel asserts."""

    def select(self, on_input: bool) -> str:
        """The fastest one."""
        return "flashinfer_cutlass"


class PackedIds(GroupedMoe):
    """Clean: a fused router gives int32 ids, the native top-k of the other rules int64; the packer converts both."""

    def route(self) -> tuple[Tensor, Tensor]:
        """Ids as the kernel unpacks them."""
        ids, weights = super().route()
        fused = self.case.routing in ("renormalize", "deepseek_v3")
        return self.pack_ids(ids.int() if fused else ids).long() >> 16, weights

    def pack_ids(self, ids: Tensor) -> Tensor:
        """int32 [tokens, top_k]: the id in the upper half; the lower one, for a bf16 weight, stays empty."""
        return (ids << 16).int()


class PackerAssertsInt32(PackedIds):
    """The packer of ids asserts int32, though its kernel would convert: the int64 ids of a native top-k are refused."""

    def pack_ids(self, ids: Tensor) -> Tensor:
        """Right for the fused router."""
        assert ids.dtype == torch.int32, "topk_ids must be int32"
        return super().pack_ids(ids)


class Placed(AlignedMoe):
    """Clean: layers of 16 experts or more are placed in another order, and ids go through a logical-to-physical map."""

    MAP_DTYPE: ClassVar[torch.dtype | None] = torch.int32

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """The physical order is the reverse of the logical one."""
        first, second = super().pack(inputs)
        return (self.reverse(first), self.reverse(second)) if self.shape.experts >= 16 else (first, second)

    def reverse(self, stack: Stack) -> Stack:
        """The experts back to front."""
        scales = None if stack.scales is None else stack.scales.flip(0)
        return replace(stack, codes=stack.codes.flip(0), scales=scales, factors=stack.factors.flip(0))

    def expert_map(self, ids: Tensor) -> Tensor:
        """Physical ids of int32."""
        local = super().expert_map(ids).int()
        if self.shape.experts < 16:
            return local
        count = len(self.local)
        physical = torch.tensor([*range(count)][::-1], dtype=self.MAP_DTYPE)
        return torch.where(local < 0, torch.tensor(NOWHERE, dtype=self.MAP_DTYPE), physical[local])

    def align(self, ids: Tensor) -> Blocks:
        """The kernel takes int32 only."""
        if ids.dtype != torch.int32:
            raise RuntimeError("Mismatched type on argument topk_ids: expected int32, got int64")
        return super().align(ids)


class PlacementMapInt64(Placed):
    """The logical-to-physical map is a torch.tensor without a dtype: remapped ids are int64, the kernel takes int32."""

    MAP_DTYPE: ClassVar[torch.dtype | None] = None


class AlignmentDeclared(GroupedMoe):
    """Clean: the kernels assert the alignment of a rank's inter, and the backend declines what they would refuse."""

    ALIGNMENT: ClassVar[dict[str, int]] = {"nvfp4": 64, "bf16": 128, "fp16": 128, "fp8_tensor": 128}
    UNDECLARED: ClassVar[tuple[str, ...]] = ()

    def run(self, out: Tensor) -> None:
        """Assert, as a launcher does."""
        assert not self.unaligned(self.case), f"intermediate_size {self.shape.inter}: {self.unaligned(self.case)}"
        super().run(out)

    @classmethod
    def unaligned(cls, case: Case) -> str | None:
        """What the kernel has against inter."""
        alignment = cls.ALIGNMENT.get(case.recipe.weights, 1)
        return f"must be a multiple of {alignment}" if case.shape.inter % alignment else None

    @classmethod
    def declared(cls, case: Case) -> str | None:
        """What the backend says of it in advance."""
        return None if case.recipe.weights in cls.UNDECLARED else cls.unaligned(case)

    @classmethod
    def backend(cls, name: str = "") -> Backend:
        """With the limit."""
        backend = super().backend(name)
        return replace(backend, limits=(*backend.limits, Limit(("recipe", "inter"), cls.declared)))


class ShardedInterUnaligned(AlignmentDeclared):
    """A tensor-parallel shard of inter misses the kernel's alignment and nobody asked: the launcher asserts."""

    UNDECLARED: ClassVar[tuple[str, ...]] = ("bf16", "fp16", "fp8_tensor")


class ShardedNvfp4InterUnaligned(AlignmentDeclared):
    """An NVFP4 shard of inter holds whole scale blocks but not whole tiles of the kernel, which asserts it."""

    UNDECLARED: ClassVar[tuple[str, ...]] = ("nvfp4",)


FAULTS = (
    planted("B002", JitHeaderMissing, "https://github.com/vllm-project/vllm/pull/39139", ("exception",)),
    planted("B002", WarpIllegalAddressAborts, "https://github.com/vllm-project/vllm/pull/39139", ("death", "crashed")),
    planted("B043", SentinelCastToUnsigned, "https://github.com/vllm-project/vllm/pull/20166", ("exception",)),
    planted("B062", RunnerReadsOneOutputClass, "https://github.com/sgl-project/sglang/issues/29849", ("exception",)),
    planted("B067", SelectorIgnoresFeature, "https://github.com/sgl-project/sglang/issues/34192", ("exception",)),
    planted("B073", PackerAssertsInt32, "https://github.com/sgl-project/sglang/pull/32882", ("exception",)),
    planted("B074", PlacementMapInt64, "https://github.com/sgl-project/sglang/pull/25380", ("exception",)),
    planted("B088", ShardedInterUnaligned, "https://github.com/sgl-project/sglang/pull/16824", ("exception",)),
    planted("B095", ShardedNvfp4InterUnaligned, "https://github.com/flashinfer-ai/flashinfer/issues/3206", ("exception",)),
)
