"""Commits as versions: a bare clone of our own, and a checkout of each commit that is asked for, built if need be."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from harness.errors import CannotTell, MoecheckError, OverlayError
from harness.reading import printable
from harness.versions.env import Overlay

CLONE_S = 3600.0
LAST = 300  # characters of what a build said last


class Commits:
    """The first parents of a repository, a URL or a folder, which is only read. build: a shell command, run in the checkout,
    where {target} is the folder for sys.path and {commit} the commit; "" to use the checkout as it is. package: what the
    commits are releases of."""

    def __init__(self, repo: str, package: str, build: str, cache: Path) -> None:
        self._source = str(Path(repo).absolute()) if Path(repo).is_dir() else repo
        self._package, self._build, self._limit_s = package, build, CLONE_S
        self._home = cache / "git" / hashlib.sha256(self._source.encode()).hexdigest()[:16]
        self._bare = self._home / "repo.git"
        self._home.mkdir(parents=True, exist_ok=True)
        with self._held("repo"):
            if not (self._bare / "HEAD").is_file():
                self._clone()
            else:  # if there is no network now, `resolve` says what is missing
                self._try(
                    "fetch", "--quiet", "--force", "--", self._source, "+refs/*:refs/moecheck/*", "+HEAD:refs/moecheck/head"
                )

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
        """Its date and subject."""
        return printable(self._git("show", "--no-patch", "--format=%cs %s", commit).strip())

    def changed(self, before: str, after: str) -> list[str]:
        """The files that differ between two commits."""
        return [printable(line.replace("\t", " ")) for line in self._git("diff", "--name-status", before, after).splitlines()]

    def overlay(self, commit: str) -> Overlay:
        """The checkout, or what was built of it, and metadata that say which commit it is. CannotTell if it does not build."""
        key = f"{commit[:16]}-{hashlib.sha256(self._build.encode()).hexdigest()[:8]}"
        place, ready = self._home / key, self._home / f"{key}.ready"
        target = self._home / f"{key}.target" if "{target}" in self._build else place
        with self._held(key) as lock:
            if not ready.is_file():
                self._checkout(commit, place)
                if self._build:
                    self._built(commit, place, target, lock)
                ready.touch()
        more = [folder for folder in (target / "src",) if folder.is_dir()]
        version = f"0+g{commit[:12]}"
        if not any(True for _ in metadata.distributions(name=self._package, path=[str(target), *map(str, more)])):
            more.append(self._stated(key, version))
        # FlashInfer keeps what it compiled by version number, which neighbours share
        variables = {"FLASHINFER_WORKSPACE_BASE": str(self._home / f"{key}.jit")}
        return Overlay(target, {self._package: version}, {self._package: version}, tuple(more), variables)

    def _checkout(self, commit: str, place: Path) -> None:
        for path in (place, place.with_name(f"{place.name}.target"), place.with_name(f"{place.name}.jit")):
            shutil.rmtree(path, ignore_errors=True)
        self._git("worktree", "prune")
        self._git("worktree", "add", "--quiet", "--force", "--detach", str(place), commit)

    def _built(self, commit: str, place: Path, target: Path, lock: int) -> None:
        """The lock goes to the command, too: it outlives us if we are killed, and must not build beside its successor."""
        command = self._build.replace("{target}", str(target)).replace("{commit}", commit)
        done = subprocess.run(
            ["sh", "-c", command], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(lock,), check=False
        )
        if done.returncode:
            said = printable(done.stdout.decode(errors="replace").strip()[-LAST:])
            raise CannotTell(f"{commit[:12]} does not build (exit status {done.returncode}): {said}")

    def _stated(self, key: str, version: str) -> Path:
        folder = self._home / f"{key}.meta"
        info = folder / f"{self._package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self._package}\nVersion: {version}\n")
        return folder

    def _clone(self) -> None:
        partial = self._home / "partial.git"
        shutil.rmtree(partial, ignore_errors=True)
        done = _call(["git", "clone", "--quiet", "--bare", "--", self._source, str(partial)], self._limit_s)
        if done.returncode:
            raise OverlayError(f"--repo {self._source} cannot be cloned: {printable(done.stderr.strip())[-LAST:]}")
        partial.rename(self._bare)

    def _git(self, *arguments: str) -> str:
        done = self._try(*arguments)
        if done.returncode:
            raise OverlayError(f"git {arguments[0]} in {self._bare}: {printable(done.stderr.strip())[-LAST:]}")
        return done.stdout

    def _try(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _call(["git", "-C", str(self._bare), *arguments], self._limit_s)

    @contextmanager
    def _held(self, name: str) -> Iterator[int]:
        lock = os.open(self._home / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)


def _call(command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False)
    except FileNotFoundError as error:
        raise OverlayError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise OverlayError(f"git took more than {limit_s:.0f} s") from error
