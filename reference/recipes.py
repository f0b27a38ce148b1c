"""Where the libraries round between the GEMMs, one recipe per row, as data. Run the layer as any of them, or ideally.

Source: the table "where intermediates are rounded or quantised", compiled from FlashInfer 0.7.2.post1 (csrc/fused_moe,
fused_moe/core.py), vLLM 0.33.0 (model_executor/layers/fused_moe) and triton_kernels; each row names its file.
"""

from __future__ import annotations

from dataclasses import dataclass

from reference.rounding import Rounding


@dataclass(frozen=True)
class RoundingRecipe:
    """A library's path through the layer. `notes` says what the rounding points cannot."""

    name: str
    rounding: Rounding
    source: str
    notes: str = ""


_CUTLASS = "FlashInfer csrc/fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh"
_TRTLLM = "FlashInfer fused_moe/core.py, trtllm-gen runner"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        RoundingRecipe(
            "flashinfer_cutlass_bf16",
            Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16"),
            _CUTLASS,
            "alpha in the epilogue, activation and finalize in fp32",
        ),
        RoundingRecipe(
            "flashinfer_cutlass_nvfp4",
            Rounding(x="nvfp4", gate_up="bf16", middle="bf16>nvfp4", row="bf16", out="bf16"),
            _CUTLASS,
            "the global scale of GEMM 2's input is static (fc2_act_global) in the library",
        ),
        RoundingRecipe(
            "flashinfer_cutlass_mxfp8",
            Rounding(x="mxfp8", gate_up="bf16", middle="bf16>mxfp8", row="bf16", out="bf16"),
            _CUTLASS,
        ),
        RoundingRecipe(
            "flashinfer_cutlass_fp8",
            Rounding(x="fp8_tensor", gate_up="bf16", middle="fp8_tensor", row="bf16", out="bf16"),
            _CUTLASS,
            "fp32 activation times fc2_act_mult goes to E4M3 without a stop in bf16",
        ),
        RoundingRecipe(
            "flashinfer_cutlass_mxfp4_bf16",
            Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16"),
            _CUTLASS,
            "SM90 mixed-input GEMM: weights MXFP4, measured mean z^2 0.97 to 1.00 on an H200",
        ),
        RoundingRecipe(
            "flashinfer_trtllm_fp4",
            Rounding(x="nvfp4", middle="bf16>nvfp4", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
            "activation in the epilogue of GEMM 1 on the fp32 accumulator",
        ),
        RoundingRecipe(
            "flashinfer_trtllm_mxfp4_mxfp8",
            Rounding(x="mxfp8", middle="mxfp8", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
        ),
        RoundingRecipe(
            "flashinfer_trtllm_bf16",
            Rounding(middle="bf16", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
            "also MXFP4 x bf16 and MXINT4 weights",
        ),
        RoundingRecipe(
            "flashinfer_trtllm_nvfp4_per_token",
            Rounding(x="nvfp4_token", gate_up="bf16", middle="nvfp4_token", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
        ),
        RoundingRecipe(
            "flashinfer_trtllm_fp8_per_channel",
            Rounding(x="fp8_token", gate_up="bf16", middle="fp8_token", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
        ),
        RoundingRecipe(
            "flashinfer_trtllm_deepseek_fp8",
            Rounding(x="fp8_group", gate_up="fp8_group", middle="fp8_group", row="bf16", routing_weight="bf16", out="bf16"),
            _TRTLLM,
            "quantised before the activation: E4M3 with one fp32 scale per 128",
        ),
        RoundingRecipe(
            "flashinfer_act_and_quantize",
            Rounding(gate_up="bf16", middle="bf16>nvfp4", row="bf16", out="bf16"),
            "FlashInfer activation.py, silu_and_mul_*quantize",
        ),
        RoundingRecipe(
            "flashinfer_cute_dsl_nvfp4",
            Rounding(x="nvfp4", middle="bf16>nvfp4", row="bf16", out="bf16"),
            "FlashInfer cute_dsl fused MoE, fc2_input_scale",
        ),
        RoundingRecipe(
            "flashinfer_b12x_mxfp4",
            Rounding(x="mxfp4", middle="mxfp4", row="bf16", out="bf16"),
            "FlashInfer b12x MXFP4 W4A4: inputs quantised before FC1 and FC2",
        ),
        RoundingRecipe(
            "vllm_triton_bf16",
            Rounding(gate_up="bf16", activated="bf16", middle="bf16", weighted="bf16", partial="bf16", out="bf16"),
            "vLLM fused_moe.py: fp32 accumulators, silu rounded before the multiply, top-k sum in the output dtype",
            "the routing weight multiplies inside GEMM 2's epilogue",
        ),
        RoundingRecipe(
            "triton_kernels_bf16",
            Rounding(middle="bf16", row="bf16", out="bf16"),
            "triton_kernels matmul with the fused swiglu epilogue, reduction in fp32",
        ),
        RoundingRecipe(
            "torch_eager_bf16",
            Rounding(gate_up="bf16", middle="bf16", row="bf16", out="bf16"),
            "harness/backends/torch_grouped_mm.py; measured mean z^2 0.99 to 1.01 on an H200",
        ),
    )
}
