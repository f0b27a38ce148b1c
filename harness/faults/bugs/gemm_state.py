"""Grouped GEMMs: what a tactic, a capture or a dispatch to many blocks leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from harness.faults.fault import planted
from harness.twins.base import Gemm
from harness.twins.grouped import GroupedMoe, Permutation


class ProfiledTiles(GroupedMoe):
    """Grouped GEMMs that profile their tile widths at the first call and skip those a descriptor cannot be made for."""

    WIDTHS: ClassVar[tuple[int, ...]] = (64, 128)

    def run(self, out: Tensor) -> None:
        """Profile once."""
        if not hasattr(self, "tuned"):
            self.tuned = [width for width in self.WIDTHS if self.profiled(width)]
        super().run(out)

    def profiled(self, width: int) -> bool:
        """True if the tactic ran: a box must divide the rows of w13."""
        return self.w13.rows % width == 0


class SkippedTacticWasLaunched(ProfiledTiles):
    """A tactic whose MXFP4 descriptor failed is launched and "skipped"; its illegal instruction fails all later kernels."""

    lost: ClassVar[bool] = False

    def profiled(self, width: int) -> bool:
        """The error is caught here and stays on the context."""
        if not super().profiled(width) and self.case.recipe.weights == "mxfp4":
            self.lost = True  # type: ignore[misc]
        return super().profiled(width)

    def gemm(self, gemm: Gemm, plan: Permutation) -> None:
        """The first kernel behind the profiling is told."""
        if self.lost:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        super().gemm(gemm, plan)


class RecordedOffsets(GroupedMoe):
    """Under graph capture the per-expert tensor maps are recorded: a replay uses the offsets that the capture saw."""

    recorded: Tensor | None = None

    def capture(self) -> Callable[[], Tensor]:
        """Eager calls, the capture and a replay of the same routing are right."""
        out = self.empty(self.shape.tokens, self.shape.hidden)
        offsets = self.permute(*self.route()).offsets

        def replay() -> Tensor:
            self.recorded = offsets
            try:
                self.run(out)
            finally:
                self.recorded = None
            return out

        return replay

    def gemm(self, gemm: Gemm, plan: Permutation) -> None:
        """Rows of experts as they were."""
        offsets = plan.offsets if self.recorded is None else self.recorded
        super().gemm(gemm, Permutation(offsets, plan.row_of, plan.weights))


class ClusterNeverCompletes(GroupedMoe):
    """From 33 tokens on FP4 weights take a tactic of two-block clusters, one block of which waits for ever for the other."""

    LARGE = 33  # tokens, historically 2048
    FP4 = ("mxfp4", "nvfp4")

    def run(self, out: Tensor) -> None:
        """The barrier of a cluster whose second block is never scheduled."""
        arrived = 1
        while self.case.recipe.weights in self.FP4 and self.shape.tokens >= self.LARGE and arrived < 2:
            time.sleep(0.01)
        super().run(out)


FAULTS = (
    planted("B107", SkippedTacticWasLaunched, "https://github.com/flashinfer-ai/flashinfer/issues/4049", ("exception",)),
    planted("B151", RecordedOffsets, "https://github.com/deepseek-ai/DeepGEMM/issues/444", ("graph", "exception")),
    planted("B127", ClusterNeverCompletes, "https://github.com/flashinfer-ai/flashinfer/issues/4814", ("death",)),
)
