"""Twins of FlashInfer's CUTLASS fused MoE and of the layout helpers of its SM90 mixed-input GEMMs, release 0.7.2.post1."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from harness.twins.libs._cutlass_modes import HALVES, Call, Mode, mode_of
from harness.twins.libs._flashinfer_layer import GATED, activate, check, dense, expert_rows, finalize
from harness.twins.libs.flashinfer_enums import ActivationType
from reference.layouts import sm90_weight_fp4, sm90_weight_fp4_fp8, sm90_weight_int4
from reference.layouts.sm90_scale_fold import scale_fold


def cutlass_fused_moe(  # noqa: PLR0913  the library's signature
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: ActivationType = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: list[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    clamped_relu2_limit: Tensor | None = None,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
    backend: str = "cutlass",
) -> list[Tensor]:
    """input [tokens, hidden], ids int32 and scales float32 [tokens, top_k], fc1 [experts of the rank, (2 *) inter, hidden] with
    the gate's rows below, fc2 [.., hidden, inter]: [output [tokens, hidden], and three tensors that nobody writes].

    No stride is looked at. ValueError and NotImplementedError as the Python function raises them, RuntimeError for a check of
    the binding. The finalize is the unfused one of the default tactics. Not twinned: Humming, cake, ClampedRelu2.
    """
    return _run(SimpleNamespace(**locals()))


def read_call(a: SimpleNamespace) -> tuple[Mode, ActivationType, dict[str, Tensor]]:
    """(how the buffers of the call with the arguments `a` are read, its activation, that one's parameters by expert), checked
    as the library checks them."""
    _refuse(a)
    kind, values = _activation(a)
    mode = mode_of(
        Call(
            input=a.input,
            input_sf=a.input_sf,
            swizzled=a.swizzled_input_sf,
            w=(a.fc1_expert_weights, a.fc2_expert_weights),
            scales=list(a.quant_scales),
            out=a.output_dtype,
            gated=kind in GATED,
            fp8_block=a.use_deepseek_fp8_block_scale,
            w4_group=a.use_w4_group_scaling,
            mxfp8_act=a.use_mxfp8_act_scaling,
            packed=a.use_packed_weights,
        )
    )
    _check(mode, a.token_selected_experts, a.token_final_scales, values)
    _check_biases(mode, a.fc1_expert_biases, a.fc2_expert_biases)
    mode.check()
    return mode, kind, values


def _run(a: SimpleNamespace) -> list[Tensor]:
    """The call with the arguments `a`."""
    output = _output(a.output, (a.input.shape[0], a.fc2_expert_weights.shape[1]), a.output_dtype)
    mode, kind, values = read_call(a)
    local = range(a.ep_rank * mode.experts, (a.ep_rank + 1) * mode.experts)
    run = Run(mode, kind, values, local, (a.fc1_expert_biases, a.fc2_expert_biases))
    run(output, dense(a.token_selected_experts), dense(a.token_final_scales), a.ep_size)
    one, each = torch.empty(1, dtype=torch.int32), torch.empty(mode.experts, dtype=torch.int32)
    return [output, one, torch.empty(mode.experts, a.input.shape[0]), each]


def _refuse(a: SimpleNamespace) -> None:
    """What the Python function refuses, and what has no twin."""
    untwinned = {
        f"backend={a.backend!r}": a.backend != "cutlass",
        "Humming": a.use_wfp4afp8_humming,
        "ClampedRelu2": a.clamped_relu2_limit is not None or a.activation_type == ActivationType.ClampedRelu2,
    }
    for name, given in untwinned.items():
        if given:
            raise NotImplementedError(f"cutlass_fused_moe has no twin for {name}")
    if a.min_latency_mode:
        raise NotImplementedError("min latency mode not yet implemented for Blackwell.")
    if a.profile_ids is not None and len(a.profile_ids) != 2:
        raise ValueError("profile_ids must contain [gemm1_profile, gemm2_profile]")


def _activation(a: SimpleNamespace) -> tuple[ActivationType, dict[str, Tensor]]:
    """The kernel's activation and its parameters by expert: any of the SwiGLU ones makes Swiglu SwigluBias."""
    kind = ActivationType(a.activation_type)
    values = {"alpha": a.swiglu_alpha, "beta": a.swiglu_beta, "limit": a.swiglu_limit}
    if kind == ActivationType.Swiglu and any(v is not None for v in values.values()):
        kind = ActivationType.SwigluBias
    if kind == ActivationType.Situ:
        values = {"beta": a.situ_beta, "linear_beta": a.situ_linear_beta}
    return kind, {name: v for name, v in values.items() if v is not None}


def _output(output: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The caller's, if it has this shape and dtype, or a new one."""
    if dtype not in HALVES:
        raise NotImplementedError(f"Outputting {dtype} directly is not currently supported")
    if output is None:
        return torch.empty(shape, dtype=dtype)
    if output.shape != shape:
        raise ValueError(f"Invalid shape of output: expected {shape}, got {output.shape}")
    if output.dtype != dtype:
        raise ValueError(f"Invalid dtype of output: expected {dtype}, got {output.dtype}")
    return output


def _check(mode: Mode, ids: Tensor, weights: Tensor, values: dict[str, Tensor]) -> None:
    """What runMoe checks of every mode: dtypes, ranks and sizes; no strides, no range of ids."""
    tokens, (fc1, fc2) = mode.call.input, mode.call.w
    check(ids.dtype == torch.int32, "Inconsistency of Tensor type: token_selected_experts")
    check(weights.dtype == torch.float32, "Inconsistency of Tensor type: token_final_scales.value()")
    check(fc1.dtype == fc2.dtype, "Inconsistency of Tensor type: fc2_expert_weights")
    ranks = (
        ("input", tokens, 2),
        ("token_selected_experts", ids, 2),
        ("fc1_expert_weights", fc1, 3),
        ("fc2_expert_weights", fc2, 3),
    )
    for name, tensor, rank in ranks:
        check(tensor.dim() == rank, f"{name} must be a {rank}D tensor")
    check(len(tokens) == len(ids), "input and token_selected_experts must have the same num tokens.")
    check(
        ids.shape == weights.shape,
        "token_selected_experts and token_final_scales must have the same number of experts per token.",
    )
    check(len(fc1) == len(fc2), "fc1_expert_weights and fc2_expert_weights must have the same number of experts.")
    times = "2 times" if mode.call.gated else "equal to"
    check(fc1.shape[1] == mode.sizes[0][0], f"fc1_expert_weights inter size must be {times} fc2_expert_weights inter size.")
    for name, value in values.items():
        check(value.dtype == torch.float32 and value.shape == (mode.experts,), f"{name} must have {mode.experts} element(s).")


def _check_biases(mode: Mode, fc1: Tensor | None, fc2: Tensor | None) -> None:
    """Both or none, in the type of the output, a row each for an expert."""
    if fc1 is None and fc2 is None:
        return
    for name, bias, weights in (("fc1", fc1, mode.call.w[0]), ("fc2", fc2, mode.call.w[1])):
        if bias is None:
            raise RuntimeError("bad optional access")  # .value() of what was not given
        check(bias.dtype == mode.call.out, f"Inconsistency of Tensor type: {name}_expert_biases.value()")
        check(bias.dim() == 2, f"{name}_expert_biases.value() must be a 2D tensor")
        same = f"{name}_expert_weights and {name}_expert_biases must have the same number of experts."
        check(len(bias) == len(weights), same)
        check(bias.shape[1] == weights.shape[1], f"{name}_expert_biases should match {name}_expert_weights output shape.")


Biases = tuple[Tensor | None, Tensor | None]


class Run:
    """One call's kernels: GEMM 1 to memory, activation, GEMM 2 to memory, finalize; the second and the last add biases."""

    def __init__(
        self, mode: Mode, kind: ActivationType, values: dict[str, Tensor], local: range, biases: Biases = (None, None)
    ) -> None:
        self.mode, self.kind, self.values, self.local, self.biases = mode, kind, values, local, biases

    def __call__(self, output: Tensor, ids: Tensor, weights: Tensor, ep_size: int) -> None:
        """Write the layer's output, row after row from the buffer's address on."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < ep_size * self.mode.experts:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")  # vllm#37758: ids are not checked
        x = self.mode.x()
        rows = expert_rows(ids, self.local, self.mode.hidden, lambda expert, tokens: self.expert(x[tokens], expert))
        dense(output).copy_(finalize(rows, ids, weights, self.local))

    def expert(self, x: Tensor, expert: int) -> Tensor:
        """float32 [rows, hidden]: one expert's rows."""
        mode, out = self.mode, self.mode.call.out
        pre = (x @ mode.weight(0, expert).T * mode.alpha(0, expert)).to(out).float() + self.bias(0, expert)
        up, gate = pre.chunk(2, dim=-1) if mode.call.gated else (pre, None)
        middle = activate(self.kind, up, gate, {name: value[expert] for name, value in self.values.items()})
        row = mode.middle(middle, expert) @ mode.weight(1, expert).T * mode.alpha(1, expert)
        return row.to(out).float() + self.bias(1, expert)

    def bias(self, gemm: int, expert: int) -> Tensor:
        """float32, what is added to a row of GEMM 1 or 2."""
        bias = self.biases[gemm]
        return torch.zeros(()) if bias is None else dense(bias)[expert].float()


def interleave_moe_weights_for_sm90_mixed_gemm(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """uint8 [experts, rows, K / 2] -> the same shape, nibbles where the SM90 mixed-input GEMM of "fp4", "fp4_fp8" or "int4"
    reads them. A copy on a GPU, where the library wants the tensor to be; ValueError and RuntimeError as there."""
    if weight.dim() != 3:
        raise ValueError(f"weight must be 3D (num_experts, n, k/2); got shape {tuple(weight.shape)}")
    if weight.dtype != torch.uint8:
        raise ValueError(f"weight must be uint8 (packed 4-bit); got {weight.dtype}")
    layouts = {"fp4": sm90_weight_fp4, "fp4_fp8": sm90_weight_fp4_fp8, "int4": sm90_weight_int4}
    if quant_type not in layouts:
        raise ValueError(f"quant_type must be one of {list(layouts)}; got {quant_type!r}")
    check(weight.shape[1] % 16 == 0, "weight n dimension must be divisible by 16 for SM90 mixed-gemm interleave")
    check(weight.shape[2] % 32 == 0, "logical K dimension must be divisible by 64 for SM90 mixed-gemm interleave")
    layout = layouts[quant_type].LAYOUTS[0]
    return torch.stack([layout.pack(one) for one in weight]).view(weight.shape)


def interleave_moe_scales_for_sm90_mixed_gemm(scales: Tensor, group_size: int = 32) -> Tensor:
    """[experts, rows, K / group_size] -> [experts, rows / 64, K / 128, m, 16 bytes of scales]; ValueError as the library."""
    if scales.dim() != 3:
        raise ValueError(f"scales must be 3D (num_experts, rows, K/group_size); got {tuple(scales.shape)}")
    if group_size <= 0 or 128 % group_size:
        raise ValueError(f"group_size={group_size} must be positive and divide 128")
    per_block, columns = 128 // group_size, 16 // scales.element_size()
    if columns % per_block:
        raise ValueError(f"scale dtype {scales.dtype} and group_size={group_size} do not form an integer folded M slice")
    if scales.shape[1] % 64:
        raise ValueError(f"scale rows={scales.shape[1]} must be divisible by 64")
    if scales.shape[2] % per_block:
        raise ValueError(f"K/group_size={scales.shape[2]} must be divisible by scale groups per K128 block {per_block}")
    layout = scale_fold(group_size, scales.element_size())
    return torch.stack([layout.pack(one) for one in scales])


ENTRIES = {
    "flashinfer.fused_moe.cutlass_fused_moe": cutlass_fused_moe,
    "flashinfer.fused_moe.interleave_moe_weights_for_sm90_mixed_gemm": interleave_moe_weights_for_sm90_mixed_gemm,
    "flashinfer.fused_moe.interleave_moe_scales_for_sm90_mixed_gemm": interleave_moe_scales_for_sm90_mixed_gemm,
}
