"""FlashInfer's fp4_quantize writes nothing on SM90 and says so to nobody (0.6.11.post2 and 0.7.2.post1, NVIDIA H200).

The kernels' bodies stand inside `#if __CUDA_ARCH__ >= 1000` (quantization.cuh), yet the SM90 module is built, loaded and
dispatched: the outputs are whatever torch.empty returned. Expected: an exception, or codes and scales that do not depend
on what the memory held before. Needs an SM90 GPU and flashinfer-python. Exit 1: the defect is here, 0: gone, 2: cannot tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

PATTERNS = (0xAB, 0x5C)


def prefilled(byte: int) -> Callable[..., Tensor]:
    """torch.empty whose memory holds `byte` everywhere: legal, since its contents are undefined."""
    empty = torch.empty

    def fill(*args: object, **options: object) -> Tensor:
        out = empty(*args, **options)  # type: ignore[call-overload]
        if out.numel():
            out.view(torch.uint8).fill_(byte)
        return out

    return fill


def leftovers(quantize: Callable[[], tuple[Tensor, ...]]) -> list[float]:
    """Share of the output bytes that still hold what torch.empty returned, per pattern."""
    shares = []
    for byte in PATTERNS:
        with mock.patch.object(torch, "empty", prefilled(byte)):
            outputs = quantize()
        torch.cuda.synchronize()
        held = torch.cat([o.reshape(-1).view(torch.uint8) for o in outputs[:2]])
        shares.append((held == byte).float().mean().item())
    return shares


def main() -> int:
    """Print one JSON line per quantiser."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("needs an SM90 GPU")
        return 2
    import flashinfer

    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    scale = (448 * 6 / x.float().abs().max()).reshape(1)
    facts = {"flashinfer": flashinfer.__version__, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    swizzled = flashinfer.block_scale_interleave(torch.arange(256 * 64, device="cuda").to(torch.uint8).view(256, 64))
    works = sorted(swizzled.flatten().tolist()) == sorted(torch.arange(256 * 64).to(torch.uint8).tolist())
    print(json.dumps({**facts, "control": "block_scale_interleave of the same module permutes its input", "ok": works}))
    shares = []
    for swizzle in (False, True):
        shares += leftovers(lambda swizzle=swizzle: flashinfer.fp4_quantize(x, scale, is_sf_swizzled_layout=swizzle))  # type: ignore[misc]
        call = f"fp4_quantize([256, 1024] bf16, is_sf_swizzled_layout={swizzle})"
        print(json.dumps({**facts, "call": call, "expected_left_over": "under 0.05", "left_over": shares[-2:]}))
    return 1 if max(shares) > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
