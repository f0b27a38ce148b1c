"""Triton's interpreter cuts fp32 off to bf16 where a GPU rounds to nearest even. Exit 1 when it does, 0 when it rounds."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, y_ptr, SIZE: tl.constexpr):
    """y = x in the dtype of y."""
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


def main() -> int:
    """Values whose bf16 neighbours are known: 1.00390625 is halfway (to even: 1), 1.01171875 too (to even: 1.015625)."""
    x = torch.tensor([1.00390625, 1.0078124, 1.01171875, 1.9999, -1.9999, 255.9, 0.1, 3.0])
    expected, cut = x.bfloat16(), (x.view(torch.int32) & -65536).view(torch.float32)
    got = torch.empty_like(expected)
    cast[(1,)](x, got, SIZE=x.numel())
    print("triton", triton.__version__)
    for value, want, have, chopped in zip(x, expected.float(), got.float(), cut, strict=True):
        note = "" if have == want else " (the low 16 bits cut off)" if have == chopped else " (neither rounded nor cut off)"
        print(f"{value.item():.8g}: expected {want.item():.8g}, got {have.item():.8g}{note}")
    return int(not torch.equal(got, expected))


if __name__ == "__main__":
    sys.exit(main())
