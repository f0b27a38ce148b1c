"""FlashInfer's ActivationType, release 0.7.2.post1."""

from __future__ import annotations

from harness.twins.libs._flashinfer_layer import ActivationType

ENTRIES = {"flashinfer.fused_moe.ActivationType": ActivationType}
