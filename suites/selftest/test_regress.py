"""What changed between two runs: every kind is told, and two runs of one kernel say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Protocol

import pytest
import torch

from harness import journal
from harness.case import Case, Recipe
from harness.compare import compare as judged
from harness.compare import mean_z2_limit
from harness.emulate import emulate
from harness.inputs import make_inputs
from harness.journal import Journal
from harness.oracle import expect
from harness.ratio import assumed_rounding
from harness.regress import LEVEL, Changes, compare, sign_test
from harness.verdict import Comparison, Diagnosis, Finding, Stage, Status, Verdict

SHAPES = [(h, i) for h in (32, 48, 64, 80, 96, 112, 128, 160) for i in (16, 32, 48, 64, 80, 96)]
CASES = [f"moe.bf16.t{5 + i % 7}.h{h}.i{i}.e4.k{1 + h // 16 % 4}.renormalize.swiglu.standard.real" for h, i in SHAPES]
ERRORS = 200.0  # independent ones in a small case


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def verdict(case: str, mean_z2: float = 1.0, rel_l2: float = 1e-3, subject: str = "sut") -> Verdict:
    comparison = Comparison("real", 64, 0, 3.0, 6.0, mean_z2, mean_z2_limit(ERRORS), rel_l2, 0, 0, (), (), ERRORS)
    return Verdict(case, subject, Status.PASSED, Stage.DONE, comparison=comparison, environment={"torch": "2.11.0"})


def drawn(seed: int, excess: float = 1.0) -> list[Verdict]:
    """A kernel whose errors are normal, their variance `excess` times what it should be."""
    z = torch.randn(len(CASES), int(ERRORS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = (z.square().mean(-1) * excess).tolist()
    return [verdict(f"{c}.s0", m, 1e-3 * m**0.5) for c, m in zip(CASES, means, strict=True)]


def failed(v: Verdict, status: Status = Status.WRONG, kind: str = "dropped_slot", known: str = "") -> Verdict:
    found = Finding("values", f"looks like {kind}")
    return replace(v, status=status, reason=kind, findings=(found,), diagnosis=Diagnosis(kind, kind), known=known)


RUN = drawn(0)
FIRST, *REST = RUN


def test_a_run_and_itself_say_nothing() -> None:
    changes = compare(RUN, RUN)
    assert changes == Changes(compared=len(CASES))
    assert changes.quiet
    assert not changes.regressed


def test_each_kind_of_change_is_named_once() -> None:
    refused = replace(FIRST, status=Status.UNSUPPORTED, stage=Stage.SUPPORT, reason="no", comparison=None)
    wrong = failed(FIRST)
    for was, now, kind, regressed in (
        (FIRST, wrong, "new_failures", True),
        (failed(FIRST, known="k"), wrong, "new_failures", True),  # no longer fails as its issue describes
        (refused, wrong, "new_failures", True),
        (wrong, FIRST, "fixed", False),
        (failed(FIRST, known="k"), replace(FIRST, known="k"), "fixed", False),
        (FIRST, failed(FIRST, known="k"), "status", False),
        (wrong, failed(FIRST, Status.CRASHED), "status", False),
        (FIRST, refused, "status", False),
        (wrong, failed(FIRST, kind="stale"), "diagnosis", False),
    ):
        changes = compare([was, *REST], [now, *REST])
        told = {name for name in ("new_failures", "fixed", "status", "diagnosis") if getattr(changes, name)}
        assert told == {kind}, (was.status, now.status)
        assert changes.regressed is regressed
    assert compare([FIRST], [replace(FIRST, known="k")]).quiet  # an issue was written for what passes: nothing moved


def test_a_failure_in_a_case_that_the_first_run_lacks_is_new() -> None:
    changes = compare(REST, [failed(FIRST), *REST])
    assert [(m.before, m.case_id) for m in changes.new_failures] == [("-", FIRST.case_id)]
    assert [i.case_id for i in changes.only_after] == [FIRST.case_id]
    assert compare(RUN, REST).only_before == changes.only_after


def test_a_cell_that_no_longer_runs_is_lost() -> None:
    """Refused, gone from the plan, or never launched: all the same; another case of the cell keeps it."""
    batched = verdict(f"{CASES[0]}.s0".replace("standard", "batched"))
    skipped = replace(batched, status=Status.UNAVAILABLE, stage=Stage.SUPPORT, reason="gone", comparison=None)
    for after in (RUN, [*RUN, skipped], [*RUN, failed(replace(batched, stage=Stage.PREPARE), Status.CONTRACT)]):
        changes = compare([*RUN, batched], after)
        assert [(c.subject, c.recipe, c.activation_format, c.cases) for c in changes.lost] == [("sut", "bf16", "batched", 1)]
        assert changes.regressed
    assert compare(RUN, [*RUN, batched]).gained == changes.lost
    assert not compare(RUN, REST).lost


def test_versions_that_differ_are_told() -> None:
    after = [replace(v, environment={"torch": "2.12.0"}) for v in RUN]
    assert compare(RUN, after).environment == (("torch", "2.11.0", "2.12.0"),)


def test_noise_is_no_drift_and_a_rounding_too_many_is() -> None:
    """40 pairs of runs, two questions each: at this level one alarm in 1,000 comparisons is due."""
    assert not any(compare(drawn(2 * s), drawn(2 * s + 1)).drift for s in range(1, 20))
    found = compare(drawn(1), drawn(2, excess=1.3)).drift
    assert {d.statistic for d in found} == {"mean z^2", "rel-L2"}
    assert all(abs(d.ratio - (1.3 if "z" in d.statistic else 1.3**0.5)) < 4 * d.error for d in found)
    assert all(d.p < LEVEL / 2 for d in found)


def test_drift_of_one_recipe_is_not_hidden_by_the_others() -> None:
    others = [replace(v, case_id=v.case_id.replace("bf16", r)) for r in ("fp16", "fp32") for v in drawn(3)]
    changes = compare(drawn(1) + others, drawn(2, excess=1.3) + others)
    assert {(d.subject, d.recipe) for d in changes.drift} == {("sut", "bf16")}


def test_cases_that_share_weights_count_once() -> None:
    """One draw of errors that every number of tokens and experts shows again: 48 cases, and one observation."""
    same = [f"moe.bf16.t{t}.h64.i32.e{e}.k2.renormalize.swiglu.standard.real.s0" for t in range(1, 13) for e in (4, 5, 6, 8)]
    changes = compare([verdict(c, 1.0, 1.0e-3) for c in same], [verdict(c, 1.1, 1.05e-3) for c in same])
    assert (changes.tests, changes.drift) == (2, ())
    apart = [c.replace("h64", f"h{64 + 16 * n}") for n, c in enumerate(same)]
    assert len(compare([verdict(c, 1.0, 1.0e-3) for c in apart], [verdict(c, 1.1, 1.05e-3) for c in apart]).drift) == 2


def test_a_case_of_another_seed_is_its_pair() -> None:
    later = [replace(v, case_id=v.case_id[:-1] + "7") for v in drawn(2, excess=1.3)]
    changes = compare(drawn(1), later)
    assert (changes.compared, len(changes.only_before)) == (0, len(CASES))
    assert len(changes.drift) == 2
    assert not changes.lost


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_the_sign_test_counts_all_flips(n: int) -> None:
    flips = [sum(f) for f in product((0, 1), repeat=n)]
    for ups in range(n + 1):
        as_far = sum(abs(2 * f - n) >= abs(2 * ups - n) for f in flips)
        assert sign_test(ups, n) == pytest.approx(as_far / 2**n)
    assert 0 < sign_test(60_000, 100_000) < 1e-300 or sign_test(60_000, 100_000) == 0


def run_of(seed: int) -> list[Verdict]:
    """A right kernel in float32 with sums in an order of its own, on real cases."""
    found = []
    for text in CASES:
        case = Case.parse(f"{text}.s{seed}")
        inputs = make_inputs(case)
        rounding = assumed_rounding(Recipe.parse("bf16"))
        comparison = judged(expect(case, inputs, rounding), emulate(inputs, rounding, seed))
        found.append(replace(verdict(case.id), comparison=comparison))
    return found


def test_two_runs_of_one_right_kernel_with_other_seeds_say_nothing() -> None:
    runs = [run_of(seed) for seed in range(3)]
    for before, after in pairwise(runs):
        changes = compare(before, after)
        assert changes.tests == 2
        assert changes.quiet


def written(folder: Path, verdicts: list[Verdict]) -> Path:
    folder.mkdir()
    record = Journal(folder)
    for v in verdicts:
        record.append(v)
    record.close()
    return folder


def test_the_command_says_it_and_writes_it(tmp_path: Path, moecheck: Call) -> None:
    a, b = written(tmp_path / "a", RUN), written(tmp_path / "b", [failed(FIRST), *REST])
    answer = moecheck("diff", str(a), str(b), "--json", str(tmp_path / "d.json"))
    assert answer.code == 1
    assert f"new failure: sut on {FIRST.case_id}: PASSED -> WRONG dropped_slot" in answer.out
    assert "rerun: moecheck repro" in answer.out
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["regressed"]
    assert data["new_failures"][0]["case_id"] == FIRST.case_id
    back = moecheck("diff", str(b / journal.NAME), str(a))
    assert back.code == 0
    assert "fixed: sut" in back.out
    same = moecheck("diff", str(a), str(a))
    assert same.code == 0
    assert "48 cases in both, 0 only in A, 0 only in B" in same.out
    assert "no change" in same.out


def test_a_place_without_a_journal_is_a_clear_error(tmp_path: Path, moecheck: Call) -> None:
    a = written(tmp_path / "a", RUN)
    for bad in (tmp_path, tmp_path / "none"):
        answer = moecheck("diff", str(a), str(bad))
        assert answer.code == 3
        assert "there is no journal; give a" in answer.err
    answer = moecheck("diff", str(a), str(a), "--json", str(tmp_path / "no" / "d.json"))
    assert answer.code == 3
    assert "choose another file" in answer.err
