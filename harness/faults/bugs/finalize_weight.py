"""Faults of finalize: routing weights and the routed scaling factor, applied twice, not at all, or another slot's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.faults.fault import planted
from harness.twins.aligned import AlignedMoe, Blocks
from harness.twins.base import Gemm
from harness.twins.grouped import GroupedMoe, Permutation
from harness.twins.router import ROUTERS
from reference.rounding import Rounding

NARROW = ("nvfp4", "mxfp4", "fp8_channel", "int4_g32")  # weights of the CUTLASS FP4, MXFP4, FP8 and W4A8 experts


class WeightedEarly(AlignedMoe):
    """Clean: with top-1 routing the weight is applied to the input of GEMM 2 (apply_router_weight_on_input of a gated MLP)."""

    def activation_kernel(self, pre: Tensor, middle: Tensor) -> None:
        """act(gate) * up * weight."""
        values = self.activate(pre.float())
        if self.shape.top_k == 1:
            values = values * self.step["topk_weights"].view(-1, 1)
        middle.copy_(values)

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """The epilogue has no weight left to apply."""
        super().gemm(replace(gemm, weighted=gemm.weighted and not self.weighted_before()), blocks)

    def weighted_before(self) -> bool:
        """What the experts are told about the step before them."""
        return self.shape.top_k == 1


class WeightedTwice(WeightedEarly):
    """FP8 and FP4 experts do not ask apply_router_weight_on_input: top-1 weights count before and after GEMM 2."""

    def weighted_before(self) -> bool:
        """Only the unquantised path asks."""
        return super().weighted_before() and self.case.recipe.weights not in NARROW


class ScaledTwice(GroupedMoe):
    """routed_scaling_factor is in the top-k weights already, and the layer multiplies its output by it again."""

    def finalize(self, rows: Tensor, plan: Permutation, out: Tensor) -> None:
        """apply_routed_scaling_factor_to_output is not asked."""
        scale = ROUTERS[self.case.routing]().scale
        super().finalize(rows, replace(plan, weights=plan.weights * scale), out)


class FirstSlotsWeight(AlignedMoe):
    """Every slot of a token is multiplied by the weight of its first one: right with top_k 1 only."""

    def topk(self) -> tuple[Tensor, Tensor]:
        """weights[token], not weights[token, slot]."""
        ids, weights = super().topk()
        return ids, weights[:, :1].expand_as(weights).contiguous()


class DeferredFinalize(AlignedMoe):
    """Clean: the runner returns unweighted rows and the weights of every slot (do_finalize=False), and the caller sums."""

    def run(self, out: Tensor) -> None:
        """The runner, then the caller's sum."""
        self.returned = self.weights_of_slots()
        super().run(out)

    def gemm(self, gemm: Gemm, blocks: Blocks) -> None:
        """No weights in an epilogue."""
        super().gemm(replace(gemm, weighted=False), blocks)

    def weights_of_slots(self) -> Tensor:
        """float32 [tokens, top_k], the second tensor that the runner returns."""
        return self.step["topk_weights"]

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Weighted sum in fp32."""
        slots = rows.view(*self.returned.shape, self.shape.hidden).float()
        out.copy_((slots * self.returned.unsqueeze(-1)).sum(1))

    @classmethod
    def rounding(cls, case: Case) -> Rounding:
        """Rows are stored before they are weighted."""
        name = case.recipe.out
        return Rounding(gate_up=name, middle=name, row=name, out=name)


ANY_WEIGHT = ("constant_factor", "wrong_weights")  # what memory held may be a finite number


class HostWeightsNotReturned(DeferredFinalize):
    """do_finalize=False returns the buffer that in-kernel routing fills: with weights from the host nobody writes it."""

    def weights_of_slots(self) -> Tensor:
        """Allocated for the router."""
        return self.empty(*self.step["topk_weights"].shape, dtype=torch.float32)


class DirectTopOne(AlignedMoe):
    """Clean: with top_k 1 GEMM 2 writes straight to the output and nothing is left to sum."""

    def run(self, out: Tensor) -> None:
        """Remember the output for GEMM 2."""
        self.direct = out
        super().run(out)

    def workspace(self, name: str, rows: int, columns: int) -> Tensor:
        """The rows of GEMM 2 are the output's."""
        return self.direct if name == "rows" and self.shape.top_k == 1 else super().workspace(name, rows, columns)

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Only if there is something to sum."""
        if rows is not out:
            super().combine(rows, out)


class ReducesUnwrittenRows(DirectTopOne):
    """With top_k 1 GEMM 2 writes the output; a routed scaling factor not 1 then reduces rows nobody wrote into it."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """The second condition does not know of the first."""
        if rows is out and ROUTERS[self.case.routing]().scale != 1:
            rows = AlignedMoe.workspace(self, "rows", *out.shape)
        super().combine(rows, out)


VLLM = "https://github.com/vllm-project/vllm/pull"
FAULTS = (
    planted("B026", WeightedTwice, f"{VLLM}/43694", ("unweighted", "constant_factor")),
    planted("B038", ScaledTwice, f"{VLLM}/45037", ("constant_factor",)),
    planted(
        "B066",
        ReducesUnwrittenRows,
        "https://github.com/sgl-project/sglang/pull/40187",
        ("non_finite", "never_written", "poison", "zeros", "stale", "out_buffer", "out_strided"),
    ),
    planted(
        "B135",
        HostWeightsNotReturned,
        "https://github.com/NVIDIA/TensorRT-LLM/pull/17088",
        ("non_finite", "nan_from_padding", "never_written", "poison", "zeros", "unweighted", *ANY_WEIGHT),
    ),
    planted(
        "B232",
        FirstSlotsWeight,
        "https://github.com/vllm-project/vllm-xpu-kernels/pull/66",
        ("unweighted", "zero_weight", "duplicate_expert", "constant_factor"),  # a shared slot's: its expert's factor
    ),
)
