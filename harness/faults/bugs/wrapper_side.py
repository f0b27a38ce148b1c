"""Faults of what runs beside the routed experts: a LoRA branch, a shared expert evaluated afterwards."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.twins.aligned import NOWHERE, AlignedMoe
from harness.twins.base import Gemm


class LoraBranch(AlignedMoe):
    """Clean: in batches with an adapter, the last columns of hidden reach GEMM 1 through a side branch of its own.

    A batch has an adapter if the first id of its first token is even: its request's id, as far as this twin has requests.
    """

    ADAPTED: ClassVar[int] = 32  # columns
    SCALE: ClassVar[float] = 128.0  # static scale of the FP8 activations: a power of two loses nothing here

    def run(self, out: Tensor) -> None:
        """The adapters of the batch first."""
        self.refresh()
        super().run(out)

    def batch_has_adapter(self) -> bool:
        """Of this call."""
        return bool((self.step["ids"][:1, :1] % 2 == 0).any())

    def refresh(self) -> None:
        """The LoRA kernels' own record of who has an adapter."""
        self.adapter = self.batch_has_adapter()

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """What reaches the adapted columns: the base layer's share and the branch's."""
        a = super().load_a(gemm, rows, mask, k)
        if gemm.weights is not self.w13:
            return a
        base, side = int(not self.batch_has_adapter()), int(self.adapter)
        return torch.where(k < gemm.weights.columns - self.ADAPTED, a, a * base + self.side_input(a) * side)

    def side_input(self, a: Tensor) -> Tensor:
        """The branch reads the tokens as they are."""
        return a


class BranchGetsUnscaledFp8(LoraBranch):
    """The LoRA branch reads activations already scaled for FP8, without their scale: its delta is 128 times too small."""

    def side_input(self, a: Tensor) -> Tensor:
        """Only FP8 layers scale."""
        return a / self.SCALE if self.case.recipe.weights == "fp8_channel" else a


class StaleAdapterIds(LoraBranch):
    """LoRA token ids are refreshed only by batches with an adapter: a base batch behind one gets its delta on top."""

    adapter = False

    def refresh(self) -> None:
        """A base batch leaves them as they were."""
        self.adapter = self.adapter or self.batch_has_adapter()


class SharedAfterRouted(AlignedMoe):
    """Clean: the last slot is a shared expert's, evaluated after the routed ones from the same hidden_states."""

    def run(self, out: Tensor) -> None:
        """Both passes read a private hidden_states; their fp32 sum leaves."""
        step, last = self.step, max(1, self.shape.top_k - 1)
        self.step = {**step, "x": step["x"].clone()}
        try:
            routed = self.routed(range(last))
            shared = self.slots(range(last, self.shape.top_k))
        finally:
            self.step = step
        out.copy_(routed + shared)

    def routed(self, columns: range) -> Tensor:
        """float32 [tokens, hidden] of the routed slots."""
        return self.slots(columns)

    def slots(self, columns: range) -> Tensor:
        """float32 [tokens, hidden] of some of the top-k slots."""
        self.columns = columns
        result = torch.empty(self.shape.tokens, self.shape.hidden)
        super().run(result)
        return result

    def topk(self) -> tuple[Tensor, Tensor]:
        """The other pass's slots are nobody's."""
        ids, weights = super().topk()
        column = torch.arange(self.shape.top_k)
        return torch.where((column >= self.columns.start) & (column < self.columns.stop), ids, NOWHERE), weights


class SharedReadsRoutedOutput(SharedAfterRouted):
    """bf16 routed experts write their output over hidden_states, which the shared expert reads afterwards: S(R(x))."""

    def routed(self, columns: range) -> Tensor:
        """In place; the other types have a buffer of their own."""
        result = super().routed(columns)
        if self.case.recipe.weights == "bf16":
            self.step["x"].copy_(result)
        return result


FAULTS = (
    planted(
        "B029",
        BranchGetsUnscaledFp8,
        "https://github.com/vllm-project/vllm/pull/42120",
        ("dropped_k_tail", "unexplained"),
    ),
    planted("B029", StaleAdapterIds, "https://github.com/vllm-project/vllm/pull/42120", ("next_step", "graph")),
    planted("B223", SharedReadsRoutedOutput, "https://github.com/FlashML-org/FreeToken/pull/463", ("unexplained",)),
)
