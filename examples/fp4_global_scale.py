"""Does fp4_quantize take one global scale per expert? For `moecheck bisect --command`: exit 0 it does, 1 it refuses, 125 other.

    moecheck bisect flashinfer-python --good 0.6.8.post1 --bad 0.6.11.post2 --axis wheelhouse --wheelhouse DIR \\
        --command 'python examples/fp4_global_scale.py'

vllm#41711: `globalScale should have shape [1] or [num_tokens]`. Needs a GPU and FlashInfer's fp4_quantization module.
"""

from __future__ import annotations

import sys

import torch

EXPERTS, TOKENS, HIDDEN = 8, 256, 512


def main() -> int:
    """One call."""
    try:
        import flashinfer

        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        flashinfer.fp4_quantize(x, torch.ones(EXPERTS, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return 1 if "globalScale" in str(error) else 125
    print(f"flashinfer {flashinfer.__version__}: {EXPERTS} global scales for {TOKENS} tokens are taken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
