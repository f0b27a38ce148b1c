"""Our own fused MoE in Triton (_triton_kernels.py): plain, FP8 and 4-bit weights. Native on GPUs, interpreted on the CPU."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from harness.backends.base import YES, Backend, Device, Launch, Support
from harness.case import Case, Limit
from harness.guard import Argument
from harness.inputs import Inputs
from reference.format import WHOLE, Format, Quantized
from reference.formats import get
from reference.layouts.linear import pack_nibbles
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
    """The kernels write four tensors, all in the dtype of x; weighting and the sum over experts stay in fp32."""
    acts = None if case.recipe.acts == "fp32" else case.recipe.acts
    return Rounding(gate_up=acts, middle=acts, row=acts, out=acts)


def whole_blocks(case: Case) -> str | None:
    """The kernels read scales in whole blocks along both reduction axes."""
    scaling = get(case.recipe.weights).scaling
    group = 1 if scaling is None else scaling.group[1] or 1
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if size % group:
            return f"{name} {size} is not a multiple of {group}, the block of {case.recipe.weights}"
    return None


@dataclass(frozen=True)
class Stack:
    """One projection of all experts: `data` [experts, rows, columns (/ 2 for 4-bit codes)], block `scales` [experts, rows,
    columns / block] as codes, float32 `factors` [experts, parts]: `parts` matrices lie one above the other."""

    data: Tensor
    scales: Tensor | None
    factors: Tensor | None

    @classmethod
    def empty(cls, fmt: Format, shape: tuple[int, int, int], parts: int, device: str) -> Stack:
        """Room for [experts, rows, columns] of `fmt`, filled by `put`: no second copy of the weights is ever held."""
        experts, rows, columns = shape
        if fmt.torch_dtype is not None:
            return cls(torch.empty(shape, dtype=fmt.torch_dtype, device=device), None, None)
        assert fmt.scaling is not None
        data = torch.empty((experts, rows, columns * fmt.element.bits // 8), dtype=torch.uint8, device=device)
        scales = factors = None
        if fmt.scaling.group[1] != WHOLE:
            blocks = columns // fmt.scaling.group[1]
            scales = torch.empty((experts, rows, blocks), dtype=torch.uint8, device=device)
        if scales is None or fmt.scaling.global_scale:
            factors = torch.empty((experts, parts), dtype=torch.float32, device=device)
        return cls(data, scales, factors)

    def put(self, expert: int, part: int, q: Quantized) -> None:
        """Store one matrix as rows part * rows .. of its expert."""
        rows = slice(part * q.shape[0], (part + 1) * q.shape[0])
        self.data[expert, rows] = pack_nibbles(q.codes) if q.format.element.bits == 4 else q.codes
        if self.scales is not None and q.scales is not None:
            self.scales[expert, rows] = q.scales
        if self.factors is not None:
            self.factors[expert, part] = _factor(q)

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The tensors by name: w13, w13_scales, w13_factors."""
        named = {name: self.data, f"{name}_scales": self.scales, f"{name}_factors": self.factors}
        return {key: tensor for key, tensor in named.items() if tensor is not None}


def _factor(q: Quantized) -> Tensor:
    """What a whole matrix is multiplied by: 1 / global scale (encode sense), or the one scale of a per-tensor format."""
    if q.global_scale is not None:
        return 1 / q.global_scale.float()
    assert q.scales is not None
    return q.scales.float().reshape(())


def pack(case: Case, inputs: Inputs) -> tuple[Stack, Stack]:
    """(w13, w2): gate rows above up rows, then the down projection."""
    shape, fmt = case.shape, get(case.recipe.weights)
    parts = 1 if inputs.gate_up(0)[1] is None else 2
    w13 = Stack.empty(fmt, (shape.experts, parts * shape.inter, shape.hidden), parts, inputs.device)
    w2 = Stack.empty(fmt, (shape.experts, shape.hidden, shape.inter), 1, inputs.device)
    for expert in range(shape.experts):
        for part, q in enumerate(inputs.gate_up(expert)):
            if q is not None:
                w13.put(expert, part, q)
        w2.put(expert, 0, inputs.down(expert))
    return w13, w2


def prepare(case: Case, inputs: Inputs, kernels: ModuleType | None = None) -> Launch:
    """Pack the weights and bind the layer to them; `kernels`: another module in the place of _triton_kernels."""
    if kernels is None:
        kernels = importlib.import_module("harness.backends._triton_kernels")
    w13, w2 = pack(case, inputs)
    kind = KINDS.get(case.recipe.weights, "plain")
    first, second = (kernels.Weights(kind, s.data, s.scales, s.factors) for s in (w13, w2))
    x, topk = inputs.x, (inputs.topk_ids, inputs.topk_weights)
    buffers = {"x": x, "ids": topk[0], "topk_weights": topk[1], **w13.buffers("w13"), **w2.buffers("w2")}
    tokens = case.shape.tokens
    contract = (  # of the weights `moe` itself asks what it wants
        Argument("x", get(case.recipe.acts).torch_dtype, (tokens, case.shape.hidden)),
        Argument("ids", (torch.int32, torch.int64), (tokens, case.shape.top_k)),
        Argument("topk_weights", torch.float32, (tokens, case.shape.top_k)),
    )
    return Launch(lambda: kernels.moe(x, first, second, topk, case.activation), buffers, contract=contract)


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
        prepare=prepare,
        exempt={"graph": "the alignment reads the padded size on the host"},
        summary="our Triton kernels: align, grouped GEMM with in-register dequantisation, activation, weighted sum",
    ),
)
