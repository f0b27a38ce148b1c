"""Faults of what the routing kernel reads and writes: types, strides, the flag for renormalisation, weights read too early."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.faults.bugs.routing_select import MISROUTED, OwnRouter
from harness.faults.fault import planted
from harness.twins.grouped import GroupedMoe
from harness.twins.memory import load, store
from harness.twins.router import ROUTERS, Router

LATE = 1 / 8  # share of tokens whose sum is taken before the weights have arrived


class IdsWrittenAsInt32(GroupedMoe):
    """The router writes 32-bit ids into the caller's int64 buffer: two ids make one, half of it stays unwritten."""

    def route(self) -> tuple[Tensor, Tensor]:
        """The stream of int32 fills the first half."""
        ids, weights = super().route()
        buffer = torch.empty_like(ids)
        store(buffer.view(torch.int32), torch.arange(ids.numel()), ids.flatten())
        return buffer, weights


class BiasReadAsBf16(GroupedMoe):
    """The fp32 correction bias is read as bf16, the output's type: expert e gets half of the bytes of bias e // 2."""

    def route(self) -> tuple[Tensor, Tensor]:
        """The first `experts` halves."""
        if (bias := self.step.get("bias")) is None:
            return super().route()
        halves = load(bias.view(torch.bfloat16), torch.arange(self.shape.experts))
        return ROUTERS[self.case.routing]()(self.step["logits"], halves, self.shape.top_k)


class BiasBufferCastToBf16(GroupedMoe):
    """The fp32 bias is cast to bf16 with the rest of the model: small differences between experts vanish."""

    def route(self) -> tuple[Tensor, Tensor]:
        """Rounded before it is added."""
        if (bias := self.step.get("bias")) is None:
            return super().route()
        return ROUTERS[self.case.routing]()(self.step["logits"], bias.bfloat16(), self.shape.top_k)


class LogitsStrideIgnored(GroupedMoe):
    """Logits are read at token * experts + expert, whatever the row stride of the tensor is."""

    def route(self) -> tuple[Tensor, Tensor]:
        """By address."""
        tokens, experts = self.shape.tokens, self.shape.experts
        at = torch.arange(tokens)[:, None] * experts + torch.arange(experts)
        logits = load(self.step["logits"], at) if tokens else self.step["logits"]
        return ROUTERS[self.case.routing]()(logits, self.step.get("bias"), self.shape.top_k)


class AlwaysRenormalized(OwnRouter):
    """norm_topk_prob never reaches the kernel, which renormalises the weights of every rule."""

    def router(self) -> Router:
        """True whatever the rule says."""
        return replace(super().router(), renormalize=True)


class DefaultRoutingMissing(OwnRouter):
    """The launcher has no branch for the Default method and fails on it."""

    def router(self) -> Router:
        """Softmax over all experts, then top-k."""
        if self.case.routing == "default":
            raise NotImplementedError("unsupported routing method type: Default")
        return super().router()


class _Early(Router):
    """Some tokens' sum is taken of `stale`, what memory holds before the weights are written."""

    def stale(self, chosen: Tensor) -> Tensor:
        raise NotImplementedError

    def weigh(self, chosen: Tensor) -> Tensor:
        if not self.renormalize:
            return super().weigh(chosen)
        early = torch.rand(len(chosen), 1) < LATE
        return chosen / torch.where(early, self.stale(chosen), chosen).sum(-1, keepdim=True) * self.scale


class _EarlyShared(_Early):
    def stale(self, chosen: Tensor) -> Tensor:
        return torch.zeros_like(chosen)


class SumBeforeTheWarpHasWritten(OwnRouter):
    """Without a __syncwarp the summing thread may read the top-k weights before they are written: 0, and w / 0 is inf."""

    ROUTER = _EarlyShared


class _EarlyGlobal(_Early):
    def stale(self, chosen: Tensor) -> Tensor:
        return torch.empty_like(chosen)


class WeightsReloadedFromTheOutput(OwnRouter):
    """The kernel stores raw weights and reloads them to normalise; a load may see what the output buffer held before."""

    ROUTER = _EarlyGlobal


_NORM = "https://github.com/flashinfer-ai/flashinfer/pull/2889"
FAULTS = (
    planted(
        "B042",
        IdsWrittenAsInt32,
        "https://github.com/vllm-project/vllm/pull/55147",
        ("zeros", "missing_slot", "missing_expert", "wrong_expert", "wrong_weights", "poison", "exception"),
    ),
    planted("B054", BiasReadAsBf16, "https://github.com/vllm-project/vllm/pull/25711", MISROUTED),
    planted(
        "B085",
        SumBeforeTheWarpHasWritten,
        "https://github.com/sgl-project/sglang/pull/11183",
        ("non_finite", "repeat"),
    ),
    planted("B112", AlwaysRenormalized, _NORM, ("constant_factor", "unweighted")),
    planted("B112", DefaultRoutingMissing, _NORM, ("exception",)),
    planted("B118", LogitsStrideIgnored, "https://github.com/flashinfer-ai/flashinfer/pull/4713", ("strided_inputs",)),
    planted("B173", BiasBufferCastToBf16, "https://github.com/NVIDIA/Megatron-LM/issues/1482", MISROUTED),
    planted(
        "B217",
        WeightsReloadedFromTheOutput,
        "https://github.com/flagos-ai/FlagGems/issues/5123",
        ("non_finite", "poison", "repeat", "zeros"),
    ),
)
