"""Faults of the user or of moecheck itself; a kernel's fault is never an exception, it is a Verdict.

MoecheckError                 exit code 3; the message says what was given, what was wanted, what to do
|-- CaseError                 a case id that does not parse, or an impossible combination
|-- ConfigError               a YAML file: file, line, given, wanted
|-- UnknownName               no backend / platform / tier / format of that name: the nearest ones
|-- PluginError               a plugin that does not import, declares nothing, or lies about what it is
|-- SelectionError            nothing left to run
|-- RunFolderError            an output folder that is not ours, not writable, or from another plan
|-- OverlayError              an overlay of other releases that cannot be made now: no network, no room, no uv
|-- CannotTell                a release that cannot be tested here, and why; a bisect steps around it
|-- HistoryError              a history that holds no run, cannot be read or written, or wants a package that is not here
|-- TimingError               nothing to time, or a timing that cannot be made or read
|-- WarmError                 a library's JIT module that cannot be built here: compiler, header, disk, memory
`-- BundleError               a repro bundle that is damaged, too large, or none; or a folder that cannot take one

Incomplete, exit code 2, and WorkerBug, exit code 3, are no MoecheckErrors: nothing was wrong with what was asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkerBug(Exception):
    """moecheck itself failed in the child; the text is its traceback."""


class Incomplete(Exception):
    """Some planned cases have no verdict; the message says how to go on."""


class MoecheckError(Exception):
    """Base: something the person at the keyboard can fix."""


class CaseError(MoecheckError):
    """A case that cannot exist."""


class ConfigError(MoecheckError):
    """A configuration file that says something we cannot follow."""

    def __init__(self, file: str, line: int | None, given: str, wanted: str) -> None:
        where = file if line is None else f"{file}:{line}"
        super().__init__(f"{where}: given {given}; wanted {wanted}")


class UnknownName(MoecheckError):
    """A name nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"{kind} {name!r} is unknown; {hint}")


class PluginError(MoecheckError):
    """A backend file that breaks its contract before any kernel runs."""


class SelectionError(MoecheckError):
    """The filters leave nothing to run; a run of nothing would look green."""


class RunFolderError(MoecheckError):
    """The run folder cannot be used."""


class BundleError(MoecheckError):
    """A repro bundle that cannot be written, or cannot be trusted enough to be read."""


class WarmError(MoecheckError):
    """A JIT module that cannot be built on this machine; the message says what is missing and where it comes from."""


class OverlayError(MoecheckError):
    """Nothing was learnt of any release: no network, a full disk, no uv. Worth another try, so no search may take it for an
    answer."""


class CannotTell(MoecheckError):
    """This release cannot be tested here; `reason` says why: no wheel, a broken or a yanked one, no way to resolve or import
    it, no such entry point."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class HistoryError(MoecheckError):
    """A folder of runs, or an object store's prefix, that cannot be used as a history."""


class TimingError(MoecheckError):
    """A latency measurement that cannot be made, or a record of one that cannot be read."""
