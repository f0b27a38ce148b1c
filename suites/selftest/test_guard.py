"""The argument guard names each kind of wrong argument before the kernel runs, and says nothing of right ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.backends.base import CPU, Backend, Launch
from harness.backends.torch_grouped_mm import BACKENDS, CONTRACT
from harness.case import Case
from harness.guard import Argument, Entry, Violation, armed, violations
from harness.inputs import Inputs, make_inputs
from harness.pipeline import Options, run
from harness.verdict import Status

CASE = Case.parse("moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0")
GROUPED = BACKENDS[0]
Buffers = dict[str, Tensor]


def given(**more: Tensor) -> Buffers:
    return {"x": torch.zeros(4, 8), "w": torch.zeros(3, 8, 8), **more}


def misaligned() -> Tensor:
    """A view whose storage begins one element too late for a 16-byte load."""
    return torch.zeros(33)[1:].view(4, 8)


VIOLATIONS: dict[str, tuple[Buffers, tuple[Argument, ...], str]] = {
    "device": (given(out=torch.zeros(4, 8, device="meta")), (), "out is on meta, the kernel runs on cpu"),
    "dtype": (given(), (Argument("x", torch.bfloat16),), "x is torch.float32, wanted torch.bfloat16"),
    "shape": (given(), (Argument("x", shape=(4, 16)),), "x has shape (4, 8), wanted (4, 16)"),
    "strides": (given(x=torch.zeros(8, 4).T), (Argument("x", contiguous=True),), "x is not contiguous: strides (1, 4)"),
    "alignment": (given(x=misaligned()), (Argument("x", align=16),), "x is not aligned: it starts 4 bytes after a multiple"),
    "type": (given(bias=None), (), "bias is NoneType, wanted a tensor"),  # type: ignore[arg-type]
    "missing": (given(), (Argument("scales"),), "scales is not among the arguments"),
}


@pytest.mark.parametrize("about", VIOLATIONS)
def test_each_kind_of_wrong_argument_is_named(about: str) -> None:
    buffers, contract, text = VIOLATIONS[about]
    (finding,) = violations(buffers, contract, "cpu")
    assert finding.evidence["property"] == about
    assert finding.text.startswith(text)


def test_a_host_out_buffer_of_a_cuda_kernel_is_named() -> None:
    """vllm#38169: it crashed only where the GPU cannot reach host memory, and then in somebody else's function."""
    (finding,) = violations({"out": torch.zeros(4, 8)}, (), "cuda")
    assert finding.text == "out is on cpu, the kernel runs on cuda: it would write through a host address"
    (finding,) = violations({"x": torch.zeros(4, 8)}, (), "cuda")
    assert finding.text.endswith("it would read through a host address")


def test_a_stated_device_is_the_arguments_own() -> None:
    contract = (Argument("lengths", device="cpu"),)
    assert not violations({"lengths": torch.zeros(3, dtype=torch.int32)}, contract, "cuda")
    (finding,) = violations({"lengths": torch.zeros(3, device="meta")}, contract, "cuda")
    assert "it belongs on cpu" in finding.text


def test_names_in_shapes_mean_one_size() -> None:
    contract = (Argument("x", shape=("tokens", "hidden")), Argument("w", shape=("experts", "rows", "hidden")))
    assert not violations(given(), contract, "cpu")
    (finding,) = violations(given(w=torch.zeros(3, 8, 16)), contract, "cpu")
    assert finding.text == "w has shape (3, 8, 16), wanted (experts, rows, hidden 8)"


def test_stride_alignment_is_asked_of_rows_not_of_neighbours() -> None:
    contract = (Argument("x", stride_align=16),)
    assert not violations({"x": torch.zeros(4, 8)}, contract, "cpu")
    assert not violations({"x": torch.zeros(8, 4).T}, contract, "cpu")
    assert not violations({"x": torch.zeros(1, 7)}, contract, "cpu")  # one row: its stride is never used
    (finding,) = violations({"x": torch.zeros(4, 7)}, contract, "cpu")
    assert finding.text == "x has strides of [28] bytes, wanted multiples of 16"


def test_a_written_buffer_must_not_overlap() -> None:
    arena = torch.zeros(64)
    x, out = arena[:32].view(4, 8), arena[24:56].view(4, 8)
    (finding,) = violations({"x": x, "out": out}, (), "cpu")
    assert finding.text == "out overlaps x by 32 bytes: it would overwrite what it reads"
    assert not violations({"x": x, "out": arena[32:].view(4, 8)}, (), "cpu")
    assert not violations({"x": x, "w": x}, (), "cpu")  # both are only read
    (finding,) = violations({"out": torch.zeros(1, 8).expand(4, 8)}, (), "cpu")
    assert finding.text == "out overlaps itself: expanded strides"
    workspace = (Argument("workspace", written=True),)
    assert violations({"x": x, "workspace": arena}, workspace, "cpu")[0].evidence["argument"] == "workspace"


def test_empty_tensors_have_no_address_to_complain_of() -> None:
    """torch gives them the address 0."""
    buffers = {"x": torch.zeros(0, 8), "out": torch.zeros(0, 8)}
    assert not violations(buffers, (Argument("x", align=128, stride_align=16, contiguous=True),), "cpu")


def test_an_entry_point_is_not_called_with_a_wrong_argument() -> None:
    called: list[int] = []
    entry = Entry(lambda *args, **named: called.append(1), CONTRACT)
    a, b = torch.zeros(6, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 16, dtype=torch.bfloat16)
    entry(a, b, offs=torch.tensor([3, 6], dtype=torch.int32))
    assert called == [1]
    for wrong, text in (
        ((a, b, {"offs": torch.tensor([3, 6])}), "offs is torch.int64, wanted torch.int32"),
        ((a.float(), b, {"offs": torch.tensor([3, 6], dtype=torch.int32)}), "mat_a is torch.float32"),
        ((a, b, {"offs": torch.tensor([6], dtype=torch.int32)}), "offs has shape (1,), wanted (experts 2)"),
        ((a[:, :4], b[:, :4], {"offs": torch.tensor([3, 6], dtype=torch.int32)[:1]}), "offs has shape"),
    ):
        with pytest.raises(Violation) as caught:
            entry(wrong[0], wrong[1], **wrong[2])
        assert text in str(caught.value)
    assert called == [1]


def planted(change: Callable[[Buffers], None], ran: list[int]) -> Backend:
    """The clean subject, one of whose buffers is not what the kernel wants."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        launch = GROUPED.prepare(case, inputs)
        buffers = dict(launch.buffers)
        change(buffers)

        def call() -> Tensor:
            ran.append(1)
            return launch.call()

        return replace(launch, call=call, buffers=buffers)

    return replace(GROUPED, name="planted", prepare=prepare)


def wide(x: Tensor) -> Tensor:
    return torch.zeros(len(x), x.shape[1] * 2, dtype=x.dtype)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b.update(out=torch.empty_like(b["x"], device="meta")), "out is on meta"),
        (lambda b: b.update(out=b["x"]), "out overlaps x"),
        (lambda b: b.update(ids=b["ids"].int()), "ids is torch.int32, wanted torch.int64"),
        (lambda b: b.update(x=wide(b["x"])), "x has shape (33, 512), wanted (33, 256)"),
        (lambda b: b.pop("w2"), "w2 is not among the arguments"),
    ],
)
def test_a_planted_violation_is_a_contract_verdict_and_nothing_ran(change: Callable[[Buffers], None], text: str) -> None:
    ran: list[int] = []
    verdict = run(CASE, planted(change, ran), CPU)
    assert verdict.status is Status.CONTRACT
    assert text in verdict.reason
    assert verdict.findings[0].check == "argument"
    assert not ran


def test_a_violation_inside_the_layer_is_a_contract_verdict_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offsets are made at every call: no look at the buffers sees them."""
    plain = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *args, **kwargs: plain(*args, **kwargs)[:-1])
    verdict = run(CASE, GROUPED, CPU)
    assert verdict.status is Status.CONTRACT
    assert verdict.reason == "offs has shape (4,), wanted (experts 5)"


def test_the_callers_out_buffer_is_checked_at_its_call() -> None:
    x, called = torch.zeros(4, 8), []
    launch = armed(Launch(lambda: x, {"x": x}, out=called.append, tactics={"b": lambda: x}), "cpu")
    launch.out(torch.zeros(4, 8))  # type: ignore[misc]
    assert len(called) == 1
    with pytest.raises(Violation, match="out overlaps x by 128 bytes"):
        launch.out(x)  # type: ignore[misc]
    assert len(called) == 1


def test_every_call_is_checked_not_the_first_alone() -> None:
    x = torch.zeros(4, 8)
    launch = armed(
        Launch(
            lambda: x, {"x": x}, tactics={"b": lambda: x}, capture=lambda: lambda: x, contract=(Argument("x", contiguous=True),)
        ),
        "cpu",
    )
    launch.call()
    x.t_()
    for call in (launch.call, launch.tactics["b"], launch.capture):
        with pytest.raises(ValueError, match="x is not contiguous"):
            call()  # type: ignore[misc]


def test_a_declared_layout_is_a_refusal_of_strided_inputs_not_a_failure() -> None:
    def prepare(case: Case, inputs: Inputs) -> Launch:
        return replace(GROUPED.prepare(case, inputs), contract=(Argument("x", contiguous=True),))

    verdict = run(CASE, replace(GROUPED, name="dense", prepare=prepare), CPU, options=Options(None))
    assert verdict.status is Status.PASSED


def test_a_check_costs_less_than_a_hundredth_of_a_case() -> None:
    """The smallest real case takes some 10 ms and calls its kernel twice."""
    inputs_launch = GROUPED.prepare(CASE, make_inputs(CASE))
    best = min(_timed(inputs_launch) for _ in range(5))
    started = time.perf_counter()
    run(CASE, GROUPED, CPU)
    assert best < 0.01 * (time.perf_counter() - started) / 2


def _timed(launch: Launch) -> float:
    started = time.perf_counter()
    for _ in range(50):
        assert not violations(launch.buffers, launch.contract, "cpu")
    return (time.perf_counter() - started) / 50
