"""vLLM's batched Triton kernel (invoke_moe_batched_triton_kernel): [experts, rows, hidden] slabs and the count of live rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.backends import _vllm
from harness.backends._packing import pack
from harness.backends._slabs import in_slabs
from harness.backends._vllm_schemes import FP8, interleaved_blocks
from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.inputs import Inputs
from reference.rounding import Rounding

ENTRY = f"{_vllm.FUSED_MOE}.experts.fused_batched_moe.invoke_moe_batched_triton_kernel"
TILES = f"{_vllm.FUSED_MOE}.fused_moe.try_get_optimal_moe_config"
QUANTISE = f"{_vllm.FUSED_MOE}.utils.moe_kernel_quantize_input"
ACTIVATE = f"{_vllm.FUSED_MOE}.activation.apply_moe_activation"
COMPUTE = {torch.bfloat16: "triton.language.bfloat16", torch.float16: "triton.language.float16"}
RECIPES = ("bf16", "fp16", *FP8)


def rounding(case: Case) -> Rounding:
    """Both GEMMs and the activation write the dtype of x; the adapter multiplies and adds in fp32."""
    out, acts, scheme = case.recipe.out, case.recipe.acts, FP8.get(str(case.recipe))
    rule = _vllm.RULES.get(acts, acts)
    return Rounding(
        x=None if scheme is None else rule,
        gate_up=out,
        activated=_vllm.halves(case),
        middle=out if scheme is None else f"{out}>{rule}",
        row=out,
        out=out,
        accumulate="fp32" if scheme is None else scheme.accumulate,
    )


@dataclass(frozen=True)
class Layer:
    """The two calls of the kernel on one set of buffers. library: what it calls, by dotted name; block: of FP8 in blocks of
    128; per_token: whether activations have a scale a row."""

    case: Case
    b: dict[str, Tensor]
    library: dict[str, Any]
    block: list[int] | None
    per_token: bool

    def __call__(self) -> Tensor:
        """Slabs, GEMM, activation, GEMM, weighted sum."""
        b, shape = self.b, self.case.shape
        places = in_slabs(b["ids"], shape.experts, shape.tokens)
        x, scale = self.quantised(b["x"], b.get("a1_scale"))
        rows = places.spread(x).view(shape.experts, shape.tokens, shape.hidden)
        if scale is not None and scale.numel() > 1:
            scale = places.spread(scale.contiguous()).view(shape.experts, shape.tokens, -1)
        pre = self.gemm(rows, scale, "w13", places.counts)
        middle = pre.new_empty((len(places.owner), shape.inter))
        self.library[ACTIVATE](self.library[_vllm.ACTIVATION], middle, pre.view(len(places.owner), -1))
        narrow, scale = self.quantised(middle, b.get("a2_scale"))
        if scale is not None and scale.numel() > 1:
            scale = scale.view(shape.experts, shape.tokens, -1)
        out = self.gemm(narrow.view(shape.experts, shape.tokens, shape.inter), scale, "w2", places.counts)
        return places.gathered(out.view(len(places.owner), shape.hidden), b["topk_weights"])

    def quantised(self, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [rows, columns] as the kernel reads it, and its scales."""
        kind = torch.float8_e4m3fn if self.case.recipe.acts.startswith("fp8") else None
        found: tuple[Tensor, Tensor | None] = self.library[QUANTISE](x, scale, kind, self.per_token, self.block)
        return found

    def gemm(self, rows: Tensor, scale: Tensor | None, name: str, counts: Tensor) -> Tensor:
        """[experts, rows, columns] of the live rows; the others keep what memory held."""
        weights, dtype = self.b[name], _vllm.carrier(self.case)
        out = rows.new_empty((*rows.shape[:2], weights.shape[1]), dtype=dtype)
        quantised = scale is not None
        self.library[ENTRY](
            A=rows,
            B=weights,
            C=out,
            expert_num_tokens=counts,
            compute_type=self.library[COMPUTE[dtype]],
            A_scale=scale,
            B_scale=self.b.get(f"{name}_scales"),
            B_zp=None,
            use_fp8_w8a8=quantised,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            config=self.tiles(),
            per_act_token_quant=self.per_token,
            block_shape=self.block,
        )
        return out

    def tiles(self) -> dict[str, int]:
        """The library's own choice for these shapes."""
        shape, dtype = self.case.shape, "fp8_w8a8" if self.case.recipe.acts.startswith("fp8") else None
        chosen: dict[str, int] = self.library[TILES](
            self.b["w13"].shape, self.b["w2"].shape, shape.top_k, dtype, shape.tokens, block_shape=self.block
        )
        return chosen


def prepare(case: Case, inputs: Inputs) -> Launch:
    """w13 [experts, 2 * inter, hidden], w2 [experts, hidden, inter]; scales as fused_experts takes them."""
    w13, w2 = pack(case, inputs, one_factor=True)
    scheme = FP8.get(str(case.recipe))
    first, second = _vllm.ordered(case, w13.data), w2.data
    buffers = _vllm.step(inputs)
    block, per_token = None, False
    if scheme is not None:
        first, second = first.view(torch.float8_e4m3fn), second.view(torch.float8_e4m3fn)
        block = [128, 128] if "block_shape" in scheme.options else None
        per_token = "per_act_token_quant" in scheme.options
        scales = scheme.scales(w13)
        buffers["w13_scales"] = _vllm.ordered(case, scales) if per_token else scales
        buffers |= {"w2_scales": scheme.scales(w2), **_vllm.static_scales(inputs)}
    buffers |= {"w13": first, "w2": second}
    library = {name: _vllm.library(name) for name in (ENTRY, TILES, QUANTISE, ACTIVATE, COMPUTE[_vllm.carrier(case)])}
    library[_vllm.ACTIVATION] = _vllm.activation(case)
    call: Callable[[], Tensor] = Layer(case, buffers, library, block, per_token)
    return Launch(call, buffers, contract=_vllm.contract(case))


BACKENDS = (
    Backend(
        name="vllm_batched",
        library="vllm",
        deterministic=True,
        recipes=RECIPES,
        activations=tuple(_vllm.ACTIVATIONS),
        archs=("sm90", "sm100", "sm103", "sm120"),
        rounding=rounding,
        probe=_vllm.needs(ENTRY, TILES, QUANTISE, ACTIVATE),
        limits=(_vllm.SOME_TOKENS, Limit(("recipe", "activation"), interleaved_blocks)),
        prepare=prepare,
        activation_format="batched",
        exempt={"duplicate_expert": "a slab has room for each token once"},
        entries=(ENTRY, TILES, QUANTISE, ACTIVATE),
        summary="vLLM's batched Triton experts, bf16, fp16 and FP8, on slabs and masked_m",
    ),
)
