"""The enums that FlashInfer 0.7.2.post1 takes (flashinfer/tllm_enums.py). Their values move between releases: a backend asks
for a member by its name."""

from __future__ import annotations

from enum import IntEnum


class ActivationType(IntEnum):
    """What stands between the GEMMs."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11
    ClampedRelu2 = 12

    @property
    def is_gated(self) -> bool:
        """Has it a gate half?"""
        return self.name in ("Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ")


class RoutingMethodType(IntEnum):
    """How the routing kernels of trtllm-gen turn logits into experts and weights."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10


class WeightLayout(IntEnum):
    """How a weight matrix lies in memory."""

    MajorK = 0
    MajorMn = 1
    BlockMajorK = 2


class Fp8QuantizationType(IntEnum):
    """What the scales of FP8 tensors mean."""

    NoneFp8 = 0
    DeepSeekFp8 = 1
    MxFp8 = 2
    PerTensorFp8 = 3
    PerChannelFp8 = 4


class SfLayout(IntEnum):
    """How block scales lie in memory."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


ENUMS = {e.__name__: e for e in (ActivationType, RoutingMethodType, WeightLayout, Fp8QuantizationType, SfLayout)}
ENTRIES = {f"flashinfer.tllm_enums.{name}": enum for name, enum in ENUMS.items()}
ENTRIES["flashinfer.fused_moe.ActivationType"] = ActivationType  # the name it is exported by
