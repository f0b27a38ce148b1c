"""What a planted fault is: one historical bug, its thread, the subject that has it, and what a true diagnosis may say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.backends.base import Backend
from harness.twins import TWINS
from harness.twins.base import Twin


@dataclass(frozen=True)
class Fault:
    """bug: the id of the historical bug; thread: its address; expect: every diagnosis kind, or check name, that describes it
    truthfully; backend: the subject that has it; clean: the same subject without it, whose plan it is judged on."""

    bug: str
    thread: str
    expect: tuple[str, ...]
    backend: Backend
    clean: Backend

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.backend.name

    @property
    def text(self) -> str:
        """The mechanism in one line."""
        return self.backend.summary


def planted(bug: str, twin: type[Twin], thread: str, expect: tuple[str, ...]) -> Fault:
    """The fault that `twin`, a subclass of a clean twin, has. Its docstring's first line says the mechanism."""
    clean = next(base for base in twin.__mro__ if base in TWINS)
    words = re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", twin.__name__).lower()
    return Fault(bug, thread, expect, twin.backend(f"{bug}_{words}"), clean.backend())
