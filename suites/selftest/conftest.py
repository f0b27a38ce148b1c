"""What several self-tests ask for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from harness import cli

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
