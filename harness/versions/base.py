"""What is installed beside moecheck, as uv is shown it: a folder of metadata, so that nothing real is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# Released together, under one version; the last two are not on every machine (flashinfer/jit/env.py compares their versions).
COMPANIONS = {"flashinfer-python": ("flashinfer-cubin", "flashinfer-jit-cache")}
HELD = ("torch", "triton")  # the machine's own builds: a wheel of the index has another CUDA than the driver and the user chose


@dataclass(frozen=True)
class Installed:
    """A distribution. local: from a path or a URL, so that its version does not say what it is."""

    version: str
    requires: tuple[str, ...] = ()
    local: bool = False


@cache
def installed() -> dict[str, Installed]:
    """Normalised name -> the distribution that an import would take."""
    found: dict[str, Installed] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and canonicalize_name(name) not in found:
            local = bool(distribution.read_text("direct_url.json"))
            found[canonicalize_name(name)] = Installed(distribution.version, tuple(distribution.requires or ()), local)
    return found


def with_companions(pins: Mapping[str, str], have: Mapping[str, object]) -> dict[str, str]:
    """The pins, normalised, and the companions of each that are installed and not pinned themselves."""
    whole = {str(canonicalize_name(name)): version for name, version in pins.items()}
    for name, version in tuple(whole.items()):
        for companion in COMPANIONS.get(name, ()):
            if companion in have:
                whole.setdefault(companion, version)
    return whole


def done_without(pins: Iterable[str], have: Mapping[str, Installed]) -> list[str]:
    """What the installed releases of these packages require and do not have here: an overlay is to differ from the base in
    the releases asked for, not in what the base does without."""
    missing = set()
    for distribution in (have[name] for name in pins if name in have):
        for text in distribution.requires:
            requirement = _requirement(text)
            if requirement is not None and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                missing.add(str(canonicalize_name(requirement.name)))
    return sorted(missing - have.keys())


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:  # older than PEP 508: uv reads it, or says what is wrong with it
        return None


def mirror(have: Mapping[str, Installed], folder: Path) -> None:
    """Write what a resolver reads of each into `folder`, as a site-packages would hold it."""
    for name, distribution in have.items():
        path = folder / f"{name.replace('-', '_')}-{distribution.version}.dist-info"
        path.mkdir()
        lines = [f"Requires-Dist: {text}\n" for text in distribution.requires]
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {distribution.version}\n"
        (path / "METADATA").write_text(head + "".join(lines))
