"""CPU QMoE reads out of bounds when swiglu_fusion is set and the activation is not gated.

Expected: swiglu_fusion says how gate and up are fused; with activation_type silu, gelu, relu or identity there is no up, the
    documented fusion_size is 1 and fc1_experts_weights is [experts, inter, hidden]. The attribute changes nothing, or is
    refused.
Happens: the kernel takes 2 * inter rows of FC1 for granted and reads past the end of fc1_experts_weights and fc1_scales:
    other values or NaN in small layers, SIGSEGV at hidden = inter = 2048. Valid shapes pass its input check.
Versions: 1.24.4, 1.26.0, 1.30.0, 1.32.0 (1.23.2 refuses the shape).
"""

from __future__ import annotations

import sys

from onnxruntime_common import REFUSALS, difference, exit_code, main, quantised_layer, report, run


def small() -> None:
    """Ends with 3 when the attribute changes the values of a small layer."""
    arrays = quantised_layer(8, hidden=64, inter=64)
    plain = run("QMoE", arrays, expert_weight_bits=8)
    try:
        fused = run("QMoE", arrays, expert_weight_bits=8, swiglu_fusion=1)
    except REFUSALS:
        return
    sys.exit(0 if difference(fused, plain) < 1e-5 else 3)


def large() -> None:
    """Dies when the rows that do not exist lie outside the mapped memory."""
    arrays = quantised_layer(8, experts=1, hidden=2048, inter=2048)
    try:
        run("QMoE", arrays, k=1, expert_weight_bits=8, swiglu_fusion=1)
    except REFUSALS:
        return


def check() -> None:
    """Both sizes, each in a child."""
    run("QMoE", quantised_layer(8), expert_weight_bits=8)
    values, crash = exit_code(small), exit_code(large)
    got = f"hidden 64: {'other values' if values == 3 else f'exit status {values}'}; hidden 2048: exit status {crash}"
    report("the same values with and without swiglu_fusion (exit status 0, 0)", got, bool(values) or bool(crash))


if __name__ == "__main__":
    main(check)
