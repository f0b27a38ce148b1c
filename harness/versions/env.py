"""Overlays: folders with only those packages that differ from this interpreter's, put in front of a child's sys.path.

    make(pins, source, cache)      resolve against what is installed, build or find the overlay of that lock
    judge(overlay, item, platform) the verdict of a case in a fresh interpreter over it (judging.py)

Nothing of the user's is touched: uv resolves against a copy of the metadata, downloads into our cache and links from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from harness.errors import CannotTell, OverlayError
from harness.reading import parse_json, printable, regular
from harness.versions import base, uv
from harness.versions.judging import Terms, judge, judge_all
from harness.versions.uv import Source

__all__ = ["CannotTell", "Overlay", "OverlayError", "Source", "Terms", "cache_folder", "judge", "judge_all", "make", "resolve"]

MANIFEST = "moecheck-overlay.json"
MAX_MANIFEST = 1 << 20
MOVED = re.compile(r"^ ([+-]) ([^\s=]+)==(\S+)", re.MULTILINE)  # uv pip install --dry-run
YANKED = re.compile(r"^warning: `([^`=]+)==[^`]+` is yanked(?: \(reason: \W?(.*?)\W?\))?$", re.MULTILINE)
_PATHS = "import site, sys; site.addsitedir(sys.argv[1]); print(*sys.path, sep='\\n')"


@dataclass(frozen=True)
class Overlay:
    """packages: what it holds, name -> version; pins: what was asked for; more: further folders for sys.path, those that .pth
    files of its packages add; variables: of the environment of whatever runs over it."""

    path: Path
    packages: dict[str, str]
    pins: dict[str, str] = field(default_factory=dict)
    more: tuple[Path, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[Path, ...]:
        """For the front of sys.path, in order."""
        return (self.path, *self.more)


@dataclass(frozen=True)
class Resolution:
    """What would move: name -> (version here or "", version then)."""

    pins: dict[str, str]
    moved: dict[str, tuple[str, str]]

    @property
    def downgrades(self) -> tuple[str, ...]:
        """The names that get older."""
        return tuple(n for n, (old, new) in self.moved.items() if old and _older(new, old))


def cache_folder() -> Path:
    """Where overlays belong: ~/.cache/moecheck, as XDG_CACHE_HOME has it."""
    from platformdirs import user_cache_path

    return user_cache_path("moecheck")


def make(pins: Mapping[str, str], source: Source, cache: Path) -> Overlay:
    """The overlay in which these packages have these versions and every other keeps its own, if they let it.

    CannotTell with a reason for a release; OverlayError for network, disk or uv. Safe to be called by many processes at once.
    """
    with _scratch(cache) as scratch:
        found = _resolved(pins, source, cache, scratch)
        wanted = {name: new for name, (_, new) in found.moved.items()}
        lock = _lock(wanted, source, cache, scratch)
        key = hashlib.sha256(f"{sys.version}\n{sysconfig.get_platform()}\n{lock}".encode()).hexdigest()[:32]
        place = cache / "overlays" / key
        with _held(place):
            if not (place / MANIFEST).is_file():
                _build(place, lock, wanted, source, cache)
            return _read(place, found.pins)


def resolve(pins: Mapping[str, str], source: Source, cache: Path) -> Resolution:
    """What an installation of these pins would change here, what the base does without included, torch included. CannotTell
    where there is no way or a pin is yanked."""
    with _scratch(cache) as scratch:
        return _resolved(pins, replace(source, allow=base.HELD), cache, scratch, [])


def _resolved(
    pins: Mapping[str, str], source: Source, cache: Path, scratch: Path, without: list[str] | None = None
) -> Resolution:
    """What differs in the overlay. without: packages that nothing needs; default: what the base does without, too."""
    have = base.installed()
    whole = base.with_companions(pins, have)
    known = {n: d for n, d in have.items() if n not in whole or not (source.wheelhouse or d.local)}
    target = scratch / "base"
    target.mkdir()
    base.mirror(known, target)
    held = [n for n in base.HELD if n in have and n not in (*source.allow, *whole)]
    unneeded = base.done_without(whole, have) if without is None else without
    files = {"constraints": [f"{n}=={have[n].version}" for n in held], "excludes": unneeded}
    for name, lines in files.items():
        (scratch / f"{name}.txt").write_text("\n".join(lines) + "\n")
    what = ", ".join(f"{name}=={version}" for name, version in whole.items())
    wanted = [f"{name}=={version}" for name, version in whole.items()]
    call = ["pip", "install", "--dry-run", "--no-build", "--target", str(target)]
    call += ["--excludes", str(scratch / "excludes.txt"), *wanted]
    try:
        said = uv.run([*call, "--constraints", str(scratch / "constraints.txt")], source, cache, what)
    except CannotTell as error:
        raise _held_back(error, call, source, cache, have) from error
    for name, reason in YANKED.findall(said):
        if name in whole:
            raise CannotTell(f"{name}=={whole[name]} is yanked: {printable(reason) or 'no reason given'}")
    old = {n: d.version for n, d in have.items()}
    return Resolution(whole, {n: (old.get(n, ""), v) for sign, n, v in MOVED.findall(said) if sign == "+"})


def _held_back(
    error: CannotTell, call: list[str], source: Source, cache: Path, have: Mapping[str, base.Installed]
) -> CannotTell:
    """The same refusal, in plain words where torch or triton stand in the way."""
    held = [n for n in base.HELD if n in have and f"{n}=={have[n].version}" in error.reason]
    if not held:
        return error
    here = " and ".join(f"{n} {have[n].version}" for n in held)
    hint = f"--allow {' --allow '.join(held)} lets it be replaced, in the overlay only"
    try:
        moved = {n: v for sign, n, v in MOVED.findall(uv.run(call, source, cache, call[-1])) if sign == "+"}
    except CannotTell:
        return CannotTell(
            f"{call[-1]}: it does not go with {here}, and the wheels of another are not to be had ({hint}): {error}"
        )
    said = (
        f"{n} {have[n].version} -> {moved[n]}{', a downgrade' * _older(moved[n], have[n].version)}" for n in held if n in moved
    )
    return CannotTell(f"{call[-1]}: it would replace {'; '.join(said)}; {hint}")


def _lock(wanted: Mapping[str, str], source: Source, cache: Path, scratch: Path) -> str:
    """These packages with the hashes of their wheels; "" for none. PEP 751 for the files of a folder, whose hashes uv looks up
    there only; requirements for an index, since uv 0.13 fetches the wheels of a PEP 751 lock anew each time."""
    if not wanted:
        return ""
    asked, out = scratch / "wanted.txt", scratch / _lock_name(source)
    asked.write_text("".join(f"{name}=={version}\n" for name, version in sorted(wanted.items())))
    form = ["--generate-hashes"] if source.wheelhouse is None else ["--format", "pylock.toml"]
    options = ("--no-deps", "--no-build", "--no-header", "--no-annotate", "--quiet", *form, "--output-file", str(out))
    uv.run(["pip", "compile", *options, str(asked)], source, cache, " ".join(asked.read_text().split()))
    return out.read_text()


def _lock_name(source: Source) -> str:
    return "requirements.txt" if source.wheelhouse is None else "pylock.toml"


def _build(place: Path, lock: str, wanted: Mapping[str, str], source: Source, cache: Path) -> None:
    """Into a sibling that is renamed when it is whole. The caller holds the lock, so older siblings are left by the dead."""
    for stale in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            if lock:
                file = folder / _lock_name(source)
                file.write_text(lock)
                options = (
                    "--no-deps",
                    "--no-build",
                    "--link-mode",
                    "hardlink",
                    "--target",
                    str(folder),
                    "--preview-features",
                    "pylock",
                )
                what = ", ".join(f"{n}=={v}" for n, v in wanted.items())
                uv.run(["pip", "install", *options, "--requirements", str(file)], source, cache, what)
            data = {"packages": dict(wanted), "more": _pth(folder)}
            (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n")
            folder.rename(place)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise OverlayError(f"{place}: cannot be written: {error.strerror}; free some room, or delete {cache}") from error


def _pth(folder: Path) -> list[str]:
    """Folders of the overlay that its .pth files put on sys.path, run as the interpreter would (nvidia-cutlass-dsl has code in
    one); PYTHONPATH alone does not read them."""
    if not any(folder.glob("*.pth")):
        return []
    command = ["env", f"PYTHONPATH={folder}", sys.executable, "-P", "-c", _PATHS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = dict.fromkeys(Path(line) for line in done.stdout.splitlines())
    return [str(p.relative_to(folder)) for p in found if p != folder and p.is_relative_to(folder) and p.is_dir()]


def _read(place: Path, pins: dict[str, str]) -> Overlay:
    try:
        data = parse_json(regular(place / MANIFEST, MAX_MANIFEST))
        more = tuple(place / name for name in data["more"])
        return Overlay(place, dict(data["packages"]), pins, more)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OverlayError(f"{place}: not an overlay ({printable(str(error))[:300]}); delete that folder") from error


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="resolve-", dir=cache)
    except OSError as error:
        raise OverlayError(f"{cache}: cannot be written: {error.strerror}; set XDG_CACHE_HOME to a folder that can") from error
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            raise OverlayError(
                f"{cache}: cannot be written: {error.strerror}; free some room, or delete that folder"
            ) from error


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """Only one process at a time builds one overlay; the system lets go for the dead."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _older(new: str, old: str) -> bool:
    try:
        return Version(new) < Version(old)
    except InvalidVersion:
        return False
