"""Our own fused MoE in Triton (_triton_kernels.py): plain, FP8 and 4-bit weights. Native on GPUs, interpreted on the CPU."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from harness.backends._packing import group_of, pack
from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import WEIGHTINGS, Case, Limit
from harness.guard import Argument
from harness.inputs import Inputs
from reference.formats import get
from reference.rounding import Rounding

KINDS = {"fp8_tensor": "fp8", "nvfp4": "nvfp4", "mxfp4": "mxfp4"}  # the kernels' name of each weight format that is not plain


def probe(device: Device) -> Support:
    """Triton is there, interpreting on the CPU and nowhere else: TRITON_INTERPRET counts when triton is imported."""
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if interpret != (device.kind == "cpu"):
        wanted = "only with TRITON_INTERPRET=1" if device.kind == "cpu" else "natively only without TRITON_INTERPRET=1"
        return Support.no("library", f"Triton runs on a {device.kind} device {wanted}, set before it is imported")
    try:
        import triton.language
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        return Support.no("library", f"triton cannot be imported: {error}")
    if interpret == isinstance(triton.language.cdiv, JITFunction):  # its own functions are defined on import
        return Support.no("library", "TRITON_INTERPRET changed after triton was imported")
    return YES


def rounding(case: Case) -> Rounding:
    """The kernels write four tensors, all in the dtype of x; weighting, of sums or of rows, and the sum over experts stay in
    fp32."""
    acts = None if case.recipe.acts == "fp32" else case.recipe.acts
    return Rounding(gate_up=acts, middle=acts, row=acts, out=acts)


def whole_blocks(case: Case) -> str | None:
    """The kernels read scales in whole blocks along both reduction axes."""
    group = group_of(case)
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % group:
            return f"{name} {size} is not a multiple of {group}, the block of {case.recipe.weights}"
    return None


def prepare(case: Case, inputs: Inputs, kernels: ModuleType | None = None) -> Launch:
    """Pack the weights and bind the layer to them; `kernels`: another module in the place of _triton_kernels."""
    if kernels is None:
        kernels = importlib.import_module("harness.backends._triton_kernels")
    w13, w2 = pack(case, inputs)
    kind = KINDS.get(case.recipe.weights, "plain")
    first, second = (kernels.Weights(kind, s.data, s.scales, s.factors) for s in (w13, w2))
    x, topk = inputs.x, (inputs.topk_ids, inputs.topk_weights)
    options = {"on_input": True} if case.weighting == "oninput" else {}
    buffers = {"x": x, "ids": topk[0], "topk_weights": topk[1], **w13.buffers("w13"), **w2.buffers("w2")}
    tokens = case.shape.tokens
    contract = (  # of the weights `moe` itself asks what it wants
        Argument("x", get(case.recipe.acts).torch_dtype, (tokens, case.shape.hidden)),
        Argument("ids", (torch.int32, torch.int64), (tokens, case.shape.top_k)),
        Argument("topk_weights", torch.float32, (tokens, case.shape.top_k)),
    )
    return Launch(lambda: kernels.moe(x, first, second, topk, case.activation, **options), buffers, contract=contract)


BACKENDS = (
    Backend(
        name="triton_moe",
        library="triton",
        deterministic=True,
        recipes=("fp32", "fp16", "bf16", "fp8_tensor", "nvfp4", "mxfp4", "fp8_tensor-fp16", "nvfp4-fp16", "mxfp4-fp16"),
        activations=("swiglu", "swiglu_oai", "geglu", "silu", "relu", "gelu", "gelu_tanh", "identity"),
        archs=("cpu", "sm90", "sm100", "sm103", "sm120"),
        rounding=rounding,
        probe=probe,
        limits=(Limit(("recipe", "hidden", "inter"), whole_blocks),),
        weightings=WEIGHTINGS,
        prepare=prepare,
        exempt={"graph": "the alignment reads the padded size on the host"},
        summary="our Triton kernels: align, grouped GEMM with in-register dequantisation, activation, weighted sum",
    ),
)
