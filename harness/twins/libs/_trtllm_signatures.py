"""The signatures of FlashInfer 0.7.2.post1's trtllm_*_moe (flashinfer/fused_moe/core.py), name by name."""

from __future__ import annotations

_SHAPE = "num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts"
_ROUTED_SCALE = "routed_scaling_factor, routing_method_type=0"
_BF16 = f"""hidden_states, gemm1_weights, gemm2_weights, {_SHAPE}, routed_scaling_factor=None, routing_method_type=0,
use_shuffled_weight=True, weight_layout=WeightLayout.BlockMajorK, do_finalize=True, enable_pdl=True"""
_LIMITS = "gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None"
_SWIGLU = "activation_type=ActivationType.Swiglu.value"
_TUNE = "tune_max_num_tokens=8192"
_VALID = "valid_hidden_size=None, valid_intermediate_size=None"
_FP8 = f"""routing_bias, hidden_states, gemm1_weights, output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights,
output2_scales_scalar, {_SHAPE}, routed_scaling_factor, use_routing_scales_on_input, routing_method_type=0, do_finalize=True,
enable_pdl=None, {_TUNE}, {_SWIGLU}"""
_FP8_BLOCK = f"""routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights,
gemm2_weights_scale, {_SHAPE}, {_ROUTED_SCALE}, use_shuffled_weight=False, weight_layout=0, do_finalize=True, enable_pdl=None"""
_FP8_TYPE = "fp8_quantization_type=Fp8QuantizationType.DeepSeekFp8"
_FP4 = f"""routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm1_alpha,
gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, output1_scale_scalar, output1_scale_gate_scalar,
output2_scale_scalar, {_SHAPE}, {_ROUTED_SCALE}, do_finalize=True, enable_pdl=None, {_SWIGLU}, per_token_scale=None,
output=None, {_TUNE}"""
_INT4 = f"""hidden_states, gemm1_weights, gemm1_weights_scale, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights,
gemm2_weights_scale, {_SHAPE}, {_ROUTED_SCALE}"""

SIGNATURES = {
    "trtllm_bf16_moe": f"""routing_logits, routing_bias, {_BF16}, {_TUNE}, {_SWIGLU}, norm_topk_prob=True,
routing_replay_out=None, {_LIMITS}, output=None""",
    "trtllm_bf16_routed_moe": f"""topk_ids, {_BF16}, gemm1_lora_delta=None, {_TUNE}, {_SWIGLU}, routing_replay_out=None,
{_LIMITS}, output=None""",
    "trtllm_fp8_per_tensor_scale_moe": f"""routing_logits, {_FP8}, norm_topk_prob=True, routing_replay_out=None, output=None,
gemm1_clamp_limit=None""",
    "trtllm_fp8_per_tensor_scale_routed_moe": f"topk_ids, {_FP8}, routing_replay_out=None, output=None, gemm1_clamp_limit=None",
    "trtllm_fp8_block_scale_moe": f"""routing_logits, {_FP8_BLOCK}, {_TUNE}, {_FP8_TYPE}, num_fused_shared_experts=None,
{_SWIGLU}, norm_topk_prob=True, routing_replay_out=None, {_LIMITS}, output=None, {_VALID}, *, gemm1_bias=None,
gemm2_bias=None""",
    "trtllm_fp8_block_scale_routed_moe": f"""topk_ids, {_FP8_BLOCK}, gemm1_lora_delta=None, output=None, {_TUNE}, {_FP8_TYPE},
{_SWIGLU}, {_LIMITS}, {_VALID}""",
    "trtllm_fp4_block_scale_moe": f"""routing_logits, {_FP4}, norm_topk_prob=True, routing_replay_out=None,
num_fused_shared_experts=None, {_VALID}, hidden_states_scale_layout=None""",
    "trtllm_fp4_block_scale_routed_moe": f"""topk_ids, {_FP4}, gemm1_lora_delta=None, {_VALID}, num_fused_shared_experts=None,
hidden_states_scale_layout=None""",
    "trtllm_mxint4_block_scale_moe": f"""routing_logits, routing_bias, {_INT4}, do_finalize=True, enable_pdl=None, output=None,
{_TUNE}, norm_topk_prob=True, routing_replay_out=None, {_VALID}""",
    "trtllm_mxint4_block_scale_routed_moe": f"""topk_ids, {_INT4}, do_finalize=True, enable_pdl=None, gemm1_lora_delta=None,
output=None, {_TUNE}, {_VALID}""",
}
