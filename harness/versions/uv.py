"""Runs uv, and says what went wrong: with this release (CannotTell), or with network, disk or uv (OverlayError)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import CannotTell, OverlayError
from harness.reading import printable

PYPI = "https://pypi.org/simple"
LIMIT_S = 1800.0  # as a download by pip has (store.py)
NO_ROOM = re.compile(r"os error (28|27|122)\)|No space left on device|File too large|Disk quota exceeded")  # errno(3)
NO_NETWORK = re.compile(r"error sending request|Request failed after|dns error|operation timed out|network was disabled")
CORRUPT = re.compile(
    r"Bad CRC|Failed to extract|Failed to read from zip|invalid package format|Hash mismatch|structure of .* was invalid"
)
MOST = 400  # characters of uv's own words


@dataclass(frozen=True)
class Source:
    """Where wheels come from: an index (a URL, file:// for a folder of PEP 503), or nothing but the folder `wheelhouse`.

    allow: packages that may be replaced although they are held (torch, triton)."""

    index: str = PYPI
    wheelhouse: Path | None = None
    allow: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """For uv."""
        if self.wheelhouse is not None:
            return ("--no-index", "--find-links", str(self.wheelhouse))
        return ("--default-index", self.index)


def find() -> str:
    """Path of uv. OverlayError without it."""
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError) as error:
        raise OverlayError("uv is not installed, it makes the overlays; pip install uv") from error


def run(arguments: Sequence[str], source: Source, cache: Path, what: str) -> str:
    """Standard error and output of `uv ARGUMENTS`, for the requirement `what`. Without a network it is tried again from uv's
    own cache. CannotTell for what lies in the release, OverlayError for what does not."""
    base = [find(), *arguments, "--python", sys.executable, "--cache-dir", str(cache / "uv")]
    base += ["--no-config", "--no-progress", "--color", "never", *source.options]
    code, said = _call(base, what)
    if code and source.wheelhouse is None and NO_NETWORK.search(said):
        code, again = _call([*base, "--offline"], what)
        if code:
            why = _words(said).rpartition(": ")[2]
            raise OverlayError(
                f"{what}: the index {source.index} cannot be reached ({why}) and uv's cache {cache / 'uv'} does not have it;"
                " give --wheelhouse DIR, a folder of wheels"
            )
        said = again
    if not code:
        return said
    if NO_ROOM.search(said) or code == -signal.SIGXFSZ:
        raise OverlayError(
            f"{what}: no room under {cache}: {_words(said) or 'file size limit'}; free some, or delete that folder"
        )
    if "unexpected argument" in said:
        raise OverlayError(f"this uv is too old: {_words(said)}; pip install --upgrade uv")
    if code < 0 or not said.strip():
        raise OverlayError(f"{what}: uv ended with code {code}: {_words(said)}")
    reason = "its wheel is corrupt" if CORRUPT.search(said) else "it cannot be installed"
    reason = "it does not resolve" if reason[3:6] == "can" and "No solution found" in said else reason
    raise CannotTell(f"{what}: {reason}: {_words(said)}")


def _call(command: Sequence[str], what: str) -> tuple[int, str]:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OverlayError(f"{what}: uv took more than {LIMIT_S:.0f} s") from error
    except OSError as error:
        raise OverlayError(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.returncode, done.stdout.decode(errors="replace")


def _words(said: str) -> str:
    """uv's own reason in one line: what follows its first `error:`, without headings and hints."""
    lines = [" ".join(line.split()) for line in said.partition("error: ")[2].splitlines()]
    kept = [line for line in lines if line and not line.startswith(("No solution found", "hint:"))]
    return printable(" ".join(kept).removeprefix("cause: ").replace(" cause: ", ": "))[:MOST]
