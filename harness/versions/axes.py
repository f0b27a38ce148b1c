"""What a version is: a release of an index or a wheelhouse, or a commit. Each axis orders its versions, makes overlays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from packaging.version import Version

from harness.errors import MoecheckError, OverlayError
from harness.versions import env, store, wheelhouse
from harness.versions.bisect import between
from harness.versions.env import Overlay, Source
from harness.versions.git import Commits
from harness.versions.report import changed_files
from harness.versions.wheelhouse import Release

NAMES = ("release", "wheelhouse", "git")


class Axis(Protocol):
    """Versions in an order."""

    def end(self, text: str) -> str:
        """The version that the user means; `newest` is the last one."""

    def older(self, one: str, other: str) -> bool:
        """Does `one` come before `other`?"""

    def span(self, first: str, last: str) -> tuple[str, ...]:
        """All from one to another, oldest first."""

    def told(self, version: str) -> str:
        """Its date, and what else is known; "-" for nothing."""

    def overlay(self, version: str) -> Overlay:
        """CannotTell where it cannot be had."""

    def changed(self, before: str, after: str) -> Sequence[str] | None:
        """The files that differ; None where both wheels must be fetched to say it."""


class Releases:
    """Releases of a package; `made` for one that is not an end is never a pre-release."""

    def __init__(self, package: str, known: Sequence[Release], source: Source, cache: Path) -> None:
        self._package, self._source, self._cache = package, source, cache
        self.known = {release.version: release for release in known}

    def end(self, text: str) -> str:
        """`newest`: the last one that is neither a pre-release nor yanked."""
        if text != "newest":
            return text
        final = [v for v, r in self.known.items() if not r.yanked and not Version(v).is_prerelease]
        return (final or list(self.known))[-1]

    def older(self, one: str, other: str) -> bool:
        """As PEP 440 has it."""
        return store.parsed(one) < store.parsed(other)

    def span(self, first: str, last: str) -> tuple[str, ...]:
        """Pre-releases only as ends."""
        return between(tuple(self.known), first, last)

    def told(self, version: str) -> str:
        """Its date and whether it was yanked."""
        release = self.known.get(version, Release(version))
        return f"{release.date}{', yanked' if release.yanked else ''}"

    def overlay(self, version: str) -> Overlay:
        """The package in this version, with what else must move."""
        return env.make({self._package: version}, self._source, self._cache)

    def changed(self, before: str, after: str) -> Sequence[str] | None:
        """From the wheels of the wheelhouse."""
        if self._source.wheelhouse is None:
            return None
        wheels = [wheelhouse.find(self._package, version, self._source.wheelhouse) for version in (before, after)]
        return changed_files(*wheels)


class Revisions:
    """Commits of a repository."""

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self.end, self.older, self.span = commits.resolve, commits.older, commits.between
        self.told, self.overlay, self.changed = commits.told, commits.overlay, commits.changed


def releases(package: str, source: Source, cache: Path, tell: Callable[[str], object]) -> Releases:
    """Of the wheelhouse or the index; without a network those whose contracts are stored, which `tell` is told."""
    try:
        known = wheelhouse.releases(package, source)
    except OverlayError as error:
        if package not in store.packages():
            raise
        tell(f"{error}; the releases whose contracts are stored are taken, without dates")
        known = tuple(Release(version) for version in store.releases(package))
    return Releases(package, known, source, cache)


def named(name: str, package: str, source: Source, commits: Callable[[], Commits], tell: Callable[[str], object]) -> Axis:
    """The axis that the user names. MoecheckError for an unknown one, or one that lacks its folder."""
    if name not in NAMES:
        raise MoecheckError(f"--axis {name}: there are {', '.join(NAMES)}")
    if name == "git":
        return Revisions(commits())
    if name == "wheelhouse" and source.wheelhouse is None:
        raise MoecheckError("--axis wheelhouse: say with --wheelhouse DIR which folder")
    return releases(package, source, env.cache_folder(), tell)
