"""Faults in our Triton kernels: a line of their source is replaced, and the patched module is the subject.

The clean subject is triton_moe. Triton compiles from source files, so the patched file lies in the temporary folder, named
after its content.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from harness.backends import triton_moe
from harness.backends.base import Launch
from harness.case import Case
from harness.errors import PluginError
from harness.faults.fault import Fault
from harness.inputs import Inputs

SOURCE = Path(triton_moe.__file__).with_name("_triton_kernels.py")
CLEAN = triton_moe.BACKENDS[0]
GPUS = tuple(arch for arch in CLEAN.archs if arch != "cpu")  # interpreted, a fault takes minutes


@dataclass(frozen=True)
class Patch:
    """`edits`: (old, new) texts, each old occurring exactly once in the kernels' source; see Fault for the rest."""

    bug: str
    name: str
    thread: str
    expect: tuple[str, ...]
    text: str
    edits: tuple[tuple[str, str], ...]

    @property
    def fault(self) -> Fault:
        """The fault whose subject is the patched module."""
        name = f"{self.bug}_triton_{self.name}"
        backend = replace(CLEAN, name=name, prepare=partial(_prepare, self), summary=self.text, archs=GPUS)
        return Fault(self.bug, self.thread, self.expect, backend, CLEAN)

    def source(self) -> str:
        """The patched source; PluginError if an edit does not fit the kernels any more."""
        text = SOURCE.read_text()
        for old, new in self.edits:
            if text.count(old) != 1:
                raise PluginError(f"patch {self.name}: {old!r} occurs {text.count(old)} times in {SOURCE.name}, wanted once")
            text = text.replace(old, new)
        return text


@cache
def module(patch: Patch) -> ModuleType:
    """The patched kernels, imported."""
    source = patch.source()
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    file = Path(tempfile.gettempdir()) / f"moecheck_{patch.bug}_{patch.name}_{digest}.py"
    if not file.exists():
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(source)
        written.replace(file)  # whole or not there: several workers may write it at once
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def _prepare(patch: Patch, case: Case, inputs: Inputs) -> Launch:
    prepare: Callable[..., Launch] = triton_moe.prepare
    return prepare(case, inputs, module(patch))
