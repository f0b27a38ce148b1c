"""repro.py: the inputs, the call of the kernel library, the comparison. Needs torch and that library, no moecheck."""

from __future__ import annotations

import ast
import inspect
import pprint
from dataclasses import dataclass
from typing import Any

from harness import __version__, hashing
from harness.backends.base import Backend
from harness.bundle import standalone
from harness.bundle.manifest import INPUTS
from harness.case import Case
from harness.verdict import Verdict

WIDTH = 120
WRONG, UNRUN = 1, 3  # exit codes, those of moecheck: a kernel failed; nothing was called


@dataclass(frozen=True)
class Script:
    """repro.py. standalone: it calls the kernel; note: why not."""

    text: str
    standalone: bool
    note: str


def script(case: Case, backend: Backend, verdict: Verdict, device: str, found: dict[str, Any]) -> Script:
    """repro.py for what `collect` found on `device` ("cpu" or "cuda")."""
    call, note = _call(case, backend, found["problem"])
    parts = [_HEAD.format(status=verdict.status, backend=backend.name, case=case.id, version=__version__)]
    parts += ["from __future__ import annotations", _imports()]
    facts = {"TENSORS": found["tensors"], "DRAW": found["draw"], "EXPECTED": found["expected"], "DEVICE": device}
    parts += [f"{name} = {pprint.pformat(value, width=WIDTH, sort_dicts=False)}" for name, value in facts.items()]
    parts += [_body(hashing)] if found["draw"] is not None else []
    parts += [_body(standalone), _LOAD.format(inputs=INPUTS)]
    parts += [_GPU.format(unrun=UNRUN)] if device == "cuda" else []
    if call:
        parts += [
            f"# The call, as moecheck's backend {backend.name} makes it.",
            call,
            _MAIN.format(wrong=WRONG, hint=repr(_hint(verdict))),
        ]
    else:
        where = f"{backend.name} (library {backend.library}; moecheck calls it in {_file(backend)})"
        lines = ["NOT STANDALONE: this file calls no kernel.", note, f"To call: {where}", f"With moecheck: {verdict.rerun}"]
        parts += [_TELL.format(lines=pprint.pformat(lines, width=WIDTH), unrun=UNRUN)]
    return Script("\n\n".join(part.strip("\n") for part in parts) + "\n", bool(call), note)


def _call(case: Case, backend: Backend, problem: str) -> tuple[str, str]:
    """(the text that defines call(b), why there is none)."""
    if problem:
        return "", problem
    if backend.script is None:
        return "", f"backend {backend.name} does not say its call as text (Backend.script)"
    if backend.script.__module__ != backend.prepare.__module__:
        return "", f"the text of the call comes from {backend.script.__module__}, but {backend.prepare.__module__} prepares it"
    try:
        text = backend.script(case)
        ast.parse(text)
    except Exception as error:
        return "", f"script() of backend {backend.name} failed: {type(error).__name__}: {error!s:.300}"
    return text, ""


def _hint(verdict: Verdict) -> str:
    """What one plain call cannot show, where that is what was found."""
    if verdict.comparison is None or not verdict.comparison.agrees or not verdict.findings:
        return ""
    checks = ", ".join(finding.check for finding in verdict.findings)
    return f"moecheck found {verdict.status} by {checks}; this file makes one plain call, which was right: see report.txt"


def _file(backend: Backend) -> str:
    try:
        return (inspect.getsourcefile(backend.prepare) or "a plugin").rsplit("/", 1)[-1]
    except TypeError:  # a callable object
        return "a plugin"


def _nodes(module: Any) -> list[tuple[ast.stmt, str]]:
    source = inspect.getsource(module)
    return [(node, ast.get_source_segment(source, node) or "") for node in ast.parse(source).body]


def _imports() -> str:
    """What the embedded modules import: torch and the standard library."""
    lines = {text for module in (hashing, standalone) for node, text in _nodes(module) if isinstance(node, ast.Import)}
    lines |= {text for module in (hashing, standalone) for node, text in _nodes(module) if isinstance(node, ast.ImportFrom)}
    return "\n".join(sorted(text for text in lines if not text.startswith(("from harness", "from __future__"))))


def _body(module: Any) -> str:
    """The text of a module below its imports."""
    source = inspect.getsource(module)
    last = max((node.end_lineno or 0) for node, _ in _nodes(module) if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(source.splitlines()[last:])


_HEAD = '''"""moecheck {version} found: {status} {backend} on
{case}

report.txt has the findings. Run this file beside the other files of its folder: exit code 0 right, 1 wrong.
"""'''

_LOAD = """\
def buffers() -> dict[str, Tensor]:
    folder = Path(__file__).resolve().parent
    flat = read_tensors(folder / "{inputs}") if TENSORS else {{}}
    made = {{}}
    for name, spec in TENSORS.items():
        stored = spec["source"] == "file"
        made[name] = laid_out(flat[name].to(DEVICE), spec) if stored else drawn(name, DRAW, range(DRAW["experts"])).to(DEVICE)
    return made"""

_GPU = """\
if __name__ == "__main__" and DEVICE == "cuda" and not torch.cuda.is_available():
    print("this failure was found on a GPU, and torch sees none here: nothing was called")
    raise SystemExit({unrun})"""

_MAIN = """\
if __name__ == "__main__":
    hint = {hint}
    got = call(buffers())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    if hint:
        print(hint)
    raise SystemExit(0 if compared(got, Path(__file__).resolve().parent, EXPECTED) else {wrong})"""

_TELL = """\
if __name__ == "__main__":
    for name, tensor in buffers().items():
        print(f"{{name}} {{tensor.dtype}} {{[*tensor.shape]}} strides {{[*tensor.stride()]}}")
    print(*{lines}, sep="\\n")
    raise SystemExit({unrun})"""
