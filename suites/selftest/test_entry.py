"""Library functions and their twins: what is resolved where, what a probe says, and planted defects."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from harness.backends import discover, with_twins
from harness.backends.base import CPU, Device, Launch
from harness.backends.torch_grouped_mm import BACKENDS
from harness.case import Case
from harness.entry import needs, planted, planting, resolve, twins
from harness.errors import UnknownName
from harness.inputs import make_inputs

CUDA = Device("cuda", "sm100")
CASE = Case.parse("moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")


def test_an_accelerator_gets_the_library_and_a_cpu_the_twin() -> None:
    assert resolve("math.floor", "cuda")(1.5) == 1
    with pytest.raises(UnknownName, match=r"math\.floor"):
        resolve("math.floor", "cpu")


def test_a_probe_names_what_is_missing() -> None:
    assert needs("math.floor", "json.dumps")(CUDA).ok
    assert "no math.floored" in needs("math.floor", "math.floored")(CUDA).reason
    answer = needs("nowhere_to_be_found.function")(CUDA)
    assert answer.kind == "library"
    assert "nowhere_to_be_found cannot be imported" in answer.reason


def test_a_twinned_backend_is_two_subjects() -> None:
    native = replace(BACKENDS[0], name="native", archs=("sm100",), twinned=True)
    first, second = with_twins((native,))
    assert first is native
    assert (second.name, second.archs, second.library) == ("native_twin", ("cpu",), "torch")
    assert second.supports(CASE, CPU).ok
    assert not native.supports(CASE, CPU).ok


def test_a_planted_function_is_resolved_by_that_backend_only() -> None:
    def prepare(case: Case, inputs: object) -> Launch:
        answer = resolve("math.floor", "cuda")(1.5)
        return Launch(lambda: answer)

    backend = replace(BACKENDS[0], name="floor", prepare=prepare)
    inputs = make_inputs(CASE)
    defect = planted(backend, "floor_defect", {"math.floor": lambda x: 7})
    assert defect.prepare(CASE, inputs).call() == 7
    assert backend.prepare(CASE, inputs).call() == 1
    with planting({"math.floor": lambda x: 8}):
        assert backend.prepare(CASE, inputs).call() == 8


def test_every_twinned_backend_names_entries_that_have_twins() -> None:
    for backend in discover().values():
        if backend.twinned:
            assert backend.entries, backend.name
            assert set(backend.entries) <= set(twins()), backend.name


def test_a_twin_has_a_documented_signature() -> None:
    for name, function in twins().items():
        assert function.__name__ == name.rpartition(".")[2], name
        assert inspect.getdoc(function), name
        assert inspect.signature(function).parameters, name
