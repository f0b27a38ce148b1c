"""What several self-tests ask for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from harness import cli
from harness.backends import discover
from harness.case import Case
from harness.dump.read import folders
from harness.dump.readers import READERS
from harness.entry import planting, twins
from harness.inputs import make_inputs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job that a shell put in the background: its children hear no Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Answer(NamedTuple):
    """What the console script left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def moecheck(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The console script, in this process."""

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["moecheck", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Answer(caught.value.code or 0, *capsys.readouterr())  # type: ignore[arg-type]

    return call


class Recorded(Exception):
    """The call has been written."""


class Recorder(NamedTuple):
    """FlashInfer's own recorder on a call of an adapter to its twin: record(name, damage) -> its folder. subject: the
    backend's name with {} for `name`; cases: ids by name; positional: arguments that users pass so; fixed: what the adapter
    leaves to its default; damage: changes the arguments."""

    folder: Path
    subject: str
    cases: Mapping[str, str]
    positional: tuple[str, ...]
    fixed: Mapping[str, Any]

    def __call__(self, name: str, damage: Callable[[dict[str, Any]], None] = lambda given: None) -> Path:
        from flashinfer import api_logging

        case, backend = Case.parse(self.cases[name]), discover()[self.subject.format(name)]
        entry = next(e for e in backend.entries if e.rpartition(".")[2] in READERS)
        twin = twins()[entry]

        def recorded(*args: Any, **given: Any) -> None:
            given |= self.fixed
            damage(given)
            args = (*args, *(given.pop(name) for name in self.positional))
            where = api_logging._dump_function_inputs(twin, entry.rpartition(".")[2], args, given)
            with suppress(Exception):  # what it refuses was written before, as in an incident
                api_logging._dump_function_outputs(where, twin(*args, **given))
            raise Recorded

        with planting({entry: recorded}), pytest.raises(Recorded):
            backend.prepare(case, make_inputs(case)).call()
        return folders(self.folder)[-1]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """recorder(subject, cases, *positional, **fixed)."""
    logging = pytest.importorskip("flashinfer.api_logging", reason="the recorder is FlashInfer's")
    monkeypatch.setattr(logging, "_DUMP_DIR", str(tmp_path / "dumps"))

    def make(subject: str, cases: Mapping[str, str], *positional: str, **fixed: Any) -> Recorder:
        return Recorder(tmp_path / "dumps", subject, cases, positional, fixed)

    return make
