"""Which releases there are: the wheels of a folder, or what an index lists (PEP 503 and 691), with dates where it has them."""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from harness.errors import MoecheckError, OverlayError
from harness.reading import parse_json
from harness.versions.uv import Source

JSON = "application/vnd.pypi.simple.v1+json"
LIMIT_S = 20.0
MAX_PAGE = 64 << 20  # bytes: PyPI's page of a package with 10,000 files has 10 MB
_ANCHOR = re.compile(r"<a\s([^>]*)>([^<]*)</a>", re.IGNORECASE)
_HREF = re.compile(r"href\s*=\s*[\"']([^\"']*)[\"']", re.IGNORECASE)


@dataclass(frozen=True)
class Release:
    """A version with a wheel. date: of its upload, ISO 8601, "-" where nobody says; yanked: every wheel of it."""

    version: str
    date: str = "-"
    yanked: bool = False


def releases(package: str, source: Source) -> tuple[Release, ...]:
    """Oldest first, pre-releases among them. OverlayError without a network; MoecheckError where there is no wheel."""
    where = source.wheelhouse or source.index
    files = _folder(source.wheelhouse) if source.wheelhouse is not None else _listed(package, source.index)
    found: dict[Version, Release] = {}
    for name, date, yanked in files:
        version = _version(name, package)
        if version is not None:
            known = found.get(version, Release(str(version), date, yanked))
            found[version] = Release(str(version), min(known.date, date), known.yanked and yanked)
    if not found:
        raise MoecheckError(f"{where} has no wheel of {package}")
    return tuple(found[version] for version in sorted(found))


def find(package: str, version: str, folder: Path) -> Path:
    """A wheel of this version in the folder."""
    for path in sorted(folder.glob("*.whl")):
        if _version(path.name, package) == Version(version):
            return path
    raise MoecheckError(f"{folder} has no wheel of {package} {version}")


def _version(file: str, package: str) -> Version | None:
    try:
        name, version, _, _ = parse_wheel_filename(file)
    except (InvalidWheelFilename, InvalidVersion):
        return None
    return version if name == canonicalize_name(package) else None


def _folder(folder: Path) -> Iterator[tuple[str, str, bool]]:
    if not folder.is_dir():
        raise MoecheckError(f"--wheelhouse {folder}: no such folder; give one with wheels (pip download --no-deps -d DIR ...)")
    yield from ((path.name, "-", False) for path in sorted(folder.glob("*.whl")))


def _listed(package: str, index: str) -> Iterable[tuple[str, str, bool]]:
    """(file name, date, yanked) of each file."""
    url = f"{index.rstrip('/')}/{canonicalize_name(package)}/"
    if url.startswith("file://"):
        url += "index.html"
    elif not url.startswith(("https://", "http://")):
        raise MoecheckError(f"--index {index}: wanted an URL, https://... or file:///...")
    request = urllib.request.Request(url, headers={"Accept": f"{JSON}, text/html;q=0.1"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            kind, data = answer.headers.get_content_type(), answer.read(MAX_PAGE)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise MoecheckError(f"{index} has no {package}") from error
        raise OverlayError(f"{url}: the index says {error.code} {error.reason}") from error
    except (OSError, ssl.SSLError, ValueError) as error:
        raise OverlayError(f"{url}: the index cannot be reached: {getattr(error, 'reason', error)}") from error
    return _json(data, url) if kind == JSON else _html(data.decode(errors="replace"))


def _json(data: bytes, url: str) -> list[tuple[str, str, bool]]:
    try:
        files = parse_json(data)["files"]
        return [(f["filename"], str(f.get("upload-time") or "-")[:10], bool(f.get("yanked"))) for f in files]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OverlayError(f"{url}: not a page of an index: {error}") from error


def _html(text: str) -> list[tuple[str, str, bool]]:
    found = []
    for attributes, _ in _ANCHOR.findall(text):
        href = _HREF.search(attributes)
        name = unescape(href[1]).partition("#")[0].rpartition("/")[2] if href else ""
        found.append((name.replace("%2B", "+"), "-", "data-yanked" in attributes))
    return found
