"""ONNX Runtime's CPU operators com.microsoft.MoE (fp32) and com.microsoft.QMoE (8- and 4-bit experts), one-node models.

Everything is a graph input, never an initializer: constants would be re-packed when the session is made, the model would
hold a second copy of the weights, and constant 8-bit block-wise experts get int8 activations (ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case, Limit
from harness.guard import Argument
from harness.inputs import Inputs
from reference.format import Quantized
from reference.rounding import Rounding

DOMAIN = "com.microsoft"
OPSETS = (("", 17), (DOMAIN, 1))
IR_VERSION = 8  # the oldest that goes with opset 17: a newer onnx than the runtime knows must not matter
BITS = {"int8_channel": 8, "int4_channel": 4}
SWIGLU: dict[str, float | int | str] = {"activation_type": "swiglu", "swiglu_fusion": 1}  # 1: rows are g0, u0, g1, u1, ...
ACTIVATIONS: dict[str, dict[str, float | int | str]] = {  # moecheck's name -> attributes of the node
    "swiglu": {**SWIGLU, "activation_alpha": 1.0, "activation_beta": 0.0},
    "swiglu_oai": {**SWIGLU, "activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0},
    "silu": {"activation_type": "silu"},
    "gelu_tanh": {"activation_type": "gelu"},  # the CPU kernel's gelu is the tanh form
    "relu": {"activation_type": "relu"},
    "identity": {"activation_type": "identity"},
}
MOE_INPUTS = ("x", "logits", "fc1_weights", "", "fc2_weights")  # "" is an optional input left out: a bias
QMOE_INPUTS = ("x", "logits", "fc1_weights", "fc1_scales", "", "fc2_weights", "fc2_scales", *[""] * 7, "router_weights")


def probe(device: Device) -> Support:
    """Both libraries, and a CPU kernel of QMoE that takes router_weights: the schema alone may be CUDA's."""
    if device.kind != "cpu":
        return Support.no("arch", "CPU execution provider only")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as native
    except ImportError as error:
        return Support.no("library", f"wants onnx and onnxruntime: {error}")
    kernels = {(kernel.op_name, kernel.provider) for kernel in native.get_all_opkernel_def()}
    inputs = {i.name for schema in native.get_all_operator_schema() if schema.name == "QMoE" for i in schema.inputs}
    if not {("MoE", "CPUExecutionProvider"), ("QMoE", "CPUExecutionProvider")} <= kernels or "router_weights" not in inputs:
        return Support.no("library", f"onnxruntime {onnxruntime.__version__} has no CPU MoE and QMoE with router_weights")
    return YES


def odd_columns(case: Case) -> str | None:
    """Two 4-bit codes share a byte and no byte spans two rows."""
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if case.recipe.weights == "int4_channel" and size % 2:
            return f"{name} {size} is odd: two 4-bit codes share a byte"
    return None


def prepare(case: Case, inputs: Inputs) -> Launch:
    """fc1_weights [experts, rows, hidden * bits / 8], fc2_weights [experts, hidden, inter * bits / 8], fp32 or uint8;
    rows = inter, or 2 * inter with gate and up interleaved; fc1_scales [experts, rows] and fc2_scales [experts, hidden]."""
    bits = BITS.get(case.recipe.weights)
    first, second = [], []
    for expert in range(case.shape.experts):
        gate, up = inputs.gate_up(expert)
        first.append([_pack(gate, bits)] if up is None else [_pack(gate, bits), _pack(up, bits)])
        second.append([_pack(inputs.down(expert), bits)])
    buffers = {"x": inputs.x, "logits": inputs.logits}
    for name, matrices in (("fc1", first), ("fc2", second)):
        buffers[f"{name}_weights"] = torch.stack([_interleave([codes for codes, _ in halves]) for halves in matrices])
        if bits is not None:
            buffers[f"{name}_scales"] = torch.stack([_interleave([scales for _, scales in halves]) for halves in matrices])
    weighted = _weighted(case)

    def given() -> dict[str, Tensor]:
        return {**buffers, "router_weights": buffers["logits"].double().softmax(-1).float()} if weighted else buffers

    session = _session(_model(case, given()))
    return Launch(lambda: _run(session, given()), buffers, contract=contract(case, rows=buffers["fc1_weights"].shape[1]))


def contract(case: Case, rows: int) -> tuple[Argument, ...]:
    """What the schema of MoE or QMoE wants (onnxruntime ContribOperators.md), fc1 with `rows` rows; bound by address."""
    shape, bits = case.shape, BITS.get(case.recipe.weights)
    codes, packed = (torch.float32, 1) if bits is None else (torch.uint8, 8 // bits)
    arguments = [
        Argument("x", torch.float32, (shape.tokens, shape.hidden), "cpu"),
        Argument("logits", torch.float32, (shape.tokens, shape.experts), "cpu"),
        Argument("fc1_weights", codes, (shape.experts, rows, shape.hidden // packed), "cpu", contiguous=True),
        Argument("fc2_weights", codes, (shape.experts, shape.hidden, shape.inter // packed), "cpu", contiguous=True),
    ]
    if bits is not None:
        arguments.append(Argument("fc1_scales", torch.float32, (shape.experts, rows), "cpu"))
        arguments.append(Argument("fc2_scales", torch.float32, (shape.experts, shape.hidden), "cpu"))
    return tuple(arguments)


def _weighted(case: Case) -> bool:
    """QMoE ignores normalize_routing_weights; it gathers the weights of its own top-k from router_weights, as they are."""
    return case.recipe.weights in BITS and case.routing == "default"


def _pack(matrix: Quantized, bits: int | None) -> tuple[Tensor, Tensor]:
    """(stored codes [rows, columns * bits / 8], scales [rows]) of one matrix [rows, columns]; scales are empty in fp32."""
    if matrix.scales is None or bits is None:
        return matrix.codes, torch.empty(0)
    codes = matrix.codes ^ (1 << (bits - 1))  # two's complement -> offset 128 or 8: the sign bit flips
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)  # even column in the low nibble
    return codes, matrix.scales[:, 0]


def _interleave(halves: list[Tensor]) -> Tensor:
    """[gate] as it is; [gate, up] -> g0, u0, g1, u1, ... along the rows."""
    return torch.stack(halves, dim=1).flatten(0, 1)


def _node(case: Case, given: Iterable[str]) -> tuple[str, list[str], dict[str, float | int | str]]:
    """(operator, its inputs by position, its attributes)."""
    op, order = ("MoE", MOE_INPUTS) if case.recipe.weights == "fp32" else ("QMoE", QMOE_INPUTS)
    names = [name if name in given else "" for name in order]
    while not names[-1]:
        names.pop()
    attributes = {"k": case.shape.top_k, "normalize_routing_weights": int(case.routing == "renormalize")}
    if op == "QMoE":
        attributes["expert_weight_bits"] = BITS[case.recipe.weights]
    return op, names, {**attributes, **ACTIVATIONS[case.activation]}


def _model(case: Case, buffers: Mapping[str, Tensor]) -> bytes:
    """A model of one node with the buffers as its inputs, all sizes free."""
    from onnx import TensorProto, helper

    types = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}
    op, names, attributes = _node(case, buffers)
    node = helper.make_node(op, names, ["out"], domain=DOMAIN, **attributes)
    given = [helper.make_tensor_value_info(n, types[t.dtype], [None] * t.dim()) for n, t in buffers.items()]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, None])]
    opsets = [helper.make_opsetid(*opset) for opset in OPSETS]
    model = helper.make_model(helper.make_graph([node], op, given, out), opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def _session(model: bytes) -> Any:
    """An inference session on the CPU provider whose idle threads sleep: a case lasts milliseconds, the worker does not."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, buffers: Mapping[str, Tensor]) -> Tensor:
    """One call; contiguous CPU tensors go in by address."""
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in buffers.items()})[0])


SCRIPT = """\
import onnxruntime
from onnx import TensorProto, helper

TYPES = {{torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8}}


def call(b):
    {weights}
    node = helper.make_node({op!r}, {names!r}, ["out"], domain={domain!r}, **{attributes!r})
    given = [helper.make_tensor_value_info(name, TYPES[t.dtype], [None] * t.dim()) for name, t in b.items()]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, None])]
    opsets = [helper.make_opsetid(*opset) for opset in {opsets!r}]
    graph = helper.make_graph([node], {op!r}, given, out)
    model = helper.make_model(graph, opset_imports=opsets, ir_version={ir_version})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {{name: t.numpy() for name, t in b.items()}})[0])
"""
WEIGHTS = 'b = {**b, "router_weights": b["logits"].double().softmax(-1).float()}'


def script(case: Case) -> str:
    """The one-node model and its session as straight-line text; wants onnx beside onnxruntime."""
    quantised, weighted = case.recipe.weights in BITS, _weighted(case)
    given = {"x", "logits", "fc1_weights", "fc2_weights"}
    given |= {"fc1_scales", "fc2_scales"} if quantised else set()
    given |= {"router_weights"} if weighted else set()
    op, names, attributes = _node(case, given)
    text = {"op": op, "names": names, "attributes": attributes, "domain": DOMAIN, "opsets": OPSETS, "ir_version": IR_VERSION}
    return SCRIPT.format(**text, weights=WEIGHTS if weighted else "b = dict(b)")


BACKENDS = (
    Backend(
        name="onnxruntime_moe",
        library="onnxruntime",
        deterministic=True,
        recipes=("fp32", "int8_channel-fp32", "int4_channel-fp32"),
        activations=tuple(ACTIVATIONS),
        routings=("default", "renormalize"),
        rounding=lambda case: Rounding(),
        probe=probe,
        limits=(Limit(("recipe", "hidden", "inter"), odd_columns),),
        prepare=prepare,
        script=script,
        summary="ONNX Runtime's CPU MoE and QMoE; the node routes and computes",
    ),
)
