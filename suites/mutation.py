"""Plants one wrong constant or operator at a time in a copy of reference/ and asks the self-tests to notice.

    python suites/mutation.py --sample 300 --seed 1 [--only 'formats/*'] [--workers 2] [--seconds 600]

Everything but the repository's own modules is imported once and a child forked per mutant, which so costs its tests and not
the imports. A failure, a crash or more than LIMIT_S of CPU kills it. Left alone: the examples beside a format, which are tests
(`Golden`); error texts; zip's `strict`, a check of our own code that changes no result; CACHED, which is speed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S, LIMIT_BYTES = 60, 24 << 30
OPTIONS = ("-x", "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider")
OWN = ("reference", "harness", "suites", "conftest", "test_", "__")  # what a child must import itself
NAMES = {"bf16": "fp16", "nvfp4": "mxfp4", "mxfp8": "mxfp4", "fp8_tensor": "fp8_token", "fp8_token": "fp8_tensor"}
_PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Add Sub, Mult FloorDiv, LShift RShift, BitAnd BitOr"
SWAPS = {a: b for pair in _PAIRS.split(", ") for x, y in [pair.split()] for a, b in ((x, y), (y, x))} | {"Div": "Mult"}
FORMATS = "formats formats_edges formats_nvfp4 grid witness_formats"
TESTS = {  # the first pattern that fits: family, test files in the order they run
    "formats/*": ("formats", FORMATS),
    "grid.py": ("grid, format", "grid formats formats_edges formats_nvfp4 bounds witness_formats"),
    "format.py": ("grid, format", FORMATS),
    "layout*": ("layouts", "layouts layouts_scales layouts_weights witness_layouts"),
    "routing/*": ("routing", "routing routing_rules routing_legal witness_routing"),
    "recipes.py": ("recipes, rounding", "recipes moe bounds"),
    "rounding.py": ("recipes, rounding", "exactness recipes moe bounds acts"),
    "activation.py": ("activation", "activation moe witness_routing witness_layers"),
    "bounds.py": ("bounds", "bounds recipes witness_layers"),
    "exactness.py": ("bounds", "exactness"),
    "fused.py": ("layer", "fused"),
    **dict.fromkeys(("moe.py", "experts.py"), ("layer", "moe recipes activation bounds witness_layers")),
    "differences.py": ("routing", "witness_routing witness_formats"),
    "*": ("dispatch", "dispatch dispatch_slots dispatch_metadata dispatch_blocks"),
}


@dataclass(frozen=True)
class Mutant:
    path: str  # under reference/
    line: int
    what: str
    source: str

    @property
    def tests(self) -> tuple[str, str]:
        return next(found for pattern, found in TESTS.items() if fnmatch.fnmatch(self.path, pattern))


def sites(node: ast.AST, within: str = "") -> Iterator[tuple[ast.AST, str]]:
    """(node, name of the innermost call around it) of everything below `node` that is worth changing."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            called = getattr(child.func, "id", "") if isinstance(child, ast.Call) else ""
            skipped = name in ("annotation", "returns", "decorator_list", "step") or called == "Golden"
            skipped |= isinstance(child, ast.Raise | ast.JoinedStr) or getattr(child, "arg", "") == "strict"
            skipped |= isinstance(child, ast.Assign) and ast.unparse(child).startswith(("_LINE", "_UNDER", "(_UNDER", "CACHED"))
            if isinstance(child, ast.AST) and not skipped:
                yield child, within
                yield from sites(child, called or within)


def changes(node: ast.AST, within: str) -> Iterator[tuple[str, object, str]]:
    """(attribute, new value, text) of each change to one node."""
    if isinstance(node, ast.Constant):
        old, new = node.value, list[object]()
        if isinstance(old, bool):
            new = [not old]
        elif isinstance(old, int | float):
            new = [value for value in dict.fromkeys((old + 1, old * 2)) if value != old]
        elif isinstance(old, str) and within == "Rounding":
            new = [">".join(NAMES.get(step, "bf16") for step in old.split(">"))]
        yield from (("value", value, f"{old!r} -> {value!r}") for value in new)
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.Compare):
        compare = isinstance(node, ast.Compare)
        old_op = type(node.ops[0] if isinstance(node, ast.Compare) else node.op).__name__
        if old_op in SWAPS:
            op = getattr(ast, SWAPS[old_op])()
            new_ops = [op, *node.ops[1:]] if isinstance(node, ast.Compare) else op
            yield "ops" if compare else "op", new_ops, f"{ast.unparse(node)}: {old_op} -> {SWAPS[old_op]}"


def mutants(path: Path) -> Iterator[Mutant]:
    tree = ast.parse(path.read_text())
    for node, within in list(sites(tree)):
        for attribute, value, what in changes(node, within):
            old = getattr(node, attribute)
            setattr(node, attribute, value)
            yield Mutant(str(path.relative_to(ROOT / "reference")), getattr(node, "lineno", 0), what, ast.unparse(tree))
            setattr(node, attribute, old)


def sampled(only: str, count: int, seed: int) -> list[Mutant]:
    """`count` of all mutants, each file's share proportional to its number of them, in a random order."""
    rng, chosen, quota = random.Random(seed), list[Mutant](), 0.0
    files = [list(mutants(path)) for path in sorted((ROOT / "reference").rglob("*.py"))]
    files = [found for found in files if found and fnmatch.fnmatch(found[0].path, only)]
    for found in files:
        quota += len(found) * min(count / sum(map(len, files)), 1.0)
        chosen += rng.sample(found, min(len(found), round(quota) - len(chosen)))
    rng.shuffle(chosen)
    return chosen


def start(tree: Path, tests: str, first: bool = False) -> int:
    """Fork a child that runs the test files in `tree` until one fails and exits with pytest's code; a `first` one also lists
    what it imported."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        limit = LIMIT_S * (10 if first else 1)  # of the child's own CPU, which neighbours on the machine do not use up
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.alarm(20 * limit)  # one that sleeps
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        sys.dont_write_bytecode = not first
        sys.path = [str(tree), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "suites"))]
        os.environ |= {"PYTHONPATH": str(tree), "HYPOTHESIS_PROFILE": "mutation"}
        os.chdir(tree)
        out = os.open(f"log_{tests}.txt" if first else "log.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        import pytest

        codes = (int(pytest.main([*OPTIONS, f"suites/selftest/test_{name}.py"])) for name in tests.split())
        code = next((code for code in codes if code), 0)
        if first:
            (tree / f"modules_{tests}.txt").write_text("\n".join(n for n in sys.modules if not n.startswith(OWN)))
        if not str(importlib.import_module("reference").__file__).startswith(str(tree)):
            code = 98
    finally:
        os._exit(code)


def prepare(folder: Path, tests: list[str], workers: int) -> list[Path]:
    """A copy of the repository per worker, after the unchanged tests passed in the first; loads what they imported."""
    import_all(["torch", "pytest"])
    trees = [folder / str(i) for i in range(workers)]
    for name in ("reference", "harness", "suites", "configs", "docs"):
        shutil.copytree(ROOT / name, trees[0] / name)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, trees[0])
    running: dict[int, str] = {}
    while tests or running:
        while tests and len(running) < workers:
            running[start(trees[0], tests[0], first=True)] = tests[0]
            tests = tests[1:]
        pid, status = os.wait()
        name = running.pop(pid)
        if status:
            sys.exit((trees[0] / f"log_{name}.txt").read_text() + "\nthe tests fail on the unchanged reference")
    import_all(sorted({name for text in trees[0].glob("modules_*.txt") for name in text.read_text().split()}))
    return [trees[0], *(Path(shutil.copytree(trees[0], tree)) for tree in trees[1:])]


def import_all(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def judge(waiting: list[Mutant], free: list[Path], until: float) -> Iterator[tuple[Mutant, int, float]]:
    """(mutant, exit code, seconds) as they end; one running mutant per tree, none started after `until`. A negative code
    is a signal: a crash, or a limit."""
    running: dict[int, tuple[Mutant, Path, str, float]] = {}
    while (waiting and time.monotonic() < until) or running:
        while waiting and free and time.monotonic() < until:
            mutant, tree = waiting.pop(0), free.pop()
            path = tree / "reference" / mutant.path
            unchanged = path.read_text()
            path.write_text(mutant.source)
            for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                stale.unlink()
            running[start(tree, mutant.tests[1])] = (mutant, tree, unchanged, time.monotonic())
        pid, status = os.wait()
        mutant, tree, unchanged, begun = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code in (5, 98):
            raise RuntimeError(f"the tests of {mutant.path} did not run on the mutant")
        (tree / "reference" / mutant.path).write_text(unchanged)
        free.append(tree)
        yield mutant, code, time.monotonic() - begun


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    import hypothesis

    parser = argparse.ArgumentParser(description="a mutation run over reference/")
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="*", help="pattern of files under reference/")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no mutant after that long")
    asked = parser.parse_args()
    until, todo = time.monotonic() + asked.seconds, sampled(asked.only, asked.sample, asked.seed)
    quick = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", derandomize=True, deadline=None, phases=quick)  # as `ci`, not shrunk
    count, kills = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        trees = prepare(Path(folder), sorted({t for m in todo for t in m.tests[1].split()}), asked.workers)
        for mutant, code, seconds in judge(todo, trees, until):
            count[mutant.tests[0]] += 1
            kills[mutant.tests[0]] += code != 0
            how = "SURVIVED" if code == 0 else "killed" if code > 0 else f"signal {-code}"
            say(f"{how:9} {seconds:5.1f}s {mutant.path}:{mutant.line} {mutant.what}")
    for family in sorted(count):
        say(f"{family:20} {kills[family]:4} of {count[family]:4} killed")
    say(f"{'all':20} {kills.total():4} of {count.total():4} killed, {kills.total() / max(count.total(), 1):.1%}")
    return 0 if kills.total() >= 0.95 * count.total() else 1


if __name__ == "__main__":
    sys.exit(main())
