"""CPU QMoE crashes the process when the optional scales are left out.

Expected: the schema marks fc1_scales and fc2_scales Optional ("Optional weight scales"); an integer QMoE without them
    computes with scale 1, or returns an error.
Happens: SIGSEGV in the first run of the session.
Versions: 1.30.0, 1.32.0 (up to 1.26.0 the scales are required and the graph is refused).
"""

from __future__ import annotations

from onnxruntime_common import REFUSALS, exit_code, main, quantised_layer, report, run


def without_scales() -> None:
    """Ends with 0 when the node computes or refuses."""
    arrays = {name: array for name, array in quantised_layer(8).items() if name not in ("s1", "s2")}
    try:
        run("QMoE", arrays, expert_weight_bits=8)
    except REFUSALS:
        return


def check() -> None:
    """In a child, since it dies."""
    run("QMoE", quantised_layer(8), expert_weight_bits=8)
    code = exit_code(without_scales)
    report("an output or an error (exit status 0)", f"exit status {code}", code != 0)


if __name__ == "__main__":
    main(check)
