"""The house of DESIGN.md: who may import whom, and how big things may get."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "reference", "suites", "examples")
CORE = (
    "axes",
    "batched",
    "anchors",
    "case",
    "recipe",
    "checks",
    "compare",
    "covering",
    "diagnose",
    "errors",
    "evidence",
    "exact",
    "executed",
    "fills",
    "guard",
    "hashing",
    "idcode",
    "impostors",
    "inputs",
    "known",
    "mechanisms",
    "memory",
    "misread",
    "misrouting",
    "mistakes",
    "named",
    "op_answers",
    "op_fills",
    "op_symptoms",
    "oracle",
    "places",
    "pooled",
    "propagation",
    "ratio",
    "regress",
    "relations",
    "returned",
    "select",
    "shard",
    "shrink",
    "space",
    "steady",
    "strategies",
    "subject",
    "symptoms",
    "variants",
    "verdict",
    "whatif",
)
WORLD = {"os", "pathlib", "subprocess", "sys", "io", "tempfile", "yaml", "pytest", "multiprocessing", "time", "socket"}
PURE = (
    "executor/board",
    "history/answers",
    "history/ledger",
    "latency/power",
    "latency/statistics",
    "latency/work",
    "parallel/cases",
    "parallel/expected",
    "parallel/judge",
    "parallel/part",
    "parallel/placement",
    "report/page_data",
    "versions/attribute",
    "versions/diff",
    "versions/search",
    "versions/window",
)  # rooms of the shell that only compute
PACKING = {"harness.backends.base", "harness.case", "harness.entry", "harness.errors", "harness.guard", "harness.inputs"}
FORBIDDEN_TO_BACKENDS = {"reference.moe", "reference.experts", "reference.routing", "reference.bounds", "reference.dispatch"}
ENVIRONMENT_READERS = {
    "harness/device.py",
    "harness/plan_files.py",
    "harness/worker/child.py",
    "harness/backends/triton_moe.py",
    "harness/bundle/facts.py",
    "harness/versions/judging.py",
    "harness/warm/specs_child.py",
}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 6
MEDIAN_FILE, MEDIAN_FUNCTION = 120, 10


def sources(*rooms: str) -> list[Path]:
    return sorted(p for room in rooms for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module the file imports, at any depth; `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources("reference"), ids=relative)
def test_reference_imports_torch_and_the_standard_library_only(path: Path) -> None:
    for module in imports(path):
        top = module.split(".")[0]
        assert top in {"torch", "reference", "__future__"} | set(sys.stdlib_module_names), f"{relative(path)} imports {module}"
        assert top not in WORLD, f"{relative(path)} touches the world through {module}"


@pytest.mark.parametrize("name", CORE)
def test_core_touches_no_files_environment_processes_or_clock(name: str) -> None:
    path = ROOT / "harness" / f"{name}.py"
    shell = {m for m in imports(path) if m.startswith("harness.") and m.split(".")[1] not in (*CORE, "backends")}
    assert not shell, f"{relative(path)} imports the shell: {shell}"
    assert not {m for m in imports(path) if m.split(".")[0] in WORLD}


@pytest.mark.parametrize("name", PURE)
def test_the_thinking_of_a_shell_touches_nothing_either(name: str) -> None:
    """A search, a statistic or a ledger is asked a thousand times by its self-tests: no files, no clock, no processes."""
    assert not {m for m in imports(ROOT / "harness" / f"{name}.py") if m.split(".")[0] in WORLD}


@pytest.mark.parametrize("path", [p for p in sources("harness/backends") if p.stem not in ("__init__", "base")], ids=relative)
def test_a_backend_is_not_its_own_oracle(path: Path) -> None:
    """A quantiser or a layer shared with the reference would be wrong in both places at once."""
    for module in imports(path):
        assert not any(module == f or module.startswith(f + ".") for f in FORBIDDEN_TO_BACKENDS), f"imports {module}"
        if module.startswith("harness.") and not module.startswith("harness.backends._") and module != "harness.backends":
            assert any(module == p or module.startswith(p + ".") for p in PACKING), f"imports {module}"


TWINS_MAY = {"harness.backends.base", "harness.case", "harness.inputs", "harness.twins"}
TWINS_MAY |= {"reference.format", "reference.formats", "reference.grid", "reference.layouts", "reference.rounding"}


@pytest.mark.parametrize("path", sources("harness/twins", "harness/faults/bugs"), ids=relative)
def test_a_twin_and_a_planted_bug_share_nothing_with_the_oracle(path: Path) -> None:
    may = TWINS_MAY | ({"harness.faults"} if "faults" in path.parts else set())
    for module in imports(path):
        if module.split(".")[0] in ("harness", "reference"):
            assert any(module == m or module.startswith(m + ".") for m in may), f"{relative(path)} imports {module}"


def test_a_plain_run_never_loads_the_faults() -> None:
    """Only the command lines know them, and the child when it is asked for the rules in use."""
    outside = [p for p in sources("harness") if "faults" not in p.parts and not p.stem.startswith("cli")]
    knowing = {relative(p) for p in outside if any(m.startswith("harness.faults") for m in imports(p))}
    assert knowing <= {"harness/worker/child.py", "harness/report/audit.py"}


def test_the_judge_never_imports_pytest_or_a_kernel_library() -> None:
    for name in (*CORE, "pipeline"):
        tops = {m.split(".")[0] for m in imports(ROOT / "harness" / f"{name}.py")}
        assert not tops & {"pytest", "triton", "onnxruntime", "flashinfer", "vllm", "yaml"}


def test_the_environment_is_read_in_few_places() -> None:
    readers = {relative(p) for p in sources("harness", "reference") if "os.environ" in p.read_text()}
    assert readers <= ENVIRONMENT_READERS


def test_suites_do_not_import_each_other() -> None:
    assert not [relative(p) for p in sources("suites") if any(m.startswith("suites") for m in imports(p))]


@pytest.mark.parametrize("path", sources(*ROOMS), ids=relative)
def test_no_file_or_function_outgrows_its_limit(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE, f"{relative(path)} has {lines} lines"
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION, f"{relative(path)}: {function.name} has {length} lines"


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sources("harness", "reference")
        if not p.stem.startswith("cli") and p.stem != "_triton_kernels" and p.parent.name != "libs"  # the libraries' signatures
    ],
    ids=relative,
)
def test_functions_take_few_parameters(path: Path) -> None:
    for function in functions(path):
        if path.parent.name == "libs" and not function.name.startswith("_"):
            continue  # a twin's signature is its library's
        names = [a.arg for a in (*function.args.args, *function.args.kwonlyargs) if a.arg != "self"]
        assert len(names) <= MAX_PARAMETERS, f"{relative(path)}: {function.name}({', '.join(names)})"


def test_median_file_and_function_stay_small() -> None:
    files = [p.read_text().count("\n") for p in sources("harness", "reference")]
    lengths = [(f.end_lineno or 0) - f.lineno + 1 for p in sources("harness", "reference") for f in functions(p)]
    assert statistics.median(files) <= MEDIAN_FILE
    assert statistics.median(lengths) <= MEDIAN_FUNCTION


def test_every_public_name_has_a_docstring() -> None:
    bare = []
    for path in sources("harness", "reference"):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bare.append(f"{relative(path)}:{node.name}")
    assert not bare
