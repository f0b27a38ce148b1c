"""What entry points return in real runs: told by `resolve`, kept in verdicts and contracts, compared."""

from __future__ import annotations

import inspect
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

from harness import config, entry, journal, pipeline, plan
from harness.backends import discover
from harness.backends.base import CPU
from harness.backends.torch_grouped_mm import BACKENDS
from harness.case import Case
from harness.journal import Journal
from harness.plan import Request
from harness.returned import form, general, kind
from harness.session import device_of
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


def test_names_that_are_no_entries_are_kept_and_compared_too(contracts: Path) -> None:
    """An operator out of a compiled module, a helper that nobody listed: there is no source to read, but it ran."""
    name, other = "flashinfer.compiled.op", "vllm.third_party.op"
    assert observed.record([said({name: "none", other: "none"})], contracts) == [f"{PACKAGE} 0.6.5: {name} returned none"]
    stored = store.load(PACKAGE, "0.6.5", contracts)
    assert stored.seen == {name: ("none",)}
    assert name not in stored.entries
    assert observed.checked(said({name: "none"}), contracts).notes == ()
    assert observed.checked(said({name: "list[none]"}), contracts).notes != ()
    old = store.load(PACKAGE, "0.6.4", contracts)
    before, after = old.with_returns({name: ["list[none]"]}), old.with_returns({name: ["bfloat16[2d]"]})
    user = replace(BACKENDS[0], entries=(name,))
    assert [(c.entry, c.kind, c.effect) for c in diff(before, after, [user])] == [(name, Kind.RETURN, Effect.BREAKS)]
    assert diff(before, old, [user]) == ()  # it did not run there
    anew = store.load(PACKAGE, "0.6.4", contracts)
    observed.record([said({name: "none", MOE: "list[bfloat16[1, 2]]"}, "0.6.4")], contracts)
    kept = observed.kept(anew, contracts)  # as `contracts extract` does
    assert (kept.seen[name], kept.entries[MOE].seen) == (("none",), ("list[bfloat16[2d]]",))


def test_the_commands_compare_what_real_runs_returned(monkeypatch: pytest.MonkeyPatch, moecheck: Callable[..., Answer]) -> None:
    forms, load = {"0.6.3": "bfloat16[2d]", "0.6.4": "list[bfloat16[2d]]"}, store.load
    monkeypatch.setattr(store, "load", lambda package, version: load(package, version).with_returns({MOE: [forms[version]]}))
    text = f"breaks us  {MOE}: changed return: in real runs: bfloat16[2d] -> list[bfloat16[2d]]"
    preflight = (
        "preflight",
        f"{PACKAGE}==0.6.4",
        "--from",
        "0.6.3",
        "--no-resolve",
        "--backend",
        "flashinfer_cutlass_bf16_twin",
    )
    for arguments in (("contracts", "diff", PACKAGE, "0.6.3", "0.6.4"), preflight):
        answer = moecheck(*arguments)
        assert answer.code == 1
        assert text in answer.out
    assert "returned in real runs: bfloat16[2d]" in moecheck("contracts", "show", PACKAGE, "0.6.3", MOE).out


def weight(case: Case) -> int:
    """How long it takes, in no unit."""
    shape = case.shape
    return shape.tokens * shape.hidden * (1 + shape.inter * shape.experts)


def test_every_library_backend_tells_what_its_functions_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters over their twins, in the place of the library: each function that one calls is in its verdict, of the kind
    that the twin's annotation promises, and none of those listed is called by nobody."""
    twinned = {n: b for n, b in discover().items() if b.entries and n.endswith("_twin")}
    items = plan.make(Request("cpu", "smoke", tuple(twinned), (), (), (), None), twinned, device_of("cpu")).items
    planned = sorted(((Case.parse(i.case_id), i.subject) for i in items), key=lambda p: weight(p[0]), reverse=True)
    cases = {subject: case for case, subject in planned}  # the lightest comes last
    functions = {name: f for name, f in entry.twins().items() if not inspect.isclass(f)}
    called = set[str]()
    for name, backend in twinned.items():
        with entry.planting({n: entry.observed(n, f) for n, f in functions.items()}):
            verdict = pipeline.run(cases[name], backend, CPU)
        assert backend.entries[0] in verdict.returned, name
        assert set(verdict.returned) <= set(backend.entries), name
        assert observed.checked(verdict) == verdict, name
        called |= {n.rpartition(".")[2] for n in verdict.returned}
    listed = {n.rpartition(".")[2] for b in twinned.values() for n in b.entries if n in functions}
    assert called == listed


def test_what_the_runs_on_accelerators_returned_is_stored() -> None:
    """The evidence of configs/baselines; of vLLM's layers, which have no twins, each entry of each backend that ran."""
    seen = dict[str, set[str]]()
    for path in sorted((config.ROOT / "baselines").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            for name, text in row.get("returned", {}).items():
                package = "vllm" if name.startswith("vllm.") else PACKAGE
                assert general(text) in store.load(package, row["environment"][package]).returns[name], name
                seen.setdefault(row["subject"], set()).add(name)
    layers = [b for b in discover().values() if b.library == "vllm" and not b.twinned]
    assert len(layers) >= 13
    for backend in layers:
        assert set(backend.entries) <= seen[backend.name], backend.name
