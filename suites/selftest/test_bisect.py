"""The bisect: against linear search and brute force, on flaky bugs, over the stored releases, killed and resumed."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MoecheckError, RunFolderError
from harness.versions import store
from harness.versions.bisect import Command, Contracts, Journal, Outcome, Question, Result, between, bisect
from harness.versions.properties import split
from harness.versions.report import report
from harness.versions.search import (
    EXACT,
    PATIENCE,
    READ,
    Answer,
    Found,
    Model,
    Next,
    Stopped,
    Tally,
    information,
    posterior,
    step,
)
from harness.versions.simulate import Bug, bayesian, measure

FLASHINFER = "flashinfer-python"
NEWEST = store.releases(FLASHINFER)[-1]
MOE = "flashinfer.fused_moe."
GOOD, BAD, UNKNOWN = Answer.GOOD, Answer.BAD, Answer.UNKNOWN


def solve(answers: list[Answer]) -> tuple[Found | Stopped, int]:
    seen, runs = Tally(len(answers)), 0
    while isinstance(now := step(seen, EXACT), Next):
        assert now.version not in seen.unknown
        seen.add(now.version, answers[now.version])
        runs += 1
        assert runs <= len(answers)
    return now, runs


@st.composite
def histories(draw: st.DrawFn) -> list[Answer]:
    """Good versions, then bad ones; any but the ends may be unknown."""
    n = draw(st.integers(2, 60))
    first = draw(st.integers(1, n - 1))
    unknown = draw(st.sets(st.integers(1, n - 2), max_size=n)) if n > 2 else set()
    return [UNKNOWN if v in unknown else BAD if v >= first else GOOD for v in range(n)]


@given(histories())
def test_the_search_finds_what_a_linear_search_finds(answers: list[Answer]) -> None:
    """The suspects are the versions after the last good one, up to the first bad one."""
    last_good = max(v for v, a in enumerate(answers) if a is GOOD)
    first_bad = min(v for v, a in enumerate(answers) if a is BAD)
    found, _ = solve(answers)
    assert isinstance(found, Found)
    assert found.suspects == tuple(range(last_good + 1, first_bad + 1))


@pytest.mark.parametrize("n", [2, 3, 33, 60, 400])
def test_a_bug_that_is_certain_costs_the_ends_and_log2_n(n: int) -> None:
    most = max(solve([GOOD] * first + [BAD] * (n - first))[1] for first in range(1, n, 1 + n // 50))
    assert most <= 2 + math.ceil(math.log2(n - 1))


@given(histories())
def test_a_contract_over_60_releases_costs_six_runs(answers: list[Answer]) -> None:
    """The ends were read to know what good and bad are."""
    answers = [a if a is not UNKNOWN else (BAD if v >= answers.index(BAD) else GOOD) for v, a in enumerate(answers)]
    seen, runs = Tally(len(answers)), 0
    while isinstance(now := step(seen, READ), Next):
        seen.add(now.version, answers[now.version])
        runs += 1
    assert isinstance(now, Found)
    assert now.suspects == (answers.index(BAD),)
    assert runs <= math.ceil(math.log2(max(2, len(answers) - 1))) <= 6


COUNTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=7)


def brute(fails: list[int], passes: list[int], model: Model) -> list[float]:
    """The posterior with the rates integrated numerically, candidate by candidate."""
    rate = (np.arange(20_000) + 0.5) / 20_000
    b = model.false_failures
    out = []
    for c in range(1, len(fails)):
        f0, s0, f1, s1 = sum(fails[:c]), sum(passes[:c]), sum(fails[c:]), sum(passes[c:])
        good = model.certain_good * (f0 == 0) + (1 - model.certain_good) * np.mean(
            rate**f0 * (1 - rate) ** s0 * b * (1 - rate) ** (b - 1)
        )
        bad = model.certain_bad * (s1 == 0) + (1 - model.certain_bad) * np.mean(rate**f1 * (1 - rate) ** s1)
        out.append(float(good * bad))
    return [x / sum(out) for x in out]


@given(COUNTS)
def test_the_posterior_is_the_integral_over_both_rates(counts: list[tuple[int, int]]) -> None:
    fails, passes = (list(x) for x in zip(*counts, strict=True))
    ours = posterior(np.array(fails), np.array(passes), Model())
    assert ours == pytest.approx(brute(fails, passes, Model()), rel=1e-4, abs=1e-12)


def entropy(chances: np.ndarray) -> float:
    return float(-sum(p * math.log2(p) for p in chances if p > 0))


@given(COUNTS)
def test_information_is_the_expected_fall_of_the_entropy(counts: list[tuple[int, int]]) -> None:
    fails, passes = (np.array(x) for x in zip(*counts, strict=True))
    chances = posterior(fails, passes, Model())
    bits = information(chances, fails, passes, Model())
    b = Model().false_failures
    for version in range(len(fails)):
        one = np.eye(len(fails), dtype=np.int64)[version]
        after_fail, after_pass = posterior(fails + one, passes, Model()), posterior(fails, passes + one, Model())
        failure = 0.0
        for c in range(1, len(fails)):
            part = slice(c, None) if version >= c else slice(None, c)
            f, s = int(fails[part].sum()), int(passes[part].sum())
            certain, start = (0.5 * (s == 0), 1) if version >= c else (0.3 * (f == 0), b)
            weight = (0.5 if version >= c else 0.7) * math.exp(
                math.lgamma(f + 1) + math.lgamma(s + start) - math.lgamma(f + s + 1 + start) + math.log(start)
            )
            always = certain if version >= c else 0.0
            failure += chances[c - 1] * (always + weight * (f + 1) / (f + s + 1 + start)) / (certain + weight)
        expected = entropy(chances) - failure * entropy(after_fail) - (1 - failure) * entropy(after_pass)
        assert bits[version] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("fails", "false", "most"), [(1.0, 0.0, 20), (1.0, 0.02, 25), (0.5, 0.02, 110)])
def test_flaky_bugs_are_found(fails: float, false: float, most: int) -> None:
    """20 of 20; docs/versions.md has 500 of each. Plain bisection finds a tenth of those that fail half of the time."""
    share, runs, _ = measure(bayesian, 400, fails, false, 20)
    assert share == 1.0
    assert runs < most


def test_ends_that_do_not_hold_are_said_so() -> None:
    for first, false, text in ((400, 0.0, "the bad end never fails"), (0, 0.0, "the good end fails every time")):
        assert bayesian(40, Bug(first, 1.0, false, random.Random(0)))[0] is None
        seen = Tally(40, [(39, GOOD)] * PATIENCE if first else [(39, BAD), *[(0, BAD)] * PATIENCE])
        stopped = step(seen, Model())
        assert isinstance(stopped, Stopped)
        assert text in stopped.reason
    assert step(Tally(2, [(1, UNKNOWN)]), EXACT) == Stopped("an end cannot be told")
    contradiction = step(Tally(5, [(4, BAD), (0, GOOD), (1, BAD), (3, GOOD)]), EXACT)
    assert isinstance(contradiction, Stopped)
    assert "more than one change" in contradiction.reason


# over the stored releases


def ask(question: Question, journal: Journal | None = None) -> Result:
    known = store.releases(question.package)
    attempt = Contracts(question.package, *split(question.wanted))
    span = between(known, *((question.bad, question.good) if question.fix else (question.good, question.bad)))
    return bisect(question, attempt.ends(span, question.fix), attempt, journal, lambda run, test: None, READ)


@pytest.mark.parametrize(
    ("good", "bad", "wanted", "first"),
    [
        ("0.5.3", NEWEST, "trtllm_mxint4_block_scale_moe:returns", "0.6.5"),
        ("0.5.3", NEWEST, "trtllm_bf16_moe:parameter.do_finalize", "0.6.5"),
        ("0.5.3", NEWEST, "trtllm_fp8_per_tensor_scale_moe:returns", "0.6.5"),
        ("0.5.0", NEWEST, "trtllm_fp8_block_scale_moe:parameter.fp8_quantization_type", "0.6.4"),
        ("0.5.3", NEWEST, "trtllm_fp4_block_scale_moe:parameter.tile_tokens_dim", "0.6.0"),
        ("0.5.3", NEWEST, "trtllm_fp4_block_scale_moe:parameter.gated_act_type", "0.6.3"),
        ("0.5.3", NEWEST, "cutlass_fused_moe:parameter.use_packed_weights", "0.6.0"),
        ("0.5.3", NEWEST, "cutlass_fused_moe:parameter.use_fused_finalize", "0.6.15"),
        ("0.5.3", NEWEST, "cutlass_fused_moe:parameter.use_wfp4afp8_humming", "0.6.18"),
        ("0.5.3", "0.6.16.post2", "cutlass_fused_moe:parameter.use_wfp4afp8_humming", "0.6.16"),
        ("0.6.8.post1", "0.6.11.post2", "RoutingMethodType:value.Unspecified", "0.6.11"),
        ("0.5.3", "0.6.8", "RoutingMethodType:value.Unspecified", "0.6.8"),
        ("0.6.0", "0.6.13", "core.ActivationType:value.Identity", "0.6.13"),
        ("0.5.3", NEWEST, "RoutingMethodType:member.TopKSigmoid", "0.6.18"),
        ("0.5.3", NEWEST, "QuantVariant:exists", "?"),
        ("0.7.0", NEWEST, "prepare_bgmv_moe:default.backend", "0.7.2"),
        ("0.6.15", "0.6.16.post2", "interleave_moe_scales_for_sm90_mixed_gemm:body", "0.6.16"),
        ("0.6.16.post2", "0.6.17", "interleave_moe_scales_for_sm90_mixed_gemm:body", "0.6.16.post3"),
    ],
)
def test_the_drift_of_flashinfer_is_found_by_bisecting_contracts(good: str, bad: str, wanted: str, first: str) -> None:
    question = Question(FLASHINFER, good, bad, MOE + wanted)
    if first == "?":
        with pytest.raises(MoecheckError, match="not there at both ends"):
            ask(question)
        return
    result = ask(question)
    assert result.first == first
    assert len(result.runs) <= math.ceil(math.log2(len(result.releases)))  # both ends were read before


def test_the_check_of_the_global_scale_came_with_0_6_11() -> None:
    """On an H200 0.6.8.post1 takes [num_experts], 0.6.11.post2 refuses it (vllm#41711)."""
    source = "flashinfer/data/csrc/nv_internal/tensorrt_llm/thop/fp4Quantize.cpp"
    result = ask(Question(FLASHINFER, "0.5.0", NEWEST, f"{source}:check.globalScale should have shape"))
    assert (result.before, result.first) == ("0.6.10.post1", "0.6.11")


def test_a_fix_is_the_first_release_without_it() -> None:
    result = ask(Question(FLASHINFER, "0.6.17", "0.6.16", MOE + "cutlass_fused_moe:parameter.use_wfp4afp8_humming", fix=True))
    assert (result.before, result.first) == ("0.6.16.post2", "0.6.16.post3")


def test_ends_in_the_wrong_order_or_unknown_are_refused() -> None:
    for first, last, hint in (
        ("0.6.5", "0.6.4", "not older"),
        ("0.4.0", "0.6.4", "none of the"),
        ("0.6.4", "9", "none of the"),
    ):
        with pytest.raises(MoecheckError, match=hint):
            between(store.releases(FLASHINFER), first, last)
    assert between(("1.0", "1.1rc1", "1.1", "2.0rc1"), "1.0", "2.0rc1") == ("1.0", "1.1", "2.0rc1")


# journal, commands, report

VERSIONS = tuple(f"1.{i}" for i in range(40))
QUESTION = Question("lib", "1.0", "1.39", "does it work?")


def flaky(asked: list[str]) -> Callable[[str], Outcome]:
    """Fails half of the time from 1.17 on; 1.15 and 1.16 do not install. The answer depends on how often it was asked."""

    def attempt(version: str) -> Outcome:
        asked.append(version)
        minor = int(version[2:])
        if minor in (15, 16):
            return Outcome(UNKNOWN, "no wheel")
        dice = random.Random(f"{version} {asked.count(version)}").random()
        return Outcome(BAD, "exit 1") if minor >= 17 and dice < 0.5 else Outcome(GOOD, "exit 0")

    return attempt


def search(path: Path, attempt: Callable[[str], Outcome]) -> Result:
    journal = Journal(path, QUESTION)
    try:
        return bisect(QUESTION, VERSIONS, attempt, journal, lambda run, test: None, Model())
    finally:
        journal.close()


def test_an_unknown_stretch_stays_under_suspicion(tmp_path: Path) -> None:
    result = search(tmp_path / "j", flaky([]))
    assert isinstance(result.answer, Found)
    assert [result.releases[s] for s in result.answer.suspects] == ["1.15", "1.16", "1.17"]
    assert (result.before, result.first) == ("1.14", "1.17")
    assert "one of 1.15, 1.16, 1.17" in report(result, "again")


@pytest.mark.parametrize("seed", range(10))
def test_killed_anywhere_and_resumed_no_run_is_repeated(tmp_path: Path, seed: int) -> None:
    """A kill leaves any prefix of the journal's bytes."""
    asked: list[str] = []
    whole = search(tmp_path / "whole", flaky(asked))
    data = (tmp_path / "whole").read_bytes()
    cut = random.Random(seed).randrange(len(data))
    (tmp_path / "cut").write_bytes(data[:cut])
    kept = max(data[:cut].count(b"\n") - 1, 0)
    again = asked[:kept]
    result = search(tmp_path / "cut", flaky(again))
    assert again == asked
    assert (result.answer, result.first, len(result.runs)) == (whole.answer, whole.first, len(whole.runs))


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    search(tmp_path / "j", flaky([]))
    with pytest.raises(RunFolderError, match="another question"):
        Journal(tmp_path / "j", Question("lib", "1.1", "1.39", "does it work?"))
    held = Journal(tmp_path / "j", QUESTION)
    with pytest.raises(RunFolderError, match="in use"):
        Journal(tmp_path / "j", QUESTION)
    held.close()
    (tmp_path / "no").write_text('{"a": 1}\n')
    with pytest.raises(RunFolderError, match="not the journal"):
        Journal(tmp_path / "no", QUESTION)


@pytest.mark.parametrize(
    ("code", "answer"),
    [("0", GOOD), ("1", BAD), ("2", UNKNOWN), ("125", UNKNOWN), ("200", UNKNOWN), ("__import__('os').abort()", UNKNOWN)],
)
def test_a_command_is_bad_with_the_code_of_the_first_failure(code: str, answer: Answer) -> None:
    """Another code is another failure, and no evidence for this one."""
    run = [sys.executable, "-SIc", "import sys; sys.exit({version})"]
    assert Command(run, 60, code=1)(code).answer is answer


def test_a_command_that_hangs_or_is_not_there() -> None:
    assert Command([sys.executable, "-SIc", "import time; time.sleep(60)"], 0.2)("1").answer is UNKNOWN
    with pytest.raises(MoecheckError, match="cannot be run"):
        Command(["no-such-program"], 1)("1")


def test_the_command_line_bisects_and_tells(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--good", "0.5.3", "--bad", "newest", "--contract", MOE + "trtllm_mxint4_block_scale_moe:returns")
    first = moecheck("bisect", FLASHINFER, *options, "--journal", str(tmp_path / "j"))
    assert first.code == 0
    assert "introduced in 0.6.5**" in first.out
    assert "last release without the change: 0.6.4" in first.out
    assert "trtllm_mxint4_block_scale_moe: changed return: value -> list[1] or list[3]" in first.out
    assert first.err.count(" bit ") == 5
    again = moecheck("bisect", FLASHINFER, *options, "--journal", str(tmp_path / "j"))
    assert "introduced in 0.6.5**" in again.out
    assert " bit " not in again.err
    assert "give either" in moecheck("bisect", FLASHINFER, "--good", "0.5.3", "--bad", "newest").err


def test_a_command_that_hears_of_no_version_is_refused(moecheck: Callable[..., Any]) -> None:
    """A typo in {version}: the same program ran 63 times on nothing that changes, and then nothing could be told."""
    answer = moecheck("bisect", FLASHINFER, "--good", "0.6.13", "--bad", "0.6.16", "--command", "true {versoin}")
    assert answer.code == 3
    assert "does the same for every version: write {version}" in answer.err


def test_the_command_line_bisects_a_command_both_ways(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    """Introduced in 0.6.16, fixed in 0.6.16.post3, as the script says; it fails seven of ten times."""
    script = tmp_path / "try.py"
    script.write_text(
        "import random, sys\n"
        "bad = sys.argv[1] in ('0.6.16', '0.6.16.post1', '0.6.16.post2')\n"
        "sys.exit(bad and random.random() < 0.7)\n"
    )
    command = f"{sys.executable} -SI {script} {{version}}"
    ends = ("--good", "0.6.13", "--bad", "0.6.16.post1", "--find-fix")
    answer = moecheck("bisect", FLASHINFER, *ends, "--command", command)
    assert answer.code == 0
    assert "introduced in 0.6.16**" in answer.out
    assert "fixed in 0.6.16.post3**" in answer.out
