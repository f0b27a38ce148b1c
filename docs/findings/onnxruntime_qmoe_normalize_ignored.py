"""CPU QMoE ignores normalize_routing_weights.

Expected: as in CPU MoE, 0 weighs the experts by the softmax over all of them and 1 by the softmax over the chosen ones; QMoE
    and MoE agree on the same (dequantised) layer. 0 is the default.
Happens: QMoE weighs by the softmax over the chosen ones whatever the attribute says. With k = 1 every weight is 1. A way
    round is to pass the full softmax as router_weights (1.26 and later), which is taken as it is.
Versions: 1.24.4, 1.26.0, 1.30.0, 1.32.0.
"""

from __future__ import annotations

import numpy as np
from onnxruntime_common import difference, main, quantised_layer, report, run


def check() -> None:
    """QMoE against MoE on the dequantised weights, for both values of the attribute."""
    arrays = quantised_layer(8)
    plain = {"x": arrays["x"], "logits": arrays["logits"]}
    for weights, scales in (("w1", "s1"), ("w2", "s2")):
        plain[weights] = (arrays[weights].astype(np.float32) - 128) * arrays[scales][..., None]
    off = [
        difference(
            run("QMoE", arrays, expert_weight_bits=8, normalize_routing_weights=normalize),
            run("MoE", plain, normalize_routing_weights=normalize),
        )
        for normalize in (0, 1)
    ]
    got = f"relative difference of QMoE from MoE: normalize 0 {off[0]:.2g}, normalize 1 {off[1]:.2g}"
    report("relative differences below 1e-5", got, max(off) > 1e-5)


if __name__ == "__main__":
    main(check)
