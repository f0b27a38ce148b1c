"""Cases judged in a fresh interpreter over an overlay: its supervisor and workers import the overlay's packages, not ours.

python -P -m harness.versions.judging FOLDER      FOLDER/order.json says what; FOLDER/journal.jsonl has the verdicts
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.reading import parse_json, printable, regular
from harness.verdict import Verdict
from harness.versions.uv import NO_ROOM

if TYPE_CHECKING:
    from harness.select import Item
    from harness.versions.env import Overlay

ROOT = Path(__file__).resolve().parents[2]
ORDER, ANSWER, LOG, JOURNAL = "order.json", "answer.json", "child.log", "journal.jsonl"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_ANSWER = 1 << 20
MAX_ORDER = 1 << 28  # as a plan's file
IMPORT_S = 300.0  # FlashInfer with torch takes 5..20 s from a cold disk
START_S = 240.0  # two interpreters that import torch, on a loaded machine, and the end of the last case
# a hook of the user's repository sets these (git rev-parse --local-env-vars), and git would work there
OF_A_REPOSITORY = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}
TAIL = 2000  # characters of what it said before it died
_IMPORT = """
import importlib, os, sys
folders, names = sys.argv[1].split(os.pathsep), sys.argv[2:]
for name in names:
    module, rest, attribute = name, [], None
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if "." not in module or error.name is None or not (module + ".").startswith(error.name + "."):
                raise
            module, _, attribute = module.rpartition(".")
            rest.insert(0, attribute)
    for attribute in rest:
        if not hasattr(found, attribute):
            sys.exit(f"it has no {name}")
        found = getattr(found, attribute)
if any(folders):
    tops = {name.partition(".")[0] for name in names}
    modules = [sys.modules[top] for top in tops]
    places = {place for m in modules for place in getattr(m, "__path__", [getattr(m, "__file__", None) or "built in"])}
    if not any(place.startswith(folder + os.sep) for place in places for folder in folders):
        sys.exit(f"it has no {', '.join(sorted(tops))}: what is imported is {min(places)}")
"""


@dataclass(frozen=True)
class Terms:
    """How cases are judged. entries: dotted names of the library that must be there, else the release cannot be told."""

    platform: str
    plugins: tuple[str, ...] = ()
    limit_s: float = 300.0
    checks: int | None = None
    repeats: int = 0
    entries: tuple[str, ...] = ()


def judge(overlay: Overlay, item: Item, platform: str, terms: Terms | None = None) -> Verdict:
    """The verdict of one case over the overlay. CannotTell where the release does not import or lacks an entry point,
    MoecheckError for a user's fault."""
    return judge_all(overlay, [item], terms or Terms(platform))[0]


def judge_all(overlay: Overlay, items: Sequence[Item], terms: Terms, folder: Path | None = None) -> list[Verdict]:
    """The verdicts of all items, in one child interpreter; `folder` keeps its journal, and what it already holds is not
    judged again."""
    if folder is None:
        with _written(Path(tempfile.gettempdir())):
            made = tempfile.TemporaryDirectory(prefix="moecheck-")
        with made as name:
            return judge_all(overlay, items, terms, Path(name))
    importable(overlay, terms.entries)
    order = {"items": [asdict(i) for i in items], "terms": asdict(terms), "parent": os.getpid()}
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ANSWER).unlink(missing_ok=True)
        (folder / ORDER).write_text(json.dumps(order))
    command = [sys.executable, "-P", "-m", "harness.versions.judging", str(folder)]
    limit = START_S + len(items) * (terms.limit_s + START_S)
    with (folder / LOG).open("wb") as log:
        code = _run(command, overlay, limit, log.fileno())
    verdicts = _verdicts(folder)
    _told(overlay, folder, code)
    return [verdicts[item.case_id, item.subject] for item in items]


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OverlayError(f"{folder}: cannot be written: {error.strerror}; free some room") from error


def importable(overlay: Overlay, entries: Iterable[str] = ()) -> None:
    """CannotTell unless what was asked for imports over the overlay, and has those of the entry points that are its own. A
    checkout does not say which modules are its own: one of those imported must lie in it, not in what is installed."""
    tops = {top for name in overlay.pins for top in _modules([str(overlay.path)], name)}
    wanted = [*sorted(tops), *sorted(e for e in entries if not tops or e.partition(".")[0] in tops)]
    inside = "" if tops or not overlay.packages else os.pathsep.join(map(str, overlay.folders))
    if inside and not wanted:
        wanted = sorted({top for name in overlay.pins for top in _modules(sys.path, name)})
    mark = overlay.path.with_suffix(".imports")  # beside it: a release that imported once does so again
    said = " ".join([*wanted, *(["inside"] if inside else [])])
    if not wanted or (overlay.packages and mark.is_file() and said in mark.read_text().splitlines()):
        return
    command = [sys.executable, "-P", "-c", _IMPORT, inside, *wanted]
    with tempfile.TemporaryFile() as output:
        code = _run(command, overlay, IMPORT_S, output.fileno())
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if code:
        what = ", ".join(f"{n}=={v}" for n, v in overlay.pins.items())
        _roomy(what, text)
        last = text.splitlines()[-1] if text else ""
        how = (
            f"within {IMPORT_S:.0f} s" if code == -signal.SIGKILL else f"here: {printable(last)[:300] or f'exit status {code}'}"
        )
        raise CannotTell(f"{what}: {last}" if last.startswith("it has no ") else f"{what} does not import {how}")
    if not overlay.packages:  # what is installed may be another tomorrow
        return
    with mark.open("a") as file:
        file.write(f"{said}\n")


def environment(overlay: Overlay) -> dict[str, str]:
    """Of a child that sees the overlay's packages first, and moecheck as this process does."""
    ours = [] if str(ROOT) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) else [str(ROOT)]
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = os.pathsep.join([*map(str, overlay.folders), *ours, *given])
    return {**os.environ, **overlay.variables, "PYTHONPATH": path}


def repositoryless() -> dict[str, str]:
    """Of git in our own clone, and of builds: no repository of the user's, and no questions."""
    return {**{name: value for name, value in os.environ.items() if name not in OF_A_REPOSITORY}, "GIT_TERMINAL_PROMPT": "0"}


def _modules(path: list[str], name: str) -> list[str]:
    """The top-level modules that this distribution brought into a folder of the path, by its RECORD."""
    from importlib import metadata

    found = next(iter(metadata.distributions(name=name, path=path)), None)
    if found is None:
        return []
    tops = {Path(file).parts[0] for file in found.files or () if ".dist-info" not in file.parts[0] and file.suffix == ".py"}
    return sorted(top.removesuffix(".py") for top in tops if top.removesuffix(".py").isidentifier())


def _run(command: list[str], overlay: Overlay, limit_s: float, output: int) -> int:
    """Exit status of a child and of nothing that it leaves behind; -SIGKILL when it takes too long."""
    where = environment(overlay)
    process = subprocess.Popen(
        command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=where, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.poll()  # the group is gone already
        process.wait()


def _verdicts(folder: Path) -> dict[tuple[str, str], Verdict]:
    from harness import journal

    return {(v.case_id, v.subject): v for v in journal.read(folder)}


def _told(overlay: Overlay, folder: Path, code: int) -> None:
    """MoecheckError for what the child says went wrong. If it says nothing: OverlayError where it was killed, else CannotTell,
    for the overlay holds something over which moecheck does not run."""
    try:
        said: dict[str, Any] = parse_json(regular(folder / ANSWER, MAX_ANSWER))
    except (OSError, ValueError) as error:
        tail = printable((folder / LOG).read_text(errors="replace")[-TAIL:].strip().rpartition("\n")[2])
        what = ", ".join(f"{name}=={version}" for name, version in overlay.packages.items())
        _roomy(what, tail)
        if code == -signal.SIGKILL:
            raise OverlayError(f"the interpreter over {what} was killed, or took too long: {tail}") from error
        raise CannotTell(f"moecheck does not run over {what}: exit status {code}: {tail}") from error
    if "error" in said:
        raise MoecheckError(str(said["error"]))


def _roomy(what: str, said: str) -> None:
    """OverlayError where a child found no room on a disk: that says nothing of the release."""
    if found := NO_ROOM.search(said):
        raise OverlayError(f"{what}: a child over it found no room: {printable(said[max(0, found.start() - 200) :])[:300]}")


def _main(folder: Path) -> None:
    """The child: judges what the order says and journals each verdict."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answer: dict[str, str] = {}
    try:
        order = parse_json(regular(folder / ORDER, MAX_ORDER))
        if os.getppid() != order["parent"]:  # killed before we asked to die with it
            return
        _judge(order["items"], Terms(**order["terms"]), folder)
    except MoecheckError as error:
        answer = {"error": str(error)}
    (folder / ANSWER).write_text(json.dumps(answer))


def _warm_up() -> None:
    """The fork server of the workers imports torch while this process does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.worker.child"])
    forkserver.ensure_running()


def _judge(items: list[dict[str, str]], terms: Terms, folder: Path) -> None:
    _warm_up()
    from harness import config
    from harness.case import Case
    from harness.journal import Journal
    from harness.known import mark
    from harness.select import Item
    from harness.session import device_of
    from harness.worker.supervisor import Supervisor

    journal, known, logs = Journal(folder), config.known_issues(), folder / "log"
    logs.mkdir(exist_ok=True)
    with Supervisor(device_of(terms.platform), tuple(terms.plugins), logs, terms.limit_s) as worker:
        worker.checks, worker.repeats = terms.checks, terms.repeats
        for item in (Item(**i) for i in items):
            if item not in journal.done:
                journal.append(mark(worker.judge(Case.parse(item.case_id), item.subject), known))
    journal.close()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
