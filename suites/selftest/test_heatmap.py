"""The heat map: the worst element stays visible at any size, and a run does not drown in pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.case import Case
from harness.compare import compare
from harness.inputs import make_inputs
from harness.oracle import Expected, expect
from harness.report import heatmap
from harness.report.heatmap import BROKEN, MAX_PX, NOTHING, artist, colours, expert_tiles, pooled, z_of
from harness.report.text import explain
from harness.verdict import Stage, Status, Verdict
from reference.rounding import Rounding

CASE = Case.parse("moe.bf16.t5.h160.i32.e6.k2.renormalize.swiglu.standard.real.s1")


@cache
def expected() -> Expected:
    return expect(CASE, make_inputs(CASE), Rounding(out="bf16"))


def broken_at(token: int, column: int, value: float) -> Tensor:
    got = expected().value.bfloat16()
    got[token, column] = value
    return got


def verdict_on(got: Tensor, status: Status = Status.WRONG) -> Verdict:
    return Verdict(CASE.id, "ours", status, Stage.DONE, "because", comparison=compare(expected(), got))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7168), (1025, 3), (3000, 2049)])
def test_pooling_keeps_the_worst_element(shape: tuple[int, int]) -> None:
    z = torch.zeros(shape)
    z[-1, -1] = 9.0
    small = pooled(z)
    assert max(small.shape) <= MAX_PX
    assert (float(small[-1, -1]), int((small > 0).sum())) == (9.0, 1)


def test_colours_tell_the_sides_of_the_limit_apart() -> None:
    z = torch.tensor([[0.0, 1e-9, 6.3, 6.5, 1e30, torch.inf, heatmap.UNJUDGED]])
    rgb = colours(z, limit=6.4, top=1e30)[0]
    beyond = rgb[:, 0] > rgb[:, 2]  # more red than blue
    assert beyond.tolist() == [False, False, False, True, True, False, False]
    assert (tuple(rgb[5].tolist()), tuple(rgb[6].tolist())) == (BROKEN, NOTHING)


def test_z_says_what_is_broken_and_what_is_not_judged() -> None:
    only_row_2 = replace(expected(), ambiguous=torch.arange(5) == 2)
    z = z_of(only_row_2, broken_at(1, 3, torch.nan))
    assert z[1].isinf().nonzero().flatten().tolist() == [3]
    assert bool((z[2] == heatmap.UNJUDGED).all())
    assert bool((z[[0, 3, 4]] >= 0).all())


def test_an_expert_shows_the_worst_of_its_tokens() -> None:
    z = torch.zeros(5, 160)
    z[2, 130] = 7.0
    tiles = expert_tiles(expected(), z, 6)
    ids = expected().routing.ids
    mine = set(ids[2].tolist())
    assert tiles.shape == (6, 3)
    assert {int(e) for e in (tiles[:, 2] == 7).nonzero().flatten()} == mine
    assert {int(e) for e in (tiles[:, 0] == heatmap.UNJUDGED).nonzero().flatten()} == set(range(6)) - set(
        ids.flatten().tolist()
    )


@pytest.mark.parametrize("value", [3.0, 1e30, torch.inf, torch.nan])
def test_a_failed_verdict_gets_a_picture(value: float, tmp_path: Path) -> None:
    got = broken_at(1, 3, value)
    verdict = artist(tmp_path)(expected(), got, verdict_on(got))
    assert verdict.picture == f"pictures/ours__{CASE.id}.png"
    with Image.open(tmp_path / verdict.picture) as image:
        assert image.format == "PNG"
        colours_used = {color for _, color in image.convert("RGB").getcolors(1 << 20)}  # type: ignore[union-attr]
    assert (BROKEN in colours_used) == (not torch.tensor(value).isfinite())
    assert Verdict.from_json(verdict.to_json()).picture == verdict.picture
    assert verdict.picture in explain(verdict)


def test_only_failures_are_drawn_and_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = expected().value.bfloat16(), broken_at(0, 0, 99.0)
    draw = artist(tmp_path)
    passed = Verdict(CASE.id, "ours", Status.PASSED, Stage.DONE, comparison=compare(expected(), right))
    assert draw(expected(), right, passed) == passed
    unstable = replace(passed, status=Status.UNSTABLE, reason="differs")
    assert draw(expected(), right, unstable) == unstable
    assert not (tmp_path / "pictures").exists()
    monkeypatch.setattr(heatmap, "MAX_PICTURES", 2)
    drawn = [draw(expected(), wrong, replace(verdict_on(wrong), subject=f"s/{i}")).picture for i in range(4)]
    assert [bool(path) for path in drawn] == [True, True, False, False]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [Path(p).name for p in drawn[:2]]


def test_a_full_disk_costs_the_picture_not_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("in the way")
    wrong = broken_at(0, 0, 99.0)
    assert artist(tmp_path)(expected(), wrong, verdict_on(wrong)) == verdict_on(wrong)
