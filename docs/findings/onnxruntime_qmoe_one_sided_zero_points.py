"""CPU QMoE, 4 bits: giving zero points to one projection re-quantises the other one.

Expected: zero points equal to the default 8 (packed 0x88) change nothing, whether given for fc1, for fc2 or for both.
Happens: given for both, the output is the same bit for bit; given for one only, it moves by 2 % and more: the projection
    without zero points is re-quantised to MLAS's own 4-bit blocks. On machines where MlasQ4Gemm is available (seen on
    AVX-512); ORT_USE_MLAS_Q4_GEMM_MOE=0 hides it.
Versions: 1.24.4, 1.26.0, 1.30.0, 1.32.0.
"""

from __future__ import annotations

import numpy as np
from onnxruntime_common import difference, main, quantised_layer, report, run

EXPERTS, SIZE = 8, 128


def check() -> None:
    """Relative difference from the call without zero points: both, fc1 only, fc2 only."""
    arrays = quantised_layer(4, tokens=16, experts=EXPERTS, hidden=SIZE, inter=SIZE)
    eights = np.full((EXPERTS, SIZE // 2), 0x88, np.uint8)
    plain = run("QMoE", arrays, expert_weight_bits=4)
    given = {"both": ("z1", "z2"), "fc1 only": ("z1",), "fc2 only": ("z2",)}
    moved = {
        name: difference(run("QMoE", arrays | dict.fromkeys(which, eights), expert_weight_bits=4), plain)
        for name, which in given.items()
    }
    got = ", ".join(f"{name} {value:.2g}" for name, value in moved.items())
    report("relative difference 0 for both, fc1 only and fc2 only", got, max(moved.values()) > 1e-5)


if __name__ == "__main__":
    main(check)
