"""Commits as versions: a bare clone of our own, and a checkout of each commit that is asked for, built if need be."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.reading import printable
from harness.versions.env import Overlay
from harness.versions.judging import repositoryless
from harness.versions.uv import NO_ROOM

CLONE_S = 3600.0
LAST = 300  # characters of what a build said last
SHORT = 12  # digits of a commit's name, as git abbreviates in large repositories
ROOM = "free some room, or set XDG_CACHE_HOME to a folder that has some"


class Commits:
    """The first parents of a repository, a URL or a folder, which is only read. build: a shell command, run in the checkout,
    where {target} is the folder for sys.path and {commit} the commit; "" to use the checkout as it is. package: what the
    commits are releases of. `stale`: why nothing newer than the last time is known, "" if it is."""

    def __init__(self, repo: str, package: str, build: str, cache: Path) -> None:
        self._source = str(Path(repo).absolute()) if Path(repo).is_dir() else repo
        self._package, self._build, self._limit_s = package, build, CLONE_S
        self._home = cache / "git" / hashlib.sha256(self._source.encode()).hexdigest()[:16]
        self._bare = self._home / "repo.git"
        self.stale = ""
        with self._held("repo") as lock:
            if not (self._bare / "HEAD").is_file():
                self._clone(lock)
            else:
                self._fetch(lock)

    def resolve(self, revision: str) -> str:
        """The full name of a commit; `newest` is the repository's HEAD."""
        name = "HEAD" if revision == "newest" else revision
        ours = ("refs/moecheck/head",) if name == "HEAD" else (f"refs/moecheck/heads/{name}", f"refs/moecheck/tags/{name}")
        for candidate in (*ours, name):
            done = self._try("rev-parse", "--verify", "--quiet", "--end-of-options", f"{candidate}^{{commit}}")
            if done.returncode == 0:
                return done.stdout.strip()
        raise MoecheckError(f"{self._source} has no revision {printable(revision)!r}")

    def between(self, first: str, last: str) -> tuple[str, ...]:
        """Commits from one to a later one along first parents, oldest first. MoecheckError unless one leads to the other."""
        if first == last or self._try("merge-base", "--is-ancestor", first, last).returncode:
            raise MoecheckError(f"{first} is not an ancestor of {last}; the first end must be the older commit")
        later = self._git("rev-list", "--first-parent", "--reverse", f"{first}..{last}").split()
        return (first, *later)

    def older(self, one: str, other: str) -> bool:
        """Is `one` an ancestor of `other`?"""
        return one != other and self._try("merge-base", "--is-ancestor", one, other).returncode == 0

    def told(self, commit: str) -> str:
        """Its date and subject; of a merge, the ends between which its branch is bisected."""
        said, parents, *_ = self._git("show", "--no-patch", "--format=%cs %s%n%P", commit).split("\n")
        first, *branches = parents.split() or [commit]
        for tip in branches:
            if base := self._try("merge-base", first, tip).stdout.split():
                said += f"; a merge: its branch is from {base[0][:SHORT]} to {tip[:SHORT]}, ends of a bisect inside it"
        return printable(said)

    def changed(self, before: str, after: str) -> list[str]:
        """The files that differ between two commits."""
        return [printable(line.replace("\t", " ")) for line in self._git("diff", "--name-status", before, after).splitlines()]

    def overlay(self, commit: str) -> Overlay:
        """The checkout, or what was built of it, and metadata that say which commit it is. CannotTell if it does not build."""
        key = f"{commit[:16]}-{hashlib.sha256(self._build.encode()).hexdigest()[:8]}"
        place, ready = self._home / key, self._home / f"{key}.ready"
        target = self._home / f"{key}.target" if "{target}" in self._build else place
        more, version = [target / "src"], f"0+g{commit[:SHORT]}"
        with self._held(key) as lock:
            if not ready.is_file():
                self._checkout(commit, place, lock)
                if self._build:
                    self._built(commit, place, target, lock)
                ready.touch()
            more = [folder for folder in more if folder.is_dir()]
            if not any(True for _ in metadata.distributions(name=self._package, path=[str(target), *map(str, more)])):
                more.append(self._stated(key, version))
        # FlashInfer keeps what it compiled by version number, which neighbours share
        variables = {"FLASHINFER_WORKSPACE_BASE": str(self._home / f"{key}.jit")}
        return Overlay(target, {self._package: version}, {self._package: version}, tuple(more), variables)

    def _checkout(self, commit: str, place: Path, lock: int) -> None:
        for path in (place, place.with_name(f"{place.name}.target"), place.with_name(f"{place.name}.jit")):
            shutil.rmtree(path, ignore_errors=True)
        self._git("worktree", "prune", lock=lock)
        # twice: a checkout that was killed leaves its worktree locked
        self._git("worktree", "add", "--quiet", "--force", "--force", "--detach", str(place), commit, lock=lock)

    def _built(self, commit: str, place: Path, target: Path, lock: int) -> None:
        """The lock goes to the command, as to git (`_call`)."""
        command = self._build.replace("{target}", str(target)).replace("{commit}", commit)
        where: Any = {"cwd": place, "env": repositoryless(), "stdin": subprocess.DEVNULL, "pass_fds": (lock,)}
        done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **where)
        if done.returncode:
            said = printable(done.stdout.decode(errors="replace").strip()[-LAST:])
            if NO_ROOM.search(said):
                raise OverlayError(f"{commit[:SHORT]} does not build, there is no room: {said}")
            raise CannotTell(f"{commit[:SHORT]} does not build (exit status {done.returncode}): {said}")

    def _stated(self, key: str, version: str) -> Path:
        folder = self._home / f"{key}.meta"
        info = folder / f"{self._package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self._package}\nVersion: {version}\n")
        return folder

    def _clone(self, lock: int) -> None:
        partial = self._home / "partial.git"
        shutil.rmtree(partial, ignore_errors=True)
        done = _call(["git", "clone", "--quiet", "--bare", "--", self._source, str(partial)], self._limit_s, lock)
        if done.returncode:
            raise OverlayError(f"--repo {self._source} cannot be cloned: {_why(done)}")
        partial.rename(self._bare)

    def _fetch(self, lock: int) -> None:
        """What is new; without a network it is `stale`. Git's locks are left by the dead: we have ours."""
        for stale in (*self._bare.glob("*.lock"), *(self._bare / "refs").rglob("*.lock")):
            stale.unlink(missing_ok=True)
        options = ("-c", "gc.auto=0", "-c", "maintenance.auto=false")  # which would hold locks after we are gone
        wanted = ("+refs/*:refs/moecheck/*", "+HEAD:refs/moecheck/head")
        done = self._try(*options, "fetch", "--quiet", "--force", "--", self._source, *wanted, lock=lock)
        self.stale = _why(done) if done.returncode else ""

    def _git(self, *arguments: str, lock: int | None = None) -> str:
        done = self._try(*arguments, lock=lock)
        if done.returncode:
            raise OverlayError(f"git {arguments[0]} in {self._bare}: {_why(done)}")
        return done.stdout

    def _try(self, *arguments: str, lock: int | None = None) -> subprocess.CompletedProcess[str]:
        return _call(["git", "--git-dir", str(self._bare), *arguments], self._limit_s, lock)

    @contextmanager
    def _held(self, name: str) -> Iterator[int]:
        """One process at a time; OverlayError for what cannot be written."""
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._home / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield lock
            finally:
                os.close(lock)
        except OSError as error:
            raise OverlayError(f"{self._home}: cannot be written: {error.strerror}; {ROOM}") from error


def _call(command: list[str], limit_s: float, lock: int | None = None) -> subprocess.CompletedProcess[str]:
    """Who holds a lock gives it to git, too: it outlives us if we are killed, and must not write beside its successor."""
    held = () if lock is None else (lock,)
    try:
        return subprocess.run(
            command,
            env=repositoryless(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
            pass_fds=held,
        )
    except FileNotFoundError as error:
        raise OverlayError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise OverlayError(f"git took more than {limit_s:.0f} s") from error


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """What git said last, and what to do where the disk is full."""
    said = printable(done.stderr.strip())[-LAST:]
    full = NO_ROOM.search(said) or done.returncode == -signal.SIGXFSZ or said.endswith(f"signal {signal.SIGXFSZ:d}")
    return f"{said or f'exit status {done.returncode}'}{f'; {ROOM}' if full else ''}"
