"""The vLLM adapters that sort tokens themselves, judged whole on the CPU: torch stands where the library's kernels do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.backends import _vllm, discover, torch_scaled_grouped_mm, vllm_batched, vllm_deepgemm
from harness.backends.base import CPU, Backend, always
from harness.case import Case
from harness.entry import Function, planted
from harness.pipeline import Options, run
from harness.verdict import Status
from reference.formats import get

CASE = "moe.{}.t{}.h128.i128.e5.k2.renormalize.swiglu.{}.{}.s0"


def quantised(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """E4M3 codes and float32 scales of x [rows, columns]."""
    q = get(rule).encode(x.float())
    assert q.scales is not None
    return q.codes.view(torch.float8_e4m3fn), q.scales


def quantise(x: Tensor, scale: Tensor | None, dtype: object, per_token: bool, block: object) -> tuple[Tensor, Tensor | None]:
    if dtype is None:
        return x, None
    if scale is not None:
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    return quantised(x, "fp8_token:vllm" if per_token else "fp8_group:vllm_ue8m0")


def activate(kind: object, out: Tensor, pre: Tensor) -> None:
    gate, up = pre.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate.float()).to(pre.dtype) * up)


def dense(codes: Tensor, scales: Tensor | None) -> Tensor:
    """float32 from codes [.., rows, columns] and scales of blocks, rows or the whole."""
    if scales is None or scales.numel() == 1:
        return codes.float() * (1.0 if scales is None else scales.flatten())
    for axis in (-2, -1):
        if scales.shape[axis] > 1:
            scales = scales.repeat_interleave(-(-codes.shape[axis] // scales.shape[axis]), axis)
    return codes.float() * scales


def batched(**a: Any) -> None:
    """Rows that are not live stay as they were."""
    scale = a["A_scale"]
    for expert, count in enumerate(a["expert_num_tokens"].tolist()):
        mine = scale if scale is None or scale.numel() == 1 else scale[expert, :count]
        weight = None if a["B_scale"] is None else a["B_scale"][expert]
        rows = dense(a["A"][expert, :count], mine)
        a["C"][expert, :count] = (rows @ dense(a["B"][expert], weight).T).to(a["C"].dtype)


def masked(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], out: Tensor, counts: Tensor, m: int, **_: object) -> None:
    for expert, count in enumerate(counts.tolist()):
        rows = dense(x[0][expert, :count], x[1][expert, :count])
        out[expert, :count] = (rows @ dense(w[0][expert], w[1][expert]).T).to(out.dtype)


def contiguous(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], out: Tensor, owner: Tensor, **_: object) -> None:
    assert all(len(set(block[block >= 0].tolist())) <= 1 for block in owner.view(-1, 128))
    for expert in range(len(w[0])):
        mine = owner == expert
        out[mine] = (dense(x[0][mine], x[1][mine]) @ dense(w[0][expert], w[1][expert]).T).to(out.dtype)


FUNCTIONS: dict[str, Function] = {
    vllm_batched.ENTRY: batched,
    vllm_batched.TILES: lambda *a, **k: {},
    vllm_batched.QUANTISE: quantise,
    vllm_batched.ACTIVATE: activate,
    vllm_deepgemm.MASKED: masked,
    vllm_deepgemm.CONTIGUOUS: contiguous,
    vllm_deepgemm.QUANTISE: lambda x, group, use_ue8m0: quantised(x, "fp8_group:vllm"),
    _vllm.ACTIVATION: SimpleNamespace(SILU=None),  # type: ignore[dict-item]
    "triton.language.bfloat16": None,  # type: ignore[dict-item]
    "triton.language.float16": None,  # type: ignore[dict-item]
}
BATCHED = ("bf16", "fp16", "fp8_tensor-fp8_tensor", "fp8_channel-fp8_token", "fp8_block-fp8_group")
ASKED = [("vllm_batched", recipe) for recipe in BATCHED]
ASKED += [("vllm_deepgemm", "fp8_block-fp8_group"), ("vllm_deepgemm_masked", "fp8_block-fp8_group")]


@pytest.mark.parametrize(("fill", "tokens"), [("real", 33), ("exact", 1)])
@pytest.mark.parametrize(("name", "recipe"), ASKED)
def test_an_adapter_over_right_kernels_passes_every_relation(name: str, recipe: str, fill: str, tokens: int) -> None:
    """A scale of another row, a slab read beyond its count, a step's data read once: the library gets the blame for them."""
    found = discover()[name]
    backend = planted(replace(found, archs=("cpu",), probe=always), f"{name}_torch", FUNCTIONS)
    judged(backend, CASE.format(recipe, tokens, found.activation_format, fill))


def judged(backend: Backend, case_id: str) -> None:
    verdict = run(Case.parse(case_id), backend, CPU, options=Options(repeats=2))
    assert verdict.status is Status.PASSED, verdict.reason


def grouped(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor) -> Tensor:
    """torch._scaled_grouped_mm: rows beyond the last group are not written."""
    out = torch.empty(len(mat_a), mat_b.shape[2], dtype=torch.bfloat16)
    for expert, (first, last) in enumerate(itertools.pairwise([0, *offs.tolist()])):
        rows = mat_a[first:last].float() * scale_a[first:last, None]
        out[first:last] = (rows @ (mat_b[expert].float() * scale_b[expert])).to(torch.bfloat16)
    return out


@pytest.mark.parametrize("activation", ["swiglu", "silu"])
@pytest.mark.parametrize("fill", ["real", "exact"])
def test_torch_scaled_grouped_mm_too(monkeypatch: pytest.MonkeyPatch, fill: str, activation: str) -> None:
    monkeypatch.setattr(torch_scaled_grouped_mm, "_scaled_grouped_mm", grouped)
    (backend,) = torch_scaled_grouped_mm.BACKENDS
    case = CASE.format("fp8_channel-fp8_token", 9, "standard", fill).replace("swiglu", activation)
    judged(replace(backend, archs=("cpu",)), case)
