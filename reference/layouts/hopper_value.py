"""triton_kernels HopperMXValueLayout, on fp4 weights packed along K: [N, K / 2] bytes -> [N / 4, 4 * K / 2].

The bytes that one thread feeds to 4 tensor-core tiles are made contiguous, then each four of them become a 32-bit word
that two masks and a shift turn into bfloat16 pairs. Padding differs between versions, so one version cannot read what
another wrote: (rows, bytes) to (16, 32) in the first, (64, 64) since triton #8677, (256, 64) since #10428.
"""

from __future__ import annotations

from reference.layout import REST, Layout, Shape, Tiling, tiled, twiddled

SOURCE = "triton_kernels tensor_details/layout_details/hopper_value.py"
PADDING = {"first": (16, 32), "old": (64, 64), "new": (256, 64)}


def _bits() -> Shape:
    """Where bit b of a word goes. Byte i's low code lands in the low half, its high code in the high half.

    Codes 0 to 2 of a half take sign 15 - 3 i and exponent, mantissa 8 - 3 i and down; code 3 fills the gaps.
    """
    targets = []
    for byte in range(4):
        places = (13, 10, 11, 14) if byte == 3 else (6 - 3 * byte, 7 - 3 * byte, 8 - 3 * byte, 15 - 3 * byte)
        targets += [half + place for half in (0, 16) for place in places]
    return tuple(targets)


BITS = _bits()


def hopper_value(mma: int, padding: str = "new") -> Layout:
    """`mma`: tensor-core version, 3 (Hopper) or 2 (Ampere: a thread owns 4 bytes in a row, not 1)."""
    own = 4 if mma == 2 else 1
    #          rows: rest, warp, thread, pair   bytes: rest, tile, warp, thread, own
    tiling = Tiling(
        split=((REST, 2, 4, 2), (REST, 4 // own, 2, 4, own)),
        order=(0, 2, 4, 3, 7, 5, 6, 1, 8),
        merge=(2, 7),
    )
    return twiddled(tiled("", tiling, SOURCE, pad=PADDING[padding]), f"hopper_value_mma{mma}_{padding}", BITS)


LAYOUTS = tuple(hopper_value(mma, padding) for mma in (3, 2) for padding in PADDING)
