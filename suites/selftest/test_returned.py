"""What entry points return in real runs: told by `resolve`, kept in verdicts and contracts, compared."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import pytest
import torch

from harness import entry, journal, pipeline
from harness.backends.base import CPU
from harness.backends.torch_grouped_mm import BACKENDS
from harness.case import Case
from harness.journal import Journal
from harness.returned import form, general, kind
from harness.verdict import Comparison, Stage, Status, Verdict
from harness.versions import observed, store
from harness.versions.diff import Effect, Kind, diff

CASE = Case.parse("moe.bf16.t5.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")
PACKAGE, MOE = "flashinfer-python", "flashinfer.fused_moe.cutlass_fused_moe"
AGREES = Comparison("real", 1, 0, 0, 6, 1, 2, 0, 0, 0, ())


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


class Pair(NamedTuple):
    """As torch.return_types are."""

    values: Any
    indices: Any


@pytest.mark.parametrize(
    ("value", "text", "stored", "what"),
    [
        (None, "none", "none", "none"),
        (torch.zeros(3, 4), "float32[3, 4]", "float32[2d]", "value"),
        (torch.zeros((), dtype=torch.bfloat16), "bfloat16[]", "bfloat16[0d]", "value"),
        ([torch.zeros(0, 7)], "list[float32[0, 7]]", "list[float32[2d]]", "list"),
        (Pair(torch.zeros(2), 3), "tuple[float32[2], int]", "tuple[float32[1d], int]", "tuple"),
        ({"out": torch.zeros(2)}, "dict[out: float32[2]]", "dict[out: float32[1d]]", "dict"),
        ([[[1]]], "list[list[list]]", "list[list[list]]", "list"),
        (object(), "object", "object", "object"),
    ],
)
def test_a_value_is_described_without_being_read(value: object, text: str, stored: str, what: str) -> None:
    assert (form(value), general(form(value)), kind(form(value))) == (text, stored, what)


def test_a_long_list_stays_short() -> None:
    assert form([torch.zeros(1)] * 99).endswith("and 91 more]")


def library(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    module = ModuleType("moecheck_toy_library")
    module.layer = function  # type: ignore[attr-defined]
    module.Enum = Status  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_verdict_says_what_the_library_returned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the adapter and in what it prepared; a death keeps what was seen, and the oracle's own work is none of it."""
    library(monkeypatch, lambda x: [x.to(torch.bfloat16), None])

    def prepare(case: Case, inputs: Any) -> Any:
        layer = entry.resolve("moecheck_toy_library.layer", "cuda")
        assert entry.resolve("moecheck_toy_library.Enum", "cuda") is Status
        launch = BACKENDS[0].prepare(case, inputs)
        layer(inputs.x[:2])
        return replace(launch, call=lambda: layer(launch.call())[0])

    backend = replace(BACKENDS[0], name="toy", prepare=prepare, script=None)
    verdict = pipeline.run(CASE, backend, CPU)
    assert verdict.status is Status.PASSED
    assert verdict.returned == {"moecheck_toy_library.layer": "list[bfloat16[2, 64], none]"}
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    dying = replace(backend, prepare=lambda c, i: prepare(c, i) and 1 / 0)
    died = pipeline.run(CASE, dying, CPU)
    assert died.status is Status.CRASHED
    assert died.returned == verdict.returned
    assert pipeline.run(CASE, BACKENDS[0], CPU).returned == {}


def test_an_old_journal_has_no_returns_and_is_read() -> None:
    old = said({}).to_json()
    del old["returned"]
    assert journal.typed(old).returned == {}


def said(returned: dict[str, str], version: str = "0.6.5", status: Status = Status.PASSED) -> Verdict:
    where = {"arch": "sm90", PACKAGE: version}
    return Verdict(CASE.id, "flashinfer_cutlass", status, Stage.DONE, "", (), AGREES, environment=where, returned=returned)


@pytest.fixture
def contracts(tmp_path: Path) -> Path:
    root = tmp_path / "contracts"
    (root / PACKAGE).mkdir(parents=True)
    for name in ("entries.yaml", "0.6.4.json", "0.6.5.json"):
        shutil.copy(store.ROOT / PACKAGE / name, root / PACKAGE)
    return root


def test_a_return_is_stored_once_and_diffed(contracts: Path) -> None:
    runs = [said({MOE: "list[bfloat16[5, 64]]"}), said({MOE: "list[bfloat16[33, 8]]", "no.such": "none"})]
    assert observed.record(runs, contracts) == [f"{PACKAGE} 0.6.5: {MOE} returned list[bfloat16[2d]]"]
    assert observed.record(runs, contracts) == []
    assert observed.record([said({MOE: "none"}, "9.9"), said({})], contracts) == []
    old, new = (store.load(PACKAGE, v, contracts) for v in ("0.6.4", "0.6.5"))
    assert new.entries[MOE].seen == ("list[bfloat16[2d]]",)
    real = store.load(PACKAGE, "0.6.5")
    assert replace(new, entries={**new.entries, MOE: real.entries[MOE]}) == real
    for form_before, effect in (("bfloat16[2d]", Effect.BREAKS), ("list[float16[2d]]", Effect.CHECK), ("", None)):
        before = replace(old, entries={MOE: replace(new.entries[MOE], seen=(form_before,) if form_before else ())})
        after = replace(new, entries={MOE: new.entries[MOE]})
        user = replace(BACKENDS[0], entries=(MOE,))
        found = [(c.kind, c.effect) for c in diff(before, after, [user])]
        assert found == ([(Kind.RETURN, effect)] if effect else [])


def test_another_kind_than_before_is_a_broken_contract(contracts: Path) -> None:
    same = said({MOE: "list[bfloat16[5, 64]]"})
    assert observed.checked(same, contracts) == same  # its twin returns a list
    observed.record([same], contracts)
    assert observed.checked(said({MOE: "list[bfloat16[7, 8]]"}), contracts).notes == ()
    other = observed.checked(said({MOE: "list[float16[7, 8]]"}), contracts)
    assert (other.status, [n.check for n in other.notes]) == (Status.PASSED, ["returned"])
    assert (
        "returned list[float16[7, 8]]; what flashinfer-python 0.6.5 returned before: list[bfloat16[2d]]" in other.notes[0].text
    )
    for came in ("bfloat16[5, 64]", "tuple[bfloat16[5, 64]]"):
        broken = observed.checked(said({MOE: came}, status=Status.WRONG), contracts)
        assert broken.status is Status.CONTRACT
        assert len(broken.findings) == 2  # the release's own past, and the twin
    assert observed.checked(said({MOE: "Array"}), contracts).status is Status.PASSED  # none of ours to take apart
    assert observed.checked(said({"unknown.entry": "none"}, "1.0"), contracts).notes == ()


def test_the_command_records_a_run(
    tmp_path: Path, contracts: Path, monkeypatch: pytest.MonkeyPatch, moecheck: Callable[..., Answer]
) -> None:
    monkeypatch.setattr(observed.record, "__defaults__", (contracts,))
    folder = tmp_path / "run"
    folder.mkdir()
    record = Journal(folder)
    record.append(said({MOE: "list[bfloat16[5, 64]]"}))
    record.close()
    answer = moecheck("contracts", "record", str(folder))
    assert answer.code == 0, answer
    assert answer.out == f"{PACKAGE} 0.6.5: {MOE} returned list[bfloat16[2d]]\n"
    assert "nothing new" in moecheck("contracts", "record", str(folder)).err
