"""Runs alone in a child, never imported: asks the installed FlashInfer for its JIT specs and writes what it said as JSON.

    python -P specs_child.py '{"arch": "9.0a", "workspace": DIR, "answer": FILE, "generators": {NAME: [MODULE, FUNCTION, ...]}}'

Behind FUNCTION stand its arguments. FlashInfer reads its environment while it is imported, which may initialise CUDA:
hence the child.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any


def _command(text: str) -> list[str]:
    """A compile command without its source and its output."""
    words = shlex.split(text)
    for option in ("-c", "-o"):
        at = words.index(option)
        del words[at : at + 2]
    return words


def _described(spec: Any, home: str) -> dict[str, Any]:
    if getattr(spec, "embedded_cubin_factory", None) is not None:
        return {"error": "it embeds cubins into an object file, which this command does not do"}
    commands = spec.get_compile_commands()
    nvcc = next((shlex.split(c["command"])[0] for c in commands if c["file"].endswith(".cu")), f"{home}/bin/nvcc")
    return {
        "name": spec.name,
        "units": [[c["file"], _command(c["command"])] for c in commands],
        # The first five as in flashinfer/jit/cpp_ext.py, generate_ninja_build_for_op; they are the same in 0.6 and 0.7.
        "ldflags": ["-shared", f"-L{home}/lib64", f"-L{home}/lib64/stubs", "-lcudart", "-lcuda", *(spec.extra_ldflags or ())],
        "nvcc": nvcc,
        "linker": nvcc if spec.needs_device_linking else os.environ.get("CXX", "c++"),
    }


def _asked(module: str, function: str, *arguments: str) -> dict[str, Any]:
    from flashinfer.jit.cpp_ext import get_cuda_path

    try:
        generate = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        return {"error": f"this release has no {module}.{function} ({error})"}
    try:
        return _described(generate(*arguments), get_cuda_path())
    except Exception as error:  # a generator may download, look for CUDA, or refuse an architecture
        return {"error": f"{module}.{function} says {type(error).__name__}: {error}"}


def main(question: dict[str, Any]) -> None:
    """Answers one question; whatever FlashInfer prints goes to stderr."""
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = question["arch"]
    os.environ["FLASHINFER_WORKSPACE_BASE"] = question["workspace"]
    os.dup2(2, 1)
    import flashinfer

    answer = {
        "version": flashinfer.__version__,
        "modules": {name: _asked(*where) for name, where in question["generators"].items()},
        # Headers that pip brought; after the toolkit's own.
        "includes": sorted({str(d) for p in sys.path for d in Path(p or ".").glob("nvidia/*/include")}),
    }
    Path(question["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
