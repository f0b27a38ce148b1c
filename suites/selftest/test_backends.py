"""What every backend promises, whoever wrote it: names that exist, reasons for a no, shapes that the platform files state."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from harness import config, plan
from harness.backends import discover
from harness.backends.base import CPU, Backend, Support, checked_probe
from harness.case import Case, Recipe
from harness.hardware import ScaleShape
from reference.activation import ACTIVATIONS
from reference.rounding import Rounding
from reference.routing import RULES

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = discover()
PLATFORMS = [config.platform(name) for name in config.names("platforms")]
SHAPES = [(platform.name, shape) for platform in PLATFORMS for shape in platform.scale_shapes if "." not in shape.backend]
SMALL = "moe.{}.t3.h96.i32.e5.k2.renormalize.swiglu.standard.real.s0"  # every size another one

SHOW = """
import json, sys
from harness.backends import discover
from harness.backends.base import CPU, checked_probe
from harness.case import Case
from harness.inputs import make_inputs
found, shown = discover(), {}
for name, case_id in json.load(sys.stdin):
    if checked_probe(found[name], CPU).ok:
        case = Case.parse(case_id)
        buffers = found[name].prepare(case, make_inputs(case, "cpu")).buffers
        shown[f"{name} {case_id}"] = {key: list(tensor.shape) for key, tensor in buffers.items()}
print(json.dumps(shown))
"""


ARCHS = {platform.arch for platform in PLATFORMS}
ELSEWHERE = {
    name for name, b in BACKENDS.items() if b.twinned and not ARCHS & set(b.archs)
}  # here only their twins are planned


@pytest.fixture(params=sorted(BACKENDS.keys() - ELSEWHERE))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@cache
def planned(platform: str, name: str) -> tuple[Case, ...]:
    """The cases of the smoke tier."""
    wanted = config.platform(platform)
    request = plan.Request(platform, "smoke", (name,))
    return tuple(Case.parse(i.case_id) for i in plan.make(request, BACKENDS, plan.device_named(wanted)).items)


def platforms(backend: Backend) -> list[str]:
    """The platforms a backend is planned on: those it says it runs on, where its recipes and probe allow it."""
    mine = [p for p in PLATFORMS if not backend.archs or p.arch in backend.archs]
    known = set(map(Recipe.parse, backend.recipes))
    return [p.name for p in mine if any(Recipe.parse(r) in known for r in levels(p, backend.op, "recipe"))]


def levels(platform: config.Platform, op: str, axis: str) -> tuple[str, ...]:
    """What a platform plans of an op on an axis of names."""
    return (op in platform.ops and getattr(platform.ops[op], axis)) or getattr(platform.axes, axis) or ()


def test_it_declares_names_that_exist(backend: Backend) -> None:
    """A misspelt name is never planned, and nobody misses it."""
    assert [str(Recipe.parse(recipe)) for recipe in backend.recipes] == list(backend.recipes)
    assert set(backend.activations) <= set(ACTIVATIONS)
    assert set(backend.routings) <= set(RULES)
    assert all(re.fullmatch(r"cpu|sm\d{2,3}|gfx[0-9a-f]{3,4}", arch) for arch in backend.archs)


def test_it_runs_on_a_platform_there_is(backend: Backend) -> None:
    assert platforms(backend)


def test_it_says_what_it_is(backend: Backend) -> None:
    assert isinstance(backend.deterministic, bool)
    assert backend.summary
    assert backend.library
    assert re.fullmatch(r"[a-z][a-z0-9_]*", backend.name)


def test_it_says_where_it_rounds_for_every_planned_case(backend: Backend) -> None:
    """A table without the one recipe would raise in the middle of a run, as a fault of ours."""
    cases = [case for name in platforms(backend) for case in planned(name, backend.name)]
    assert cases
    assert all(isinstance(backend.rounding(case), Rounding) for case in cases)


def test_its_plan_uses_everything_it_declares(backend: Backend) -> None:
    """A recipe, activation or rule that no platform plans is a claim that nobody checks."""
    cases = [case for name in platforms(backend) for case in planned(name, backend.name)]
    assert {str(case.recipe) for case in cases} >= offered("recipe", backend.op) & set(backend.recipes)
    assert {case.activation for case in cases} >= smoke_activations(backend.op, platforms(backend)) & set(backend.activations)
    assert {case.routing for case in cases} >= offered("routing", backend.op) & set(backend.routings)


def offered(axis: str, op: str) -> set[str]:
    return {value for p in PLATFORMS for value in levels(p, op, axis)}


def smoke_activations(op: str, where: list[str]) -> set[str]:
    tier = config.tier("smoke")
    named = [axes for name, axes in tier.platforms.items() if name in where] if op == "moe" else [tier.ops[op]]
    return {value for axes in named for value in axes.activation or ()}


def test_its_probe_answers(backend: Backend) -> None:
    support = checked_probe(backend, CPU)
    assert isinstance(support, Support)
    assert support.ok or (support.reason and support.kind in ("library", "arch"))


@pytest.mark.parametrize("axis", ["recipe", "activation", "routing", "arch"])
def test_what_it_does_not_list_is_refused_with_a_reason(backend: Backend, axis: str) -> None:
    case = planned(platforms(backend)[0], backend.name)[0]
    device = plan.device_named(config.platform(platforms(backend)[0]))
    lists = {"recipe": backend.recipes, "activation": backend.activations, "routing": backend.routings, "arch": backend.archs}
    known = {"recipe": offered("recipe", backend.op), "activation": set(ACTIVATIONS), "routing": set(RULES), "arch": {"sm00"}}
    for other in sorted(known[axis] - set(lists[axis])) if lists[axis] else ():
        on = replace(device, arch=other) if axis == "arch" else device
        support = backend.supports(case if axis == "arch" else case.vary(**{axis: other}), on)
        assert (support.ok, support.kind) == (False, "arch" if axis == "arch" else "case")
        assert axis == "arch" or f"{axis} {other}" in support.reason
        assert any(name in support.reason for name in lists[axis])


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, list[int]]]:
    """backend and case -> buffer -> shape, from a process in which Triton interprets."""
    wanted = [(runs_here(s.backend), SMALL.format(s.recipe)) for _, s in SHAPES if s.backend in BACKENDS]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SHOW]
    done = subprocess.run(
        command, input=json.dumps(wanted), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, dict[str, list[int]]] = json.loads(done.stdout)
    return loaded


def runs_here(name: str) -> str:
    """The backend's twin, where it has one."""
    return f"{name}_twin" if f"{name}_twin" in BACKENDS else name


@pytest.mark.parametrize(("platform", "stated"), SHAPES, ids=lambda v: v if isinstance(v, str) else f"{v.recipe}-{v.buffer}")
def test_scale_buffers_have_the_stated_shape(shown: dict[str, dict[str, list[int]]], platform: str, stated: ScaleShape) -> None:
    """hidden and inter are equal in many a test: exchanged block counts would fit."""
    case = Case.parse(SMALL.format(stated.recipe))
    buffers = shown.get(f"{runs_here(stated.backend)} {case.id}")
    if buffers is None:
        pytest.skip(f"{stated.backend} is not available here")
    assert buffers[stated.buffer] == list(stated.at(case))
