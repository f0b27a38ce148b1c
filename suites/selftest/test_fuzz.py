"""Whatever stands in a file or an id, moecheck reads it or refuses it with one clear message, and does nothing else.

A few inputs of the fuzz (`make fuzz` runs thousands), the inputs that once got past a reader, and the fuzz's own watch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import config, journal, plan
from harness.case import Case
from harness.errors import CaseError, ConfigError, RunFolderError
from harness.fuzz import watch
from harness.fuzz.judge import complaint
from harness.fuzz.mutate import LAUGHS
from harness.fuzz.targets import CASE, SUBJECT, Attempt, Targets, failure
from harness.select import Item

REAL = CASE.format("real")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return Targets(tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=max(120, settings().max_examples), deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.integers(0, 7), seed=st.integers(0, 2**32))
def test_malformed_input_is_read_or_clearly_refused(targets: Targets, name: int, seed: int) -> None:
    """The command line is asked too, one refusal in eight."""
    attempt = targets.attempt(targets.names[name], Random(seed))
    _, problem = complaint(attempt, targets.folder, commands=seed % 8 == 0)
    assert not problem, f"{attempt.target}: {problem}"


def test_every_kind_of_input_is_refused_and_read_by_turns(targets: Targets) -> None:
    """A fuzz whose inputs are all unreadable, or all valid, tests one branch."""
    for name in dict.fromkeys(targets.names):
        answers: set[bool] = set()
        for seed in range(200):
            answers.add(complaint(targets.attempt(name, Random(seed)), targets.folder, commands=False)[0])
            if len(answers) == 2:
                break
        assert answers == {True, False}, name


def outside(folder: Path) -> Path:
    return folder.parent / "outside" / "secret"


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: os.system("true"), "os.system"),
        (lambda folder: outside(folder).with_name("new").write_text("x"), "for writing"),
        (lambda folder: outside(folder).read_text(), "leads outside"),
        (lambda folder: os.rename(folder, folder.parent / "moved"), "os.rename"),
        (lambda folder: exec(compile("1", str(folder / "repro.py"), "exec")), "ran code"),
        (lambda folder: (folder / "pwned").touch(), "payload"),
        (lambda folder: int("x"), "ValueError"),
        (lambda folder: Case.parse("moe"), "does not name plan.json"),
    ],
)
def test_the_fuzz_sees_what_no_reader_may_do(targets: Targets, read: Callable[[Path], Any], said: str) -> None:
    targets.attempt("case", Random(0))
    refused, problem = complaint(Attempt("x", lambda: read(targets.folder), "plan.json"), targets.folder)
    (targets.folder / "pwned").unlink(missing_ok=True)
    assert refused or said == "payload"
    assert said in problem


def test_the_fuzz_sees_a_reader_that_hangs(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LIMIT_S", 0.05)
    targets.attempt("case", Random(0))

    def endless() -> None:
        while True:
            pass

    assert "did not answer" in complaint(Attempt("x", endless), targets.folder)[1]


MODEL = 'hidden: 64\ninter: 32\nexperts: 4\ntop_k: 2\nrouting: default\nactivation: swiglu\nsource: "an example"\n'


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (MODEL.encode() + b"x: \xff\n", 8, "0xff"),
        (MODEL.encode() + b"x: \0\n", 8, "0x00"),
        (MODEL.replace("64", "9" * 5000).encode(), 1, "digits"),
        (MODEL.replace("64", "0x" + "f" * 5000).encode(), 1, "64 bits"),
        (MODEL.replace("32", "2001-99-99").encode(), 2, "month"),
        (MODEL.replace("32", "!!int x").encode(), 2, "invalid literal"),
        (MODEL.replace("32", "!!bool maybe").encode(), 2, "maybe"),
        (MODEL.replace("32", "!!python/object/apply:os.system ['true']").encode(), 2, "could not determine a constructor"),
        (MODEL.encode() + LAUGHS.encode(), 9, "aliases"),
        (MODEL.encode() + b"x: &a [*a]\n", 8, "aliases"),
        (MODEL.encode() + b"x: " + b"[" * 3000, 8, "levels"),
        (b"- " * 3000, 1, "levels"),
        (b"", 1, "a valid dictionary"),
        (MODEL.encode() + b"x: " + b"y" * 5000 + b"\n", 8, "known key"),
    ],
)
def test_yaml_that_no_parser_likes_is_located(tmp_path: Path, text: bytes, line: int, said: str) -> None:
    """Most raised something else than ConfigError, or named no line; the laughs unfold to gigabytes in a message."""
    file = tmp_path / "models" / "m.yaml"
    file.parent.mkdir()
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        config.production("m", tmp_path)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_yaml_file_that_is_no_file_is_named(tmp_path: Path) -> None:
    """A pipe would be waited for without end, a log of gigabytes read."""
    os.mkfifo(tmp_path / "known_issues.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        config.known_issues(tmp_path)
    (tmp_path / "known_issues.yaml").unlink()
    with (tmp_path / "known_issues.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="at most"):
        config.known_issues(tmp_path)


@pytest.mark.parametrize(
    "text", ["moe.bf16.t" + "9" * 5000, REAL.replace(".s0", ".s" + "9" * 4400), REAL + "\0", REAL + "\ud800"]
)
def test_a_case_id_that_no_integer_holds_is_refused(text: str) -> None:
    """int() of more than 4300 digits is a ValueError of its own."""
    with pytest.raises(CaseError) as caught:
        Case.parse(text)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "soon"},
        {"seconds": "1e999x"},
        {"case_id": 7},
        {"case_id": [REAL]},
        {"case_id": "moe.bf16"},
        {"reason": None},
        {"environment": []},
        {"environment": {"arch": 9}},
        {"rules": 5},
        {"findings": [{"check": "x", "text": 1}]},
        {"findings": [{"check": "x", "text": "y", "evidence": []}]},
        {"diagnosis": {"kind": 1, "text": "x"}},
        {"known": {"a": 1}},
    ],
)
def test_a_journal_line_of_wrong_types_is_located(tmp_path: Path, change: dict[str, Any]) -> None:
    """It was read, and the report of the run raised."""
    lines = [json.dumps(failure(CASE.format("exact")).to_json()), json.dumps({**failure(REAL).to_json(), **change})]
    (tmp_path / journal.NAME).write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError) as caught:
        journal.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / journal.NAME}:2: not a verdict: ")
    assert "--resume drops only a last line without its end" in str(caught.value)


@pytest.mark.parametrize("token", ["NaN", "1e999", "9" * 4400, "[" * 3000, '{"a":' * 3000, '"a", "seconds": 1'])
def test_a_journal_line_that_is_no_json_is_located(tmp_path: Path, token: str) -> None:
    """json reads NaN and 1e999 as floats, keeps the last of two keys, and raises RecursionError."""
    text = json.dumps(failure(REAL).to_json()).replace('"seconds": 0.5', f'"seconds": {token}')
    (tmp_path / journal.NAME).write_text(text + "\n")
    with pytest.raises(RunFolderError, match=r"journal\.jsonl:1: not a verdict"):
        journal.read(tmp_path)


def test_a_case_judged_twice_is_located(tmp_path: Path) -> None:
    """Two journals glued together: the run would count more verdicts than cases."""
    line = json.dumps(failure(REAL).to_json()) + "\n"
    (tmp_path / journal.NAME).write_text(line * 2)
    with pytest.raises(RunFolderError, match=r"journal\.jsonl:2: .* on line 1 already"):
        journal.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit_s": 10**400}, "64 bits"),
        ({"limit_s": -1}, "limit_s -1"),
        ({"limit_s": 1e300}, "limit_s 1e"),
        ({"limit_s": None}, "limit_s"),
        ({"checks": "two"}, "checks"),
        ({"checks": -1}, "checks -1"),
        ({"items": []}, "0 items"),
        ({"items": [{"case_id": "moe.bf16", "subject": SUBJECT}]}, "does not parse"),
        ({"items": [{"case_id": [REAL], "subject": SUBJECT}]}, "case_id"),
        ({"items": {"case_id": REAL}}, "Item"),
        ({"request": {"platform": "cpu", "tier": 1}}, "tier"),
        ({"request": []}, "Request"),
    ],
)
def test_a_plan_of_wrong_types_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """With a digest that fits: whoever edits the one can compute the other. The run would fail at its first case, or wait."""
    plan.Plan(plan.Request("cpu", "smoke"), 60.0, (Item(REAL, SUBJECT),)).save(tmp_path)
    file = tmp_path / plan.NAME
    data = {**json.loads(file.read_text()), **change}
    if isinstance(data["items"], list):
        data["digest"] = plan.digest_of(data["items"])
    file.write_text(json.dumps(data))
    with pytest.raises(RunFolderError) as caught:
        plan.load(tmp_path)
    assert str(caught.value).startswith(f"{file}: not a moecheck plan")
    assert said in str(caught.value)


def test_a_tier_that_would_divide_by_zero_or_wait_for_ever_is_refused(tmp_path: Path) -> None:
    text = (config.ROOT / "tiers" / "smoke.yaml").read_text()
    (tmp_path / "tiers").mkdir()
    for old, new in (("tp: 8", "tp: 0"), ("limit_s: 120", "limit_s: .inf"), ("limit_s: 120", "limit_s: .nan")):
        assert old in text
        (tmp_path / "tiers" / "smoke.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=r"smoke\.yaml:\d+"):
            config.tier("smoke", tmp_path)
