"""The contracts of every release under configs/contracts/PACKAGE/VERSION.json, and how a new one gets there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from harness import config
from harness.errors import MoecheckError, UnknownName
from harness.hardware import Source, Strict
from harness.reading import printable, regular
from harness.versions.contracts import Contract, Wanted, extract

ROOT = config.ROOT / "contracts"
MAX_CONTRACT = 4 << 20  # bytes: the largest stored has 0.2 MB
DOWNLOAD_S = 1800.0


class _Listed(Strict):
    """An entries.yaml."""

    package: str
    source: Source
    entries: tuple[str, ...]
    helpers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def packages(root: Path = ROOT) -> tuple[str, ...]:
    """The packages with a list of entry points."""
    return tuple(sorted(path.parent.name for path in root.glob("*/entries.yaml")))


@cache
def modules(package: str, root: Path = ROOT) -> frozenset[str]:
    """The top-level modules of its entries."""
    return frozenset(name.partition(".")[0] for name in config.load(root / package / "entries.yaml", _Listed).entries)


def releases(package: str, root: Path = ROOT) -> tuple[str, ...]:
    """The versions whose contracts are stored, oldest first."""
    if package not in packages(root):
        raise UnknownName("package", package, packages(root))
    return tuple(sorted((path.stem for path in (root / package).glob("*.json")), key=Version))


def load(package: str, version: str, root: Path = ROOT) -> Contract:
    """The stored contract. MoecheckError for a release that is not stored, or a file that is none."""
    stored = releases(package, root)
    same = next((v for v in stored if Version(v) == parsed(version)), None)
    if same is None:
        hint = f"stored: {stored[0]} to {stored[-1]}; " if stored else ""
        raise MoecheckError(f"{package} {version}: no contract is stored; {hint}moecheck contracts extract {package} {version}")
    path = root / package / f"{same}.json"
    try:
        return Contract.from_json(regular(path, MAX_CONTRACT).decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoecheckError(f"{path}: not a contract: {printable(str(error))[:300]}; extract it again") from error


def save(contract: Contract, root: Path = ROOT) -> Path:
    """Write the contract to its place, whole or not at all. MoecheckError where that cannot be."""
    path = root / contract.package / f"{contract.version}.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(contract.to_json())
        temporary.replace(path)
    except OSError as error:
        raise MoecheckError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def wanted(package: str, also: Iterable[str] = (), root: Path = ROOT) -> Wanted:
    """What is read of the package: its entries.yaml and the names in `also` that belong to it."""
    if package not in packages(root):
        raise UnknownName("package", package, packages(root))
    listed = config.load(root / package / "entries.yaml", _Listed)
    more = {name for name in also if name.partition(".")[0] in modules(package, root)} - {*listed.entries, *listed.helpers}
    return Wanted((*listed.entries, *sorted(more)), listed.helpers, listed.sources)


def read(wheel: Path, package: str, want: Wanted) -> Contract:
    """The contract of a wheel file. MoecheckError for a file that is no wheel of the package."""
    try:
        digest = hashlib.sha256()
        with wheel.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        with zipfile.ZipFile(wheel) as archive:
            name, version = _identity(archive)
            if name.replace("_", "-").lower() != package:
                raise MoecheckError(f"{wheel}: a wheel of {name}, not of {package}")
            return Contract(package, version, wheel.name, digest.hexdigest(), extract(archive, want))
    except (OSError, zipfile.BadZipFile, KeyError, StopIteration) as error:
        raise MoecheckError(f"{wheel}: not a readable wheel: {str(error) or 'it has no METADATA'}") from error


def _identity(archive: zipfile.ZipFile) -> tuple[str, str]:
    """(name, version) that the METADATA of a wheel states."""
    member = next(m for m in archive.namelist() if m.endswith(".dist-info/METADATA") and m.count("/") == 1)
    lines = archive.read(member).decode(errors="replace").splitlines()
    fields = dict(line.split(": ", 1) for line in lines[:40] if ": " in line)
    return fields["Name"], fields["Version"]


@contextmanager
def downloaded(package: str, version: str) -> Iterator[Path]:
    """The wheel of a release, fetched by pip into a folder that is removed afterwards. MoecheckError with pip's words."""
    with tempfile.TemporaryDirectory(prefix="moecheck-") as folder:
        wanted = f"{package}=={parsed(version)}"
        options = ("--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--dest", folder)
        command = [sys.executable, "-m", "pip", "download", *options, wanted]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise MoecheckError(f"{wanted}: no wheel within {DOWNLOAD_S:.0f} s") from error
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise MoecheckError(f"{wanted} cannot be had: {printable(said[0])[:300] if said else 'pip left no wheel'}")
        yield wheels[0]


def parsed(version: str) -> Version:
    """A version as PEP 440 orders it; MoecheckError for text that is none."""
    try:
        return Version(version)
    except InvalidVersion as error:
        raise MoecheckError(f"{version!r} is no version; versions look like 0.6.11.post2") from error
