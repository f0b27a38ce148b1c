"""Twins: what a fused-MoE library does, in torch on any machine, from the physical buffers and by address.

`TWINS` are the clean ones. Each is a class of small steps; a planted fault (harness/faults/) overrides the one step that the
historical bug was in. A twin is a backend like any other, and no oracle: it shares no routing, GEMM or activation with one.
"""

from __future__ import annotations

from harness.twins.aligned import AlignedMoe
from harness.twins.base import Twin
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe
from harness.twins.ranks import RankedMoe

TWINS: tuple[type[Twin], ...] = (AlignedMoe, BatchedMoe, GroupedMoe, RankedMoe)
