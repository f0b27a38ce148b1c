"""pytest-xdist: several pytest processes, one journal, and a device for each.

The controller holds the journal's lock; the workers append under a second one. All of them plan what was left when the
controller started: a worker that replaces a dead one must collect the same tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from harness import device
from harness.errors import MoecheckError
from harness.journal import Joined, Journal
from harness.verdict import Verdict

LOSES = "loses tests after a crash of a pytest process (pytest-xdist #1371)"
REFUSED = dict.fromkeys(("loadscope", "loadfile", "loadgroup"), LOSES) | {"each": "judges and records every case several times"}
PROPERTY = "moecheck_verdict"


def refuse(config: pytest.Config) -> None:
    """UsageError for the ways to distribute that lose or double verdicts."""
    mode = getattr(config.option, "dist", "no")
    if mode in REFUSED:
        raise pytest.UsageError(f"--dist {mode} {REFUSED[mode]}; use --dist load or worksteal")
    if mode != "no" and config.option.soak:
        raise pytest.UsageError("--soak is one process that judges every case; it does not go with -n")


class Controller:
    """A pytest plugin of the process that hands out the tests."""

    def __init__(self, config: pytest.Config, run_dir: Path | None) -> None:
        self._config = config
        self._locks = tempfile.TemporaryDirectory(prefix="moecheck-")
        self._journal = None if run_dir is None else Journal(run_dir)
        self._size = 0 if self._journal is None else self._journal.path.stat().st_size

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker where the locks are, and how much of the journal was there when the run began."""
        node.workerinput["moecheck"] = {"locks": self._locks.name, "size": self._size}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A worker's verdict travels in its report; whoever watches the run hears of it here."""
        told = [text for name, text in report.user_properties if name == PROPERTY]
        report.user_properties = [p for p in report.user_properties if p[0] != PROPERTY]
        if told and report.when == "setup":
            self._config.hook.pytest_moecheck_verdict(verdict=Verdict.from_json(json.loads(str(told[0]))))

    def pytest_unconfigure(self) -> None:
        """Release the journal."""
        if self._journal is not None:
            self._journal.close()
        self._locks.cleanup()


def worker_input(config: pytest.Config) -> dict[str, Any] | None:
    """What the controller told this process; None in a pytest that runs alone."""
    found: dict[str, Any] | None = getattr(config, "workerinput", {}).get("moecheck")
    return found


def joined(given: dict[str, Any], run_dir: Path) -> Joined:
    """The run's journal, as a worker sees it."""
    return Joined(run_dir, int(given["size"]), Path(given["locks"]) / "append")


def take_device(given: dict[str, Any]) -> int:
    """The lock on the device that this process uses from now on; MoecheckError if there are more processes than devices."""
    names = device.visible()
    for name in names:
        lock = os.open(Path(given["locks"]) / f"device-{name}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        device.use(name)
        return lock
    raise MoecheckError(
        f"pytest -n: this machine has {len(names)} devices; two processes on one would be blamed for each other's memory and "
        f"time; use -n {len(names)} or less"
    )
