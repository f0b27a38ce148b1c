"""CPU QMoE accepts any quant_type and computes integers.

Expected: quant_type names the format of the weights ("fp4", "nvfp4", "fp8", "wfp4afp8"); a kernel that knows "int" only
    refuses the others, as well as names that do not exist.
Happens: every string is accepted and the bytes are read as integers: a model exported for FP4 gives silent garbage on CPU.
Versions: 1.30.0, 1.32.0 (1.26.0 has no such attribute).
"""

from __future__ import annotations

import numpy as np
from onnxruntime_common import REFUSALS, main, quantised_layer, report, run

NAMES = ("fp4", "nvfp4", "fp8", "wfp4afp8", "banana")


def check() -> None:
    """Which names give the integer result, bit for bit."""
    arrays = quantised_layer(4)
    integer = run("QMoE", arrays, expert_weight_bits=4)
    same = []
    for name in NAMES:
        try:
            if np.array_equal(run("QMoE", arrays, expert_weight_bits=4, quant_type=name), integer):
                same.append(name)
        except REFUSALS:
            continue
    got = f"computed as integers: {', '.join(same) or 'none'}"
    report(f"an error for each of {', '.join(NAMES)}", got, bool(same))


if __name__ == "__main__":
    main(check)
