"""FlashInfer's quantisers of activations: fp4_quantize (NVFP4 and MXFP4 in three layouts of scales) and its short forms, and
mxfp8_quantize. fp4_quantize is registered on SM90 too, where the library dispatches it: docs/findings.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from harness.backends._ops import global_scale, matrix, some_tokens, unswizzled
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.entry import needs, resolve
from harness.guard import Argument
from harness.inputs import Inputs
from reference.formats import get
from reference.rounding import Rounding

HOME = "flashinfer.quantization"
ARCHS = ("sm90", "sm100", "sm103", "sm110", "sm120", "sm121")  # modules of get_fp4_quantization_module, 0.7.2.post1
LAYOUTS = {"128x4": "swizzle_128x4", "8x4": "swizzle_8x4", "linear": "linear"}
SF_LAYOUT = {"128x4": 0, "8x4": 1, "linear": 2}  # tllm_enums.SfLayout, an IntEnum
# The rules of the default paths; fp4_quantize's is the one with fast arithmetic (csrc quantization_utils.cuh).
RULES = {"nvfp4": "nvfp4:fast", "mxfp4": "mxfp4", "mxfp8": "mxfp8"}

Outputs = tuple[Tensor, Tensor]


def launch(case: Case, inputs: Inputs, quantize: Callable[..., Outputs], layout: str) -> Launch:
    """A launch of `quantize(x, global scale or None)`, which gives codes and scales in the storage of `layout`."""
    x, fmt = inputs.x, get(case.recipe.weights)
    assert fmt.scaling is not None
    shape = fmt.scaling.scale_shape(case.shape.tokens, case.shape.hidden)
    buffers, contract = {"x": x}, [Argument("x", x.dtype, (case.shape.tokens, case.shape.hidden))]
    if fmt.scaling.global_scale:
        buffers["global_scale"] = global_scale(inputs)
        contract.append(Argument("global_scale", torch.float32, (1,), contiguous=True))

    def call() -> Tensor:
        codes, scales = quantize(x, buffers.get("global_scale"))
        if not case.shape.tokens:
            return matrix(codes, codes.new_empty(shape, dtype=torch.uint8))
        return matrix(codes, unswizzled(scales, LAYOUTS[layout], shape))

    return Launch(call, buffers, contract=tuple(contract))


def _fp4(layout: str, case: Case, inputs: Inputs) -> Launch:
    function = resolve(f"{HOME}.fp4_quantize", inputs.device)
    block, codes = (16, False) if case.recipe.weights == "nvfp4" else (32, True)

    def quantize(x: Tensor, scale: Tensor | None) -> Outputs:
        return function(  # type: ignore[no-any-return]
            *(x, scale, block, codes), is_sf_swizzled_layout=layout != "linear", is_sf_8x4_layout=layout == "8x4"
        )

    return launch(case, inputs, quantize, layout)


def _nvfp4(layout: str, case: Case, inputs: Inputs) -> Launch:
    function = resolve(f"{HOME}.nvfp4_quantize", inputs.device)
    return launch(case, inputs, lambda x, scale: function(x, scale, sfLayout=SF_LAYOUT[layout]), layout)


def _mxfp4(layout: str, case: Case, inputs: Inputs) -> Launch:
    function = resolve(f"{HOME}.mxfp4_quantize", inputs.device)
    return launch(case, inputs, lambda x, scale: function(x, sfLayout=SF_LAYOUT[layout]), layout)


def _mxfp8(layout: str, case: Case, inputs: Inputs) -> Launch:
    function = resolve(f"{HOME}.mxfp8_quantize", inputs.device)
    return launch(case, inputs, lambda x, scale: function(x, is_sf_swizzled_layout=layout == "128x4"), layout)


def _backend(entry: str, layout: str, formats: tuple[str, ...], prepare: Callable[[str, Case, Inputs], Launch]) -> Backend:
    return Backend(
        name=f"flashinfer_{entry}_{layout}",
        op="quantize",
        library="flashinfer-python",
        deterministic=True,
        recipes=tuple(f"{name}{x}" for name in formats for x in ("", "-fp16")),
        activations=(),
        archs=ARCHS,
        rounding=lambda case: Rounding(x=RULES[case.recipe.weights]),
        probe=needs(f"{HOME}.{entry}"),
        prepare=partial(prepare, layout),
        entries=(f"{HOME}.{entry}",),
        twinned=True,
        limits=() if entry == "mxfp8_quantize" else (some_tokens("quantization.cuh, seen on SM90"),),
        summary=f"{entry} of {' and '.join(formats)}, scales in layout {layout}",
    )


BACKENDS = (
    *(_backend("fp4_quantize", layout, ("nvfp4", "mxfp4"), _fp4) for layout in LAYOUTS),
    _backend("nvfp4_quantize", "128x4", ("nvfp4",), _nvfp4),
    _backend("mxfp4_quantize", "128x4", ("mxfp4",), _mxfp4),
    *(_backend("mxfp8_quantize", layout, ("mxfp8",), _mxfp8) for layout in ("linear", "128x4")),
)
