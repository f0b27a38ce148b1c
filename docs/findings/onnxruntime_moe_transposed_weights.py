"""CPU MoE accepts transposed weights and reads them as if they were not.

Expected: fc1_experts_weights is documented as [experts, inter, hidden]; [experts, hidden, inter], the order of torch.bmm
    checkpoints such as gpt-oss, is refused, or multiplied as the shape says.
Happens: the shape passes the check, and the bytes are read as [experts, inter, hidden]: a silently wrong output, equal bit
    for bit to that of the same memory under the documented shape.
Versions: 1.23.2, 1.24.4, 1.26.0, 1.30.0, 1.32.0.
"""

from __future__ import annotations

from onnxruntime_common import REFUSALS, difference, float_layer, main, report, run


def check() -> None:
    """The same layer in the documented order and transposed; hidden and inter differ, so that nothing is ambiguous."""
    arrays = float_layer(hidden=64, inter=32)
    wanted = run("MoE", arrays)
    expected = "an error, or relative difference 0 from the documented order"
    transposed = {name: arrays[name].transpose(0, 2, 1).copy() for name in ("w1", "w2")}
    try:
        off = difference(run("MoE", arrays | transposed), wanted)
    except REFUSALS as refusal:
        report(expected, f"refused: {str(refusal)[:160]}", False)
    report(expected, f"accepted, relative difference {off:.2g}", off > 1e-5)


if __name__ == "__main__":
    main(check)
