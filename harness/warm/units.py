"""A unit of a JIT build: one source file, one compiler command, one object file that is never built twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# An explicit instantiation in FlashInfer's generated files: jit/gemm/cutlass/generate_kernels.py.
_INSTANCE = re.compile(r"(?:#if [^\n]*\n\s*)?(?:template void|INSTANTIATE_)[^;]*;(?:\s*#endif)?")


@dataclass(frozen=True, slots=True)
class Unit:
    """One translation unit. `argv` is the compiler and its flags, without source, `-c` and `-o`."""

    source: Path
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        """The source's file name without its endings; two directories may hold the same."""
        return self.source.name.removesuffix(".cu").removesuffix(".cpp").removesuffix(".generated")

    def key(self, toolchain: str) -> str:
        """Content key: 16 hex digits over the source's text, the command and `toolchain` (versions of compiler and library)."""
        text = json.dumps([toolchain, self.argv, self.source.read_text()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def instances(text: str) -> list[str]:
    """The explicit instantiations of a generated file, in order, each with the `#if` it stands under."""
    return _INSTANCE.findall(text)


def regroup(sources: Iterable[Path], wanted: Callable[[str], bool], folder: Path, size: int) -> list[Path]:
    """Writes the `wanted` instantiations of generated `sources` as files of at most `size`, returns them.

    Files that include different launchers stay apart. A file that is there with the same text is not touched.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for source in sorted(sources):
        text = source.read_text()
        found = instances(text)
        kept = [one for one in found if wanted(one)]
        if kept:
            head, tail = text[: text.index(found[0])], text[text.rindex(found[-1]) + len(found[-1]) :]
            groups.setdefault((head.rstrip() + "\n", tail.strip() + "\n"), []).extend(kept)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _written(folder, head, chunk, tail)
        for (head, tail), all_kept in groups.items()
        for chunk in (all_kept[i : i + size] for i in range(0, len(all_kept), size))
    ]


def _written(folder: Path, head: str, chunk: list[str], tail: str) -> Path:
    text = head + "\n" + "\n\n".join(chunk) + "\n" + tail
    path = folder / f"instances_{hashlib.sha256(text.encode()).hexdigest()[:8]}.cu"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
