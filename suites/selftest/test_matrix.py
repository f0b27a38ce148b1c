"""moecheck list: what runs where is computed from the backends and the platform files, not typed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from harness import config
from harness.backends import discover, with_twins
from harness.backends.base import Backend
from harness.cli_list import show
from harness.matrix import Cell, Way, matrix, padding_of, same

SM100, CPU = config.platform("sm100"), config.platform("cpu")
ENTRY = "flashinfer.fused_moe.trtllm_fp4_block_scale_moe"


def kernel(**changes: object) -> Backend:
    """A backend of a library that the CPU has a twin of."""
    made = replace(discover()["torch_grouped_mm"], name="kernel", archs=("sm100",), recipes=("nvfp4-nvfp4", "bf16"))
    return replace(made, twinned=True, entries=(ENTRY,), routings=("renormalize",), **changes)  # type: ignore[arg-type]


def cells(platform: config.Platform, *declared: Backend) -> list[Cell]:
    return matrix(platform, {backend.name: backend for backend in with_twins(declared)})


def of(found: list[Cell], subject: str) -> dict[str, tuple[Way, ...]]:
    return {cell.recipe: cell.ways for cell in found if cell.subject == subject}


def test_a_kernel_runs_on_its_platform_and_its_twin_on_the_cpu() -> None:
    assert of(cells(SM100, kernel()), "kernel") == dict.fromkeys(("bf16", "nvfp4-nvfp4"), (Way.NATIVE, Way.TWIN))
    assert of(cells(CPU, kernel()), "kernel_twin") == dict.fromkeys(("bf16", "nvfp4-nvfp4"), (Way.TWIN,))
    assert not of(cells(CPU, kernel()), "kernel")
    assert of(cells(SM100, replace(kernel(), twinned=False)), "kernel")["bf16"] == (Way.NATIVE,)


def test_a_backend_takes_the_place_of_its_contract_recipe_by_recipe() -> None:
    before, after = of(cells(SM100), ENTRY), of(cells(SM100, kernel()), ENTRY)
    assert set(before.values()) == {(Way.CONTRACT,)}
    assert before.keys() - after.keys() == {"nvfp4-nvfp4"}
    elsewhere = cells(SM100, kernel(archs=("sm90",)))
    assert of(elsewhere, ENTRY) == before


def test_a_recipe_that_the_platform_does_not_plan_is_no_cell() -> None:
    assert "int4_g32_zp" not in of(cells(SM100, kernel(recipes=("bf16", "int4_g32_zp"))), "kernel")


def test_the_recipes_of_an_op_are_those_that_the_platform_plans_for_it() -> None:
    """A router of fp32 logits was no cell: fp32 is no recipe of a layer."""
    found = matrix(config.platform("sm90"), discover())
    assert of(found, "flashinfer_fused_topk_deepseek") == {"fp32": (Way.NATIVE, Way.TWIN)}
    assert set(of(found, "torch_route")) == {"bf16", "fp32"}


def test_a_function_has_several_paths() -> None:
    assert same(ENTRY, "flashinfer.trtllm_fp4_block_scale_moe")
    assert not same(ENTRY, "vllm.trtllm_fp4_block_scale_moe")
    assert not same("triton_moe", "torch_grouped_mm")


def test_the_padding_of_cdna4_is_not_that_of_cuda() -> None:
    """vllm#38504: 256 and 512 there, 64 and 128 here."""
    entry = ("vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe.triton_kernel_fused_experts",)
    assert padding_of(config.platform("gfx950"), entry, "mxfp4") == "hidden 256, w13 rows 512, inter 256"
    assert padding_of(config.platform("sm90"), entry, "mxfp4") == "hidden 64, w13 rows 128"


@pytest.mark.parametrize("name", config.names("platforms"))
def test_every_native_cell_is_planned_for_that_platform(name: str) -> None:
    loaded, backends = config.platform(name), discover()
    for cell in matrix(loaded, backends):
        if Way.NATIVE in cell.ways:
            backend = backends[cell.subject]
            assert loaded.arch in (backend.archs or (loaded.arch,))
            assert cell.recipe in backend.recipes


def test_the_command_prints_it_and_json(moecheck: Callable[..., Any]) -> None:
    answer = moecheck("list", "--platform", "sm100")
    assert answer.code == 0
    assert "contract only" in answer.out
    data = json.loads(moecheck("list", "--platform", "sm100", "--json").out)
    found = matrix(SM100, discover())
    assert [(c["subject"], c["recipe"], c["ways"]) for c in data["cells"]] == [
        (c.subject, c.recipe, list(c.ways)) for c in found
    ]
    assert {"text", "link"} <= set(data["hazards"][0])


def test_what_is_piped_has_a_line_for_each_row_and_nothing_is_folded(moecheck: Callable[..., Any]) -> None:
    lines = moecheck("list", "--platform", "sm100").out.splitlines()
    for subject in {c.subject: c for c in matrix(SM100, discover())}.values():
        wanted = (subject.subject, subject.library, subject.recipe, ", ".join(subject.routings) or "top-k ids")
        assert any(all(text in line for text in wanted) for line in lines), wanted
    assert max(map(len, lines)) > 140


def test_a_terminal_keeps_its_width() -> None:
    out = Console(width=100, force_terminal=True, file=io.StringIO())
    show("sm100", [], False, out)
    assert isinstance(out.file, io.StringIO)
    assert all(len(Text.from_ansi(line).plain) <= 100 for line in out.file.getvalue().splitlines()[:-1])


def test_a_selection_is_answered_with_the_plan(moecheck: Callable[..., Any]) -> None:
    whole = moecheck("list", "--platform", "sm90", "--cases").out.splitlines()
    some = moecheck("list", "--platform", "sm90", "--backend", "torch_grouped_mm").out.splitlines()
    assert set(some) < set(whole)
    assert moecheck("list", "--cases", "--json").code == 3
