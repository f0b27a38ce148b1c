"""Triton's interpreter multiplies the bit patterns of bf16 operands in tl.dot. Exit 1 when it does, 0 when it is right."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton
import triton.language as tl

SIZE = 16


@triton.jit
def dot(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    """C = A @ B, one tile."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def main() -> int:
    """Matrices of ones: each element of the product is 16. The bits of a bf16 one are 0x3F80 = 16256."""
    defect = False
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one = torch.ones(SIZE, SIZE, dtype=dtype)
        got = torch.full((SIZE, SIZE), torch.nan)
        dot[(1,)](one, one, got, SIZE=SIZE)
        value = got[0, 0].item()
        bits = SIZE * int(one.view(torch.int16)[0, 0]) ** 2 if dtype == torch.bfloat16 else None
        note = f" = {SIZE} * 16256**2, the product of the bit patterns" if value == bits else ""
        print(f"triton {triton.__version__} {dtype}: expected {SIZE}.0, got {value}{note}")
        defect |= not bool((got == SIZE).all())
    return int(defect)


if __name__ == "__main__":
    sys.exit(main())
