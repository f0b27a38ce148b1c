"""A module's library and what is known about it, as a tar that a GPU runner unpacks over its site-packages."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.warm.specs import Spec
from harness.warm.units import instances

# FlashInfer loads <package>/data/aot/NAME/NAME.so before it compiles anything: jit/env.py, FLASHINFER_AOT_DIR.
_AOT = "flashinfer/data/aot"
_ARGUMENTS = re.compile(r"(?:template void \w+<|INSTANTIATE_\w+\()(.*?)(?:> \(|\);)", re.DOTALL)


def manifest(spec: Spec, library: Path, arch: str, recipes: Sequence[str]) -> dict[str, Any]:
    """What the library is: versions, recipes, the instantiations in it (empty for a whole module), its hash."""
    built = [one for unit in spec.units if "regrouped" in unit.source.parts for one in instances(unit.source.read_text())]
    return {
        "module": spec.module,
        "flashinfer": spec.version,
        "arch": arch,
        "toolchain": spec.toolchain,
        "recipes": list(recipes),
        "instances": sorted(_short(one) for one in built),
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
    }


def _short(text: str) -> str:
    """The arguments of an instantiation, template's or macro's, without namespaces and line breaks."""
    found = _ARGUMENTS.search(text)
    inside = re.sub(r"\b(?:\w+::)+", "", found[1] if found else text)
    return re.sub(r"\s+", " ", re.sub(r"Int<(\d+)>", r"\1", inside)).strip()


def pack(library: Path, about: dict[str, Any], file: Path) -> None:
    """Writes `file`, a tar compressed by xz: the library where FlashInfer looks for it, and its manifest beside it.

    Unpack it with `tar -xf FILE -C SITE_PACKAGES`.
    """
    part = file.with_name(file.name + ".part")
    try:
        with tarfile.open(part, "w:xz") as tar:
            tar.add(library, f"{_AOT}/{about['module']}/{about['module']}.so")
            text = (json.dumps(about, indent=1) + "\n").encode()
            info = tarfile.TarInfo(f"{_AOT}/{about['module']}/moecheck.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
