"""What the onnxruntime_*.py findings share: one com.microsoft node on the CPU, a child process, and the report.

Needs onnx, onnxruntime and numpy only. Every script exits with 1 when the defect is present, 0 when it is gone (the node
refuses, or computes what it should) and 2 when this onnxruntime cannot run the healthy node that it is compared with.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

REFUSALS = (native.InvalidArgument, native.InvalidGraph, native.NotImplemented, native.Fail, native.RuntimeException)
ORDER = {  # operator -> its inputs by position, under short names
    "MoE": ["x", "logits", "w1", "b1", "w2", "b2"],
    "QMoE": ["x", "logits", "w1", "s1", "b1", "w2", "s2", "b2", "w3", "s3", "b3", "z1", "z2", "z3", "router_weights"],
}
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
Arrays = dict[str, np.ndarray]
Attribute = int | float | str


def run(op: str, arrays: Arrays, **attributes: Attribute) -> np.ndarray:
    """[tokens, hidden] of one node `op`; one of REFUSALS where the runtime says no."""
    names = [name if name in arrays else "" for name in ORDER[op]]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **{"k": 2, "activation_type": "silu"} | attributes)
    inputs = [helper.make_tensor_value_info(name, TYPES[str(a.dtype)], a.shape) for name, a in arrays.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], op, inputs, [output]), opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, arrays)[0])


def float_layer(tokens: int = 4, experts: int = 4, hidden: int = 64, inter: int = 32) -> Arrays:
    """Random fp32 inputs of MoE, outputs of order 1."""
    draw = np.random.default_rng(0).standard_normal
    shapes: dict[str, tuple[int, ...]] = {"x": (tokens, hidden), "logits": (tokens, experts)}
    shapes |= {"w1": (experts, inter, hidden), "w2": (experts, hidden, inter)}
    scale = {"w1": hidden**-0.5, "w2": inter**-0.5}
    return {name: (draw(shape) * scale.get(name, 1.0)).astype(np.float32) for name, shape in shapes.items()}


def quantised_layer(bits: int, tokens: int = 4, experts: int = 4, hidden: int = 64, inter: int = 32) -> Arrays:
    """Random inputs of QMoE, symmetric per-row scales, outputs of order 1."""
    arrays = float_layer(tokens, experts, hidden, inter)
    random = np.random.default_rng(1)
    for name, scale in (("w1", "s1"), ("w2", "s2")):
        rows, columns = arrays[name].shape[1:]
        arrays[name] = random.integers(0, 256, (experts, rows, columns * bits // 8)).astype(np.uint8)
        arrays[scale] = np.full((experts, rows), 4.0 / 2**bits / columns**0.5, np.float32)
    return arrays


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """|got - wanted| / |wanted|, inf where got holds NaN or inf."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def exit_code(function: Callable[[], None]) -> int | None:
    """Run a module-level function in a child process: its exit status, minus the signal when one killed it."""
    child = multiprocessing.get_context("spawn").Process(target=function)
    child.start()
    child.join(120)
    child.kill()  # a no-op unless it hangs
    child.join()
    return child.exitcode


def report(expected: str, got: str, defect: bool) -> None:
    """Print both and end the script."""
    verdict = "defect present" if defect else "defect gone"
    print(f"onnxruntime {onnxruntime.__version__}\nexpected: {expected}\ngot:      {got}\n{verdict}")
    sys.exit(int(defect))


def main(check: Callable[[], None]) -> None:
    """Run a script's check; a refusal that it does not handle means that there is nothing to compare with."""
    try:
        check()
    except REFUSALS as refusal:
        print(f"onnxruntime {onnxruntime.__version__} cannot run this at all: {str(refusal)[:200]}")
        sys.exit(2)
