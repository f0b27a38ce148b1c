"""pytest glue: a test that asks for the fixture `verdict` is run once per planned case, through the worker.

pytest suites/layer --platform cpu --tier smoke --backend torch_grouped_mm
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness import distributed, paths, plan, plan_cache
from harness.backends import discover
from harness.errors import MoecheckError
from harness.known import Outcome, outcome
from harness.latency import lane
from harness.latency.record import Timing
from harness.select import Item
from harness.session import Session, detected_platform, device_of, shard_of
from harness.verdict import Status, Verdict

_SESSION = pytest.StashKey[Session]()
_DEVICE = pytest.StashKey[int]()
_ERROR = pytest.StashKey[MoecheckError]()
OFF = "nothing is timed without --latency"
USER_ERROR = 3  # DESIGN section 7: our or the user's fault


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `moecheck run`, for plain pytest."""
    group = parser.getgroup("moecheck")
    group.addoption("--platform", help="platform file under configs/platforms (default: detected)")
    group.addoption("--tier", default="smoke", help="tier file under configs/tiers")
    group.addoption("--backend", action="append", default=[], help="backend to judge; repeatable")
    group.addoption("--op", action="append", default=[], help="operation to judge; repeatable")
    group.addoption("--case", action="append", default=[], help="case id or pattern with *; repeatable")
    group.addoption("--plugin", action="append", default=[], metavar="FILE.py", help="file that defines BACKENDS; repeatable")
    group.addoption("--soak", action="store_true", help="all cases in one child that is never recycled")
    group.addoption(
        "--latency", action="store_true", help="suites/perf: time the production cases, or the named ones, that pass"
    )
    group.addoption("--run-dir", help="run folder of `moecheck run`: its plan is run, its journal written")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse the xdist modes that lose tests; with the others, hold the journal for the workers."""
    distributed.refuse(config)
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        run_dir = config.getoption("--run-dir")
        try:
            config.pluginmanager.register(distributed.Controller(config, Path(run_dir) if run_dir else None))
        except (MoecheckError, OSError) as error:
            pytest.exit(f"moecheck: {error}", returncode=USER_ERROR)


def _make_session(config: pytest.Config) -> Session:
    option, given = config.getoption, distributed.worker_input(config)
    if run_dir := option("--run-dir"):
        folder = Path(run_dir)
        the_plan = plan.load(folder).share(shard_of(folder))
        _take_device(config, given, the_plan.request.platform)
        return Session(the_plan, folder, None if given is None else distributed.joined(given, folder))
    request = plan.Request(
        platform=option("--platform") or detected_platform(),
        tier=option("--tier"),
        backends=tuple(option("--backend")),
        ops=tuple(option("--op")),
        cases=tuple(option("--case")),
        plugins=tuple(str(Path(p).absolute()) if p.endswith(".py") else p for p in option("--plugin")),
        soak=option("--soak"),
    )
    _take_device(config, given, request.platform)
    rows = plan_cache.cached(paths.plans(), lambda text: _say(config, text))
    made = plan.make(request, discover(request.plugins), device_of(request.platform), rows=rows)
    return Session(made, None)


def _say(config: pytest.Config, text: str) -> None:
    if reporter := config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(f"moecheck: {text}")


def _take_device(config: pytest.Config, given: dict[str, Any] | None, platform: str) -> None:
    if given is not None and device_of(platform).kind == "cuda":
        config.stash[_DEVICE] = distributed.take_device(given)


def session_of(config: pytest.Config) -> Session:
    """The session of this pytest run, made when the first test wants it."""
    if _SESSION not in config.stash:
        config.stash[_SESSION] = _make_session(config)
    return config.stash[_SESSION]


def planned(config: pytest.Config) -> list[Item]:
    """What this pytest run is to judge; none where the plan cannot be made, which ends it after the collection."""
    try:
        return session_of(config).todo
    except MoecheckError as error:  # pytest.exit here would be a collection error with a traceback and exit code 2
        config.stash[_ERROR] = error
        return []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per planned item; of the ops in the module's OPS where it names some."""
    if "verdict" in metafunc.fixturenames:
        ops = getattr(metafunc.module, "OPS", None)
        items = [i for i in planned(metafunc.config) if ops is None or i.case_id.partition(".")[0] in ops]
        if "timing" in metafunc.fixturenames:
            if not metafunc.config.getoption("--latency"):
                metafunc.parametrize("verdict", [pytest.param(None, marks=pytest.mark.skip(reason=OFF))], ids=["off"])
                return
            items = lane.timed(session_of(metafunc.config).plan, items)
        ids = [f"{item.subject}:{item.case_id}" for item in items]
        metafunc.parametrize("verdict", items, ids=ids, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """End pytest where the plan could not be made."""
    if _ERROR in config.stash:
        pytest.exit(f"moecheck: {config.stash[_ERROR]}", returncode=USER_ERROR)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the worker."""
    if _SESSION in config.stash:
        config.stash[_SESSION].close()


@pytest.fixture
def timing(request: pytest.FixtureRequest, verdict: Verdict, tmp_path: Path) -> Timing:
    """How fast the subject of a verdict is; only what PASSED is timed."""
    if verdict.status is not Status.PASSED:
        pytest.skip(f"{verdict.status}: only correct kernels are timed")
    session = session_of(request.config)
    made = lane.Lane(session.device, session.plan.request.plugins, tmp_path, session.plan.limit_s)
    return made.time(Item(verdict.case_id, verdict.subject))


@pytest.fixture
def verdict(request: pytest.FixtureRequest) -> Verdict:
    """The verdict on one planned item; a skip or a known failure ends the test here, the rest is the test's to assert."""
    item: Item = request.param
    try:
        judged = session_of(request.config).judge(item)
    except MoecheckError as error:
        _stop(request, f"moecheck: {error}")
    if distributed.worker_input(request.config) is not None:
        request.node.user_properties.append((distributed.PROPERTY, json.dumps(judged.to_json())))
    request.config.hook.pytest_moecheck_verdict(verdict=judged)
    if outcome(judged) is Outcome.SKIPPED:
        pytest.skip(f"{judged.status}: {judged.reason}")
    if outcome(judged) is Outcome.KNOWN:
        pytest.xfail(f"known issue {judged.known}: {judged.status} {judged.reason}")
    return judged


def _stop(request: pytest.FixtureRequest, text: str) -> NoReturn:
    """End the whole run. A worker of pytest-xdist that just left would be an error of its controller's, without the text."""
    if distributed.worker_input(request.config) is None:
        pytest.exit(text, returncode=USER_ERROR)
    request.session.shouldstop = text
    pytest.fail(text, pytrace=False)


class Hooks:
    """Our own hook: the CLI listens to it for its progress bar."""

    @pytest.hookspec
    def pytest_moecheck_verdict(self, verdict: Verdict) -> None:
        """A verdict was reached and recorded."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register `Hooks`."""
    pluginmanager.add_hookspecs(Hooks)
