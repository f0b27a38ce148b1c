"""triton_kernels Blackwell fp4 weights, packed along K: [N, K / 2] bytes.

Plain: K bytes padded to 128 and contiguous (the library shows the transpose, [K / 2, N] column-major). Shuffled: each
256-row x 64-byte tile contiguous, K tiles outermost. Packed shuffled: 512 rows and two K tiles, 8 bytes of each in turn.
"""

from __future__ import annotations

from reference.layout import REST, Tiling, tiled

SOURCE = "triton_kernels tensor_details/layout_details/blackwell_value"

PLAIN = Tiling(split=((REST,), (REST,)), order=(0, 1), merge=(1, 1))
SHUFFLED = Tiling(split=((REST, 256), (REST, 64)), order=(2, 0, 1, 3), merge=(1, 1, 1, 1))
PACKED = Tiling(split=((REST, 512), (REST, 2, 8, 8)), order=(2, 0, 1, 4, 3, 5), merge=(1, 1, 1, 3))

LAYOUTS = (
    tiled("blackwell_value", PLAIN, f"{SOURCE}.py", pad=(1, 128)),
    tiled("blackwell_value_shuffled", SHUFFLED, f"{SOURCE}_shuffled.py", pad=(256, 128)),
    tiled("blackwell_value_packed_shuffled", PACKED, f"{SOURCE}_packed_shuffled.py", pad=(512, 128)),
)
