"""Writes a bundle: the facts and texts of the shell beside the tensors that the child wrote. The manifest comes last."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import __version__
from harness.backends.base import Backend, Device
from harness.bundle import manifest as m
from harness.bundle.facts import environment
from harness.bundle.script import script
from harness.case import Case
from harness.errors import BundleError
from harness.report.text import explain
from harness.verdict import Verdict
from harness.worker.supervisor import Supervisor


@dataclass(frozen=True)
class Judged:
    """A verdict and what it was reached with."""

    verdict: Verdict
    backend: Backend
    device: Device


def new_folder(folder: Path) -> Path:
    """`folder`, made and empty; BundleError if it holds anything or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BundleError(f"--bundle {folder}: exists and is not empty; choose another folder")
    except OSError as error:
        raise BundleError(f"--bundle {folder}: cannot be written: {error.strerror}; choose another folder") from error
    return folder


def write(folder: Path, judged: Judged, worker: Supervisor) -> m.Manifest:
    """Everything about one verdict into `folder`, as `new_folder` made it."""
    found = worker.collect(Case.parse(judged.verdict.case_id), judged.backend.name, folder)
    return save(folder, judged, found)


def save(folder: Path, judged: Judged, found: dict[str, Any]) -> m.Manifest:
    """The same with what `collect` found; the safetensors files that it names stand in `folder`."""
    verdict, backend, case = judged.verdict, judged.backend, Case.parse(judged.verdict.case_id)
    made = script(case, backend, verdict, judged.device.kind, found)
    texts = {
        m.SCRIPT: made.text,
        m.REPORT: explain(verdict) + "\n",
        m.VERDICT: json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n",
        m.ENVIRONMENT: json.dumps(environment(backend, judged.device), indent=1) + "\n",
    }
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        manifest = m.Manifest(
            schema_version=1,
            moecheck=__version__,
            case_id=case.id,
            backend=backend.name,
            library=backend.library,
            arch=judged.device.arch,
            standalone=made.standalone,
            note=made.note[:2000],
            files={path.name: _file(path) for path in sorted(folder.iterdir())},  # type: ignore[misc]
            tensors=found["tensors"],
        )
        (folder / m.MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1) + "\n")
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error.strerror}") from error
    return manifest


def _file(path: Path) -> m.File:
    with path.open("rb") as file:
        return m.File(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
