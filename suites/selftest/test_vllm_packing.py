"""The vLLM backends' packing where no vLLM is: its helpers are replaced by the layouts that witness them, and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.backends import discover
from harness.backends._packing import pack
from harness.backends._slabs import Places, in_blocks, in_slabs
from harness.backends._vllm import expert_map, ordered
from harness.backends.base import CPU, Device, Launch, always
from harness.backends.vllm_marlin import FP4, FP8_BIAS, KINDS, PERMUTE, PERMUTE_BIAS, REPACK, TYPES, lifted, rounding
from harness.case import Case
from harness.entry import planting
from harness.inputs import Inputs, make_inputs
from harness.pipeline import run
from harness.variants import shards
from harness.verdict import Status
from reference.activation import split_halves
from reference.formats import get
from reference.layouts import get as layout
from reference.layouts.linear import unpack_nibbles

CASE = "moe.{recipe}.t3.h{hidden}.i{inter}.e4.k2.renormalize.{activation}.standard.{fill}.s1"


class Any:
    """An enum or a module of constants, whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return self


def repack(b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool) -> Tensor:
    codes = b_q_weight.T.contiguous().view(torch.uint8)
    assert codes.shape == (size_n, size_k * num_bits // 8)
    return layout("marlin_weight_a16").pack(codes).view(torch.int32)


def permute(s: Tensor, size_k: int, size_n: int, group_size: int) -> Tensor:
    assert s.shape == (size_k // group_size if group_size > 0 else 1, size_n)
    return layout("marlin_scale_grouped" if 0 < group_size < size_k else "marlin_scale_single").pack(s.T.contiguous())


def permute_bias(s: Tensor) -> Tensor:
    return layout("marlin_scale_single").pack(s.unsqueeze(-1)).view(s.shape)


HELPERS = {
    REPACK: repack,
    PERMUTE: permute,
    PERMUTE_BIAS: permute_bias,
    TYPES: Any(),
    FP8_BIAS: lambda s: s,
    f"{FP4}._nvfp4_compute_scale_factor": lambda scales, dtype: 2.0,
    f"{FP4}.nvfp4_marlin_process_scales": lambda s, scale_factor, a_dtype: (s * scale_factor, scale_factor),
    f"{FP4}.mxfp4_marlin_process_scales": lambda s: s,
    f"{FP4}.nvfp4_marlin_process_global_scale": lambda scale, dtype: scale,
    "vllm.model_executor.layers.fused_moe.activation.MoEActivation": Any(),
    "vllm.model_executor.layers.fused_moe.experts.marlin_moe.fused_marlin_moe": lambda *a, **k: None,
}


@pytest.fixture(autouse=True)
def helpers() -> Iterator[None]:
    with planting(HELPERS):
        yield


def prepared(name: str, case: Case) -> tuple[Launch, Inputs]:
    inputs = make_inputs(case)
    return discover()[name].prepare(case, inputs), inputs


def read_back(case: Case, b: dict[str, Tensor], name: str, expert: int) -> Tensor:
    """float64 [N, K]: what Marlin multiplies by, padding included."""
    weights, kind = case.recipe.weights, KINDS[case.recipe.weights]
    columns = b[name].shape[1] * 16
    scales = b[f"{name}_scales"][expert]
    codes = unpack_nibbles(
        layout("marlin_weight_a16").unpack(b[name][expert].view(torch.uint8), (scales.shape[1], columns // 2))
    )
    how = "marlin_scale_grouped" if kind.group < columns else "marlin_scale_single"
    factors = layout(how).unpack(scales, (scales.shape[1], columns // kind.group)).double()
    values = get(weights).element.decode(codes) if "fp4" in weights else codes.double() - 8
    one = b[f"{name}_global"][expert].double() if weights == "nvfp4" else 1.0
    return values * factors.repeat_interleave(kind.group, 1) * one


CASES = [
    ("vllm_marlin_nvfp4", "nvfp4", 128, 96, "swiglu", "real"),
    ("vllm_marlin_nvfp4", "nvfp4", 192, 96, "swiglu_oai", "real"),
    ("vllm_marlin_nvfp4", "nvfp4", 128, 64, "silu", "exact"),
    ("vllm_marlin_mxfp4", "mxfp4", 128, 96, "silu", "real"),
    ("vllm_marlin_mxfp4", "mxfp4", 192, 32, "swiglu", "exact"),
    ("vllm_marlin_int4", "int4_g32-fp16", 128, 96, "swiglu", "real"),
    ("vllm_marlin_int4", "int4_g128-fp16", 128, 128, "swiglu_oai", "real"),
    ("vllm_marlin_int4", "mxint4", 256, 64, "geglu", "exact"),
]


@pytest.mark.parametrize(("backend", "recipe", "hidden", "inter", "activation", "fill"), CASES)
def test_marlin_reads_the_weights_that_were_drawn(
    backend: str, recipe: str, hidden: int, inter: int, activation: str, fill: str
) -> None:
    """A padded half, a pair of nibbles in the wrong order, a factor that was dropped: all give a tensor of the right shape."""
    case = Case.parse(CASE.format(recipe=recipe, hidden=hidden, inter=inter, activation=activation, fill=fill))
    launch, inputs = prepared(backend, case)
    for expert in range(case.shape.experts):
        down = read_back(case, dict(launch.buffers), "w2", expert)
        wanted = inputs.down(expert)
        assert close(down[:, :inter], wanted.format.decode(wanted))
        assert not down[:, inter:].any()
        halves = read_back(case, dict(launch.buffers), "w13", expert)
        gate, up = inputs.gate_up(expert)
        parts = (halves,) if up is None else split_halves(halves, "interleaved" if "oai" in activation else "gate_up", 0)
        for part, q in zip(parts, (gate, up), strict=False):
            assert q is not None
            assert close(part[:inter], q.format.decode(q))
            assert not part[inter:].any()


@pytest.mark.parametrize(
    ("backend", "recipe", "hidden", "inter", "activation", "fill"),
    [*CASES, ("vllm_marlin_fp8", "fp8_channel", 128, 64, "swiglu", "exact")],
)
def test_marlin_reads_biases_with_the_rows_of_their_weights(
    backend: str, recipe: str, hidden: int, inter: int, activation: str, fill: str
) -> None:
    """Columns 2 i + b + 8 a of 32 lie together, padding of either half included; in the dtype of x, where the kernel adds."""
    text = CASE.format(recipe=recipe, hidden=hidden, inter=inter, activation=activation, fill=fill)
    launch, inputs = prepared(backend, Case.parse(text.replace(".s1", ".bias.s1")))
    first, second = (
        layout("marlin_scale_single").unpack(launch.buffers[name][2].unsqueeze(0), (launch.buffers[name].shape[1], 1)).flatten()
        for name in ("w13_bias", "w2_bias")
    )
    assert first.dtype == second.dtype == inputs.x.dtype
    assert torch.equal(second.float(), inputs.down_bias(2))  # type: ignore[arg-type]
    gate, up = inputs.gate_up_bias(2)
    rows = first.unsqueeze(-1).float()
    parts = (rows,) if up is None else split_halves(rows, "interleaved" if "oai" in activation else "gate_up", 0)
    for part, bias in zip(parts, (gate, up), strict=False):
        assert torch.equal(part[:inter, 0], bias)  # type: ignore[arg-type]
        assert not part[inter:].any()


def test_marlin_is_handed_its_biases_and_adds_them_to_what_it_rounded() -> None:
    handed: list[tuple[object, ...]] = []
    entry = "vllm.model_executor.layers.fused_moe.experts.marlin_moe.fused_marlin_moe"
    case = Case.parse(CASE.format(recipe="mxfp4", hidden=128, inter=64, activation="swiglu", fill="real"))
    for asked in (case, case.vary(bias="bias")):
        with planting({entry: lambda *a, **k: handed.append(a)}):
            launch, _ = prepared("vllm_marlin_mxfp4", asked)
            launch.call()
        assert handed[-1][3:5] == (launch.buffers.get("w13_bias"), launch.buffers.get("w2_bias"))
    assert handed[0][3] is None
    assert handed[1][3] is not None
    assert [rounding(asked).product for asked in (case, case.vary(bias="bias"))] == [None, "bf16"]
    assert "w13_bias" in str(discover()["vllm_marlin_mxfp4"].script(case))  # type: ignore[misc]


def marlin(case: Case, as_written: bool) -> Callable[..., Tensor]:
    """fused_marlin_moe of swiglu from the physical buffers, rounding where write_result of marlin_template.h does. as_written:
    of NVFP4 the number that multiplies GEMM 2's sums with the routing weight multiplies their biases too."""

    def experts(x: Tensor, *tensors: Tensor, **named: Tensor | None) -> Tensor:
        w13, w2, first, second, s13, s2, weights, ids = tensors
        b = {"w13": w13, "w2": w2, "w13_scales": s13, "w2_scales": s2}
        b |= {f"w{n}_global": g for n, g in ((13, named["global_scale1"]), (2, named["global_scale2"])) if g is not None}
        biases = {name: layout("marlin_scale_single").unpack(t, t.T.shape).T for name, t in ((13, first), (2, second))}
        expert_map = named["expert_map"]
        rows = torch.zeros(*ids.shape, x.shape[1], dtype=x.dtype)
        for t, k in torch.ones_like(ids).nonzero().tolist():
            e = int(ids[t, k] if expert_map is None else expert_map[ids[t, k].long()])
            if e < 0:
                continue
            pre = (read_back(case, b, "w13", e) @ x[t].double()).to(x.dtype) + biases[13][e]
            gate, up = pre.chunk(2)
            total = read_back(case, b, "w2", e) @ (torch.nn.functional.silu(gate) * up).double()
            scale = b["w2_global"][e].double() if as_written else 1.0
            row = (total / scale).to(x.dtype) + biases[2][e]
            rows[t, k] = row * (weights[t, k] * scale).to(x.dtype)
        return rows.float().sum(1).to(x.dtype)

    return experts


@pytest.mark.parametrize(
    ("recipe", "fill"), [("nvfp4", "real"), ("nvfp4", "exact"), ("mxfp4", "real"), ("int4_g32-fp16", "real")]
)
def test_marlins_adapter_passes_with_biases_and_the_kernel_as_it_is_written_does_not(recipe: str, fill: str) -> None:
    text = CASE.format(recipe=recipe, hidden=128, inter=96, activation="swiglu", fill=fill)
    case = Case.parse(text.replace(".s1", ".bias.s1"))
    backend = replace(discover()[f"vllm_marlin_{recipe.split('_')[0]}"], archs=(), probe=always)
    entry = "vllm.model_executor.layers.fused_moe.experts.marlin_moe.fused_marlin_moe"
    with planting({entry: marlin(case, as_written=False)}):
        verdict = run(case, backend, CPU)
    assert verdict.status is Status.PASSED, verdict.reason
    if recipe == "nvfp4":
        with planting({entry: marlin(case, as_written=True)}):
            assert run(case, backend, CPU).status is Status.WRONG


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal but for the one rounding of 1 / global scale to float32."""
    return torch.allclose(got, wanted, rtol=2.0**-22, atol=0)


def test_nvfp4_scales_are_lifted_out_of_the_subnormals_without_a_rounding() -> None:
    """Marlin flushes E4M3 scales below 2**-6 to 0, after one shift for all experts of a layer: three quarters of them here."""
    case = Case.parse(CASE.format(recipe="nvfp4", hidden=128, inter=64, activation="swiglu", fill="real")).vary(experts=16)
    stack = pack(case, make_inputs(case), one_factor=True)[0]
    assert stack.scales is not None
    before, after = stack.scales.view(torch.float8_e4m3fn).float(), lifted(stack).scales.view(torch.float8_e4m3fn).float()  # type: ignore[union-attr]
    assert (before < 2.0**-6).any()
    assert after.amax((1, 2)).min() >= 224
    products = [s * stack_.factors[:, :1, None] for s, stack_ in ((before, stack), (after, lifted(stack)))]  # type: ignore[index]
    assert torch.equal(products[0], products[1])


def test_rows_of_halves_alternate_for_swigluoai_only() -> None:
    rows = torch.arange(2 * 6).view(2, 6, 1)
    case = Case.parse(CASE.format(recipe="bf16", hidden=64, inter=32, activation="swiglu_oai", fill="real"))
    assert ordered(case, rows)[0, :, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert ordered(case.vary(activation="swiglu"), rows) is rows


def test_a_rank_maps_the_experts_it_holds() -> None:
    case = Case.parse(CASE.format(recipe="bf16", hidden=64, inter=32, activation="swiglu", fill="real"))
    assert not expert_map(make_inputs(case))
    rest = next(i for i in shards(make_inputs(case)) if i.local == range(1, 4))
    assert expert_map(rest)["expert_map"].tolist() == [-1, 0, 1, 2]


IDS = torch.tensor([[3, 0], [0, 5], [3, 1], [0, 3], [5, 3]])


@pytest.mark.parametrize("places", [in_slabs(IDS, 6, 5), in_blocks(IDS, 6, 4)], ids=["slabs", "blocks"])
def test_every_slot_has_a_row_of_its_expert_and_comes_back(places: Places) -> None:
    assert len(set(places.at.tolist())) == IDS.numel()
    assert torch.equal(places.owner[places.at].long(), IDS.flatten())
    assert (places.owner >= 0).sum() == IDS.numel()
    assert places.counts.tolist() == torch.bincount(IDS.flatten(), minlength=6).tolist()
    x = torch.arange(5 * 3).view(5, 3).to(torch.bfloat16)
    weights = torch.arange(10.0).view(5, 2)
    assert torch.equal(places.gathered(places.spread(x), weights), x * weights.sum(1, keepdim=True))


def test_blocks_belong_to_one_expert_and_slabs_start_where_they_should() -> None:
    blocks = in_blocks(IDS, 6, 4)
    for block in blocks.owner.view(-1, 4):
        assert len(set(block[block >= 0].tolist())) <= 1
        assert block[0] >= 0 or not (block >= 0).any()
    slabs = in_slabs(IDS, 6, 5).owner.view(6, 5)
    for expert, rows in enumerate(slabs):
        count = int((expert == IDS).sum())
        assert rows.tolist() == [expert] * count + [-1] * (5 - count)


def test_a_batch_of_the_worst_routing_fits_the_padded_list() -> None:
    for ids in (torch.arange(6).view(3, 2), torch.zeros(7, 1, dtype=torch.int64), torch.full((5, 1), 5)):
        places = in_blocks(ids, 6, 4)
        assert int(places.at.max()) < len(places.owner)


def test_a_missing_library_is_named() -> None:
    support = discover()["vllm_batched"].probe(Device("cuda", "sm90"))
    assert (support.ok, support.kind) == (False, "library")
    assert "cannot be imported" in support.reason
