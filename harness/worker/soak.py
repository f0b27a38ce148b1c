"""The deliberately un-isolated run: one process, every case, and memory that belongs to no call watched between calls.

A call that keeps the address of a freed workspace writes there later, when it is somebody else's. After each case canaries
take over blocks of the sizes that it freed, and must still hold their poison after the cases that follow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch
from torch import Tensor

from harness.backends.base import Device
from harness.case import Case
from harness.memory import HUGE, RED_ZONE
from harness.verdict import Finding, Status, Verdict

BYTES = 16 << 20  # of canaries at a time: read once a case
BLOCKS = 256  # some 25 us each to look at
LARGEST = 4 << 20


class Canaries:
    """Poisoned blocks that outlive the case after which they were taken."""

    def __init__(self, device: Device) -> None:
        self._device, self._held = device.kind, deque[tuple[str, Tensor]]()

    def after(self, case: Case, verdict: Verdict) -> Verdict:
        """The verdict, CORRUPTING if a canary changed while its case ran; then new canaries for this case."""
        checked = [(origin, block, _changed(origin, block)) for origin, block in self._held]
        broken = [finding for _, _, finding in checked if finding is not None]
        self._held = deque((origin, block) for origin, block, finding in checked if finding is None)
        for size in _sizes(case):
            block = torch.full((size,), HUGE, dtype=torch.uint8, device=self._device)
            self._held.append((f"{verdict.subject}:{case.id}", block))
        while len(self._held) > BLOCKS or sum(block.numel() for _, block in self._held) > BYTES:
            self._held.popleft()
        if not broken:
            return verdict
        text = "; ".join(finding.text for finding in broken)
        reason = f"{verdict.reason}; {text}" if verdict.reason else text
        findings = (*verdict.findings, *broken)
        return replace(verdict, status=Status.CORRUPTING, reason=reason, findings=findings)


def _changed(origin: str, block: Tensor) -> Finding | None:
    words = block.view(torch.int64)  # an eighth of the elements
    if bool((words == words[0]).all()) and bool((block[:8] == HUGE).all()):
        return None
    written = int((block != HUGE).sum())
    text = f"{written} bytes of a block that no call owns, freed by {origin} or before it, were written"
    return Finding("canary", text, {"bytes": written, "first": int((block != HUGE).nonzero()[0]), "size": block.numel()})


def _sizes(case: Case) -> list[int]:
    """Bytes of what a case allocates and frees: x and out in both widths, rows, middle, weights; bare and with red zones."""
    s = case.shape
    rows = s.tokens * s.top_k
    elements = {s.tokens * s.hidden, rows * s.hidden, rows * s.inter, s.experts * s.inter * s.hidden, rows}
    bare = {n * width for n in elements for width in (2, 4)}
    padded = {-(-n // 8) * 8 for b in bare for n in (b, b + 2 * RED_ZONE) if n}  # malloc's grain is 16 bytes
    return sorted(n for n in padded if n <= LARGEST)
