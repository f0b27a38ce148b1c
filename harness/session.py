"""One run: plan, worker, journal and known issues behind a single `judge(item)`. The pytest plugin and the CLI share it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from harness import config, plan, run_info
from harness.backends.base import Device, Support
from harness.case import Case
from harness.device import detect
from harness.errors import MoecheckError, RunFolderError, SelectionError, UnknownName
from harness.journal import Journal
from harness.known import held, in_quarantine, mark
from harness.plan import Plan
from harness.select import Item
from harness.shard import Shard
from harness.verdict import Verdict
from harness.versions import observed
from harness.worker.replay import Budget
from harness.worker.supervisor import Supervisor


def device_of(platform: str) -> Device:
    """The device that platform's cases run on, here; MoecheckError when this machine does not have it."""
    wanted, here = config.platform(platform), detect()
    if wanted.device == "cpu":
        return Device("cpu", wanted.arch)
    if here.arch != wanted.arch:
        raise MoecheckError(
            f"platform {platform} needs a {wanted.arch} device; this machine has {here.arch}. "
            f"`moecheck list --platform {platform}` shows what it can judge; --platform {here.arch} runs here"
        )
    return here


def detected_platform() -> str:
    """The platform file of this machine's device."""
    arch = detect().arch
    if arch not in config.names("platforms"):
        raise UnknownName("platform of this device", arch, config.names("platforms"))
    return arch


def new_folder(out: Path | None) -> Path:
    """A fresh run folder: `out`, or runs/<time>. RunFolderError if it holds anything or cannot be written."""
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            ours = (folder / plan.NAME).is_file()
            hint = f"continue it with --resume {folder}" if ours else "it is not a moecheck run; choose another folder"
            raise RunFolderError(f"--out {folder}: exists and is not empty; {hint}")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunFolderError(f"--out {folder}: cannot be written: {error.strerror}; choose another folder") from error
    return folder


def begin(the_plan: Plan, folder: Path, shard: Shard | None = None) -> None:
    """Make `folder` the run of a plan or of one shard of it. The plan comes last: a folder that has one says what part of it
    is its own."""
    asked = the_plan.request
    part = None if shard is None else (shard.index, shard.count)
    info = run_info.RunInfo(
        run_info.now(), asked.platform, asked.tier, the_plan.digest, shard=part, revision=run_info.revision()
    )
    run_info.write(folder, info)
    the_plan.save(folder)


def shard_of(folder: Path) -> Shard | None:
    """The shard that a run folder is; None for a whole run. RunFolderError for one that cannot be."""
    info = run_info.read(folder)
    try:
        return None if info is None or info.shard is None else Shard(*info.shard)
    except SelectionError as error:
        raise RunFolderError(f"{folder / run_info.NAME}: {error}; give a folder made by moecheck run") from error


class Session:
    """Judges the items of a plan. `folder` None: nothing is recorded (plain pytest); journal: the one to record
    in, default the folder's own."""

    def __init__(self, the_plan: Plan, folder: Path | None, journal: Journal | None = None) -> None:
        self.plan = the_plan
        self.device = device_of(the_plan.request.platform)
        self.journal = Journal(folder) if journal is None and folder is not None else journal
        self._check_resume(folder)
        self._known = config.known_issues()
        self._scratch = None if folder is not None else tempfile.TemporaryDirectory(prefix="moecheck-")
        logs = Path(self._scratch.name) if self._scratch is not None else _made(folder, "log")
        request = the_plan.request
        self._worker = Supervisor(self.device, request.plugins, logs, the_plan.limit_s, folder, request.soak)
        self._worker.checks, self._worker.repeats = the_plan.checks, the_plan.repeats
        self._worker.budget = Budget(*the_plan.replay)

    def _check_resume(self, folder: Path | None) -> None:
        strangers = set() if self.journal is None else self.journal.done - set(self.plan.items)
        if strangers:
            assert self.journal is not None
            self.journal.close()  # nobody else is kept out by a run that does not begin
            raise RunFolderError(f"{folder}: its journal holds {len(strangers)} verdicts that are not in its plan")

    @property
    def todo(self) -> list[Item]:
        """The items without a verdict."""
        done = set() if self.journal is None else self.journal.done
        return [item for item in self.plan.items if item not in done]

    def probe(self, subject: str) -> Support:
        """Can this backend run here; PluginError if it breaks its contract."""
        return self._worker.probe(subject)[0]

    def judge(self, item: Item) -> Verdict:
        """Judge one item unless a known issue holds it, mark it with its known issue, record it."""
        issue = held(item.case_id, item.subject, self.device.arch, self._known)
        if issue is not None and (probed := self._worker.probe(item.subject))[0].ok:
            verdict = in_quarantine(issue, item.case_id, probed[1])
        else:
            verdict = mark(observed.checked(self._worker.judge(Case.parse(item.case_id), item.subject)), self._known)
        if self.journal is not None:
            self.journal.append(verdict)
        return verdict

    def close(self) -> None:
        """Stop the worker and release the journal."""
        self._worker.close()
        if self.journal is not None:
            self.journal.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _made(folder: Path | None, name: str) -> Path:
    assert folder is not None
    path = folder / name
    path.mkdir(exist_ok=True)
    return path
