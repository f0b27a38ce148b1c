"""Casts between float8_e4m3fn and wider floats in Triton's interpreter, all codes. Exit 1 when one is wrong, 0 when none is."""

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


def check(label: str, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Cast x to the dtype of `expected`, print the first difference; True if there is one."""
    got = torch.empty_like(expected)
    cast[(1,)](x, got, SIZE=x.numel())
    want, have = expected.float(), got.float()
    bad = ((want != have) & ~(want.isnan() & have.isnan())).nonzero().flatten()
    print(f"{label}: {len(bad)} of {x.numel()} wrong")
    for i in bad[:3]:
        print(f"    {x[i].item():.8g}: expected {want[i].item():.8g}, got {have[i].item():.8g}")
    return bool(len(bad))


def main() -> int:
    """Every code up, every exact value back, and values between the codes (16 has spacing 2 above it, 0.75 spacing 1/16)."""
    print("triton", triton.__version__)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    between = torch.tensor([17.5, -17.5, 0.79, 1.99, 200.0, 447.0, 0.001, 3.3])
    wrong = [check(f"float8_e4m3fn -> {wide}", codes, codes.float().to(wide)) for wide in (torch.float32, torch.float16)]
    wrong.append(check("float32 -> float8_e4m3fn, exact values", codes.float(), codes))
    wrong.append(check("float32 -> float8_e4m3fn, between the codes", between, between.to(torch.float8_e4m3fn)))
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
