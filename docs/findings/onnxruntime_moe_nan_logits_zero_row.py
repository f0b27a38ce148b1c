"""CPU MoE and QMoE turn a token with a NaN or +inf router logit into a row of zeros.

Expected: the softmax of such a row is NaN, and so is the output row (or an error): a broken router shows.
Happens: a finite row of zeros, which looks like a token without experts; the NaN weights fail a `weight > 0` test and the
    experts are dropped.
Versions: 1.24.4, 1.26.0, 1.30.0, 1.32.0.
"""

from __future__ import annotations

import numpy as np
from onnxruntime_common import Arrays, float_layer, main, quantised_layer, report, run


def rows(op: str, arrays: Arrays, **attributes: int) -> list[str]:
    """What becomes of token 1 (all logits NaN) and token 2 (one of them +inf)."""
    arrays["logits"][1] = np.nan
    arrays["logits"][2, 0] = np.inf
    output = run(op, arrays, **attributes)
    return ["zeros" if not output[t].any() else "NaN" if np.isnan(output[t]).any() else "finite" for t in (1, 2)]


def check() -> None:
    """MoE, then QMoE where there is one that takes the documented shapes."""
    got = {"MoE": rows("MoE", float_layer()), "QMoE": rows("QMoE", quantised_layer(8), expert_weight_bits=8)}
    text = "; ".join(f"{op}: NaN logits -> {a}, +inf logit -> {b}" for op, (a, b) in got.items())
    report("NaN logits -> NaN, +inf logit -> NaN", text, any(row != "NaN" for two in got.values() for row in two))


if __name__ == "__main__":
    main(check)
