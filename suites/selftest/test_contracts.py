"""Contracts: read from wheels by AST, compared, shown."""

from __future__ import annotations

import ast
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import MoecheckError, UnknownName
from harness.versions import store
from harness.versions.contracts import Contract, Wanted, canonical, checks, extract
from harness.versions.diff import Effect, Kind, diff
from harness.versions.properties import read_property, split
from harness.versions.returns import kinds
from harness.versions.source import Sources

FLASHINFER = "flashinfer-python"

INIT = """
from .core import cutlass as cutlass, Mode
from .core import *
from . import sub
try:
    from .gpu import only_gpu
except ImportError:
    only_gpu = None
alias = cutlass
"""
CORE = '''
from enum import IntEnum
from types import SimpleNamespace
import functools

class Mode(IntEnum):
    A = 0,
    B = 1

class Layer:
    def __init__(self, config, device=None): ...
    def __call__(self, x): return x

@functools.cache
def get_module():
    lib = build()
    def cutlass_op(x, plain):
        if plain:
            return lib.run(x)
        out = torch.empty(3)
        return [out, x]
    return SimpleNamespace(cutlass=cutlass_op, raw=lib.raw)

def _gate(x): ...

@supported_compute_capability([90, 100])
def _checked(x): ...

@backend_requirement({"a": _checked, "b": _gate}, common_check=_checked)
@api(trace=1)
def cutlass(x: Tensor, ids, *, mode: int = Mode.B, **more) -> Tensor:
    """Doc."""
    return get_module().cutlass(x, True)

def raw(x): return get_module().raw(x)

def pair(x, both=False) -> "Tensor":
    result = torch.add(x, 1)
    if both:
        return result, x
    return result

ORDER = (0, 2, 1)
def _permute(x): return x[ORDER]
def layout(x): return _permute(x).contiguous()
'''
CPP = '// a comment\nTVM_FFI_ICHECK(a == b) << "scale should have " << n << " rows";\nICHECK_EQ(a, b) << "k";'


def wheel(folder: Path, core: str = CORE, version: str = "1.0", name: str = "lib") -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lib/__init__.py", INIT)
        archive.writestr("lib/core.py", core)
        archive.writestr("lib/gpu.py", "def only_gpu(a, /, b=2): return None\n")
        archive.writestr("lib/sub.py", "def inner(): return (yield_ for yield_ in ())\n")
        archive.writestr("lib/k.cpp", CPP)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return path


NAMES = ("lib.cutlass", "lib.alias", "lib.Mode", "lib.Layer", "lib.only_gpu", "lib.pair", "lib.raw", "lib.sub.inner", "lib.no")
WANTED = Wanted(NAMES, ("lib.layout",), ("lib/k.cpp",))


def contract(folder: Path, core: str = CORE, version: str = "1.0") -> Contract:
    return store.read(wheel(folder, core, version), "lib", WANTED)


def test_a_wheel_is_read_without_importing_it(tmp_path: Path) -> None:
    found = contract(tmp_path).entries
    assert found.keys() == {*NAMES, "lib.Layer.__call__", "lib.layout", "lib/k.cpp"} - {"lib.no"}
    cutlass = found["lib.cutlass"]
    assert cutlass.at == "lib/core.py"
    assert cutlass.signature == "(x: Tensor, ids, *, mode: int=Mode.B, **more) -> Tensor"
    assert [(p.name, p.kind, p.default) for p in cutlass.parameters] == [
        ("x", "positional", None),
        ("ids", "positional", None),
        ("mode", "keyword", "Mode.B"),
        ("more", "**", None),
    ]
    assert cutlass.archs == {"": (90, 100), "a": (90, 100)}
    assert found["lib.alias"] == cutlass
    assert found["lib.Mode"].values == {"A": 0, "B": 1}
    assert found["lib.Layer"].signature == "(config, device=None)"
    assert found["lib.Layer.__call__"].signature == "(x)"


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("lib.cutlass", ("?Tensor", "list[2]")),
        ("lib.pair", ("tuple[2]", "value")),
        ("lib.only_gpu", ("none",)),
        ("lib.raw", ("?",)),
    ],
)
def test_what_is_returned_is_read_from_the_return_expressions(tmp_path: Path, name: str, forms: tuple[str, ...]) -> None:
    """Through get_module().op, the tensor annotation notwithstanding; C++ stays out of sight."""
    assert contract(tmp_path).entries[name].returns == forms


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("?List[torch.Tensor]", ("list",)),
        ("?Union[List[Tensor], torch.Tensor]", ("list", "value")),
        ("?Tensor | None", ("none", "value")),
        ("?'Optional[Tuple[int, int]]'", ("tuple",)),
        ("list[3]", ("list",)),
        ("?", ("?",)),
    ],
)
def test_an_annotation_speaks_for_what_is_out_of_sight(form: str, kind: tuple[str, ...]) -> None:
    assert kinds((form,)) == kind


def test_the_checks_of_a_source_are_its_sentences() -> None:
    assert checks(CPP) == ("scale should have  rows", "k")


def test_the_hash_of_a_helper_follows_what_it_calls_and_no_comment(tmp_path: Path) -> None:
    plain = contract(tmp_path).entries["lib.layout"].body
    commented = CORE.replace("def _permute(x):", "# why\ndef _permute(x: Tensor) -> Tensor:")
    assert contract(tmp_path, commented).entries["lib.layout"].body == plain
    for old, new in (("(0, 2, 1)", "(0, 1, 2)"), ("x[ORDER]", "x[ORDER].T")):
        assert contract(tmp_path, CORE.replace(old, new)).entries["lib.layout"].body != plain


def test_a_contract_survives_its_file(tmp_path: Path) -> None:
    found = contract(tmp_path)
    assert Contract.from_json(found.to_json()) == found
    assert found.to_json() == contract(tmp_path).to_json()


BEFORE = "def cutlass(x: Tensor, ids, *, mode: int = Mode.B, **more) -> Tensor:"


def user(*entries: str) -> Any:
    """A backend that calls these; diff reads its name and its entries."""

    class Calls:
        name = "user"

    calls = Calls()
    calls.entries = entries  # type: ignore[attr-defined]
    return calls


@pytest.mark.parametrize(
    ("old", "new", "kind", "effect"),
    [
        (BEFORE, BEFORE.replace("cutlass", "gone"), Kind.REMOVED, Effect.BREAKS),
        (BEFORE, BEFORE.replace("ids,", "ids, count,"), Kind.NEW_REQUIRED, Effect.BREAKS),
        (BEFORE, BEFORE.replace("**more", "late=1, **more"), Kind.NEW_DEFAULT, Effect.HARMLESS),
        (BEFORE, BEFORE.replace("x: Tensor, ids", "x: Tensor, y=0, ids=0"), Kind.MOVED, Effect.CHECK),
        (BEFORE, BEFORE.replace("ids,", ""), Kind.GONE, Effect.BREAKS),
        (BEFORE, BEFORE.replace("ids,", "topk_ids,"), Kind.PARAMETER_RENAMED, Effect.BREAKS),
        (BEFORE, BEFORE.replace("ids, *,", "*, ids,"), Kind.PASSED, Effect.CHECK),
        (BEFORE, BEFORE.replace("Mode.B", "Mode.A"), Kind.DEFAULT, Effect.CHECK),
        (BEFORE, BEFORE.replace("mode: int = Mode.B", "mode: int"), Kind.NEW_REQUIRED, Effect.BREAKS),
        (BEFORE, BEFORE.replace("x: Tensor", "x: Array"), Kind.ANNOTATION, Effect.CHECK),
        (BEFORE, BEFORE.replace("-> Tensor", "-> list"), Kind.RETURN_ANNOTATION, Effect.CHECK),
        ("return [out, x]", "return (out, x)", Kind.RETURN, Effect.BREAKS),
        ("return result, x", "return result, x, x", Kind.RETURN, Effect.BREAKS),
        ("return result\n", "return [result]\n", Kind.RETURN, Effect.BREAKS),
        ("    if both:", "    if both is None:\n        return None\n    if both:", Kind.RETURN, Effect.CHECK),
        ("[90, 100]", "[100]", Kind.ARCHS, Effect.CHECK),
        ("[90, 100]", "[90, 100, 103]", Kind.ARCHS_MORE, Effect.HARMLESS),
        ("B = 1", "B = 2", Kind.VALUE, Effect.BREAKS),
        ("    B = 1", "    C = 1", Kind.MEMBER_GONE, Effect.BREAKS),
        ("    B = 1", "    B = 1\n    C = 2", Kind.MEMBER, Effect.HARMLESS),
        ("x[ORDER]", "x[ORDER].T", Kind.BODY, Effect.CHECK),
    ],
)
def test_every_kind_of_change_is_named_and_weighed(tmp_path: Path, old: str, new: str, kind: Kind, effect: Effect) -> None:
    assert CORE.count(old) >= 1
    before, after = contract(tmp_path), contract(tmp_path, CORE.replace(old, new))
    changes = [c for c in diff(before, after, [user("lib.cutlass", "lib.pair", "lib.layout")]) if c.kind is kind]
    assert changes
    assert {c.effect for c in changes if c.backends} == {effect}
    assert {c.effect for c in diff(before, after)} == {Effect.HARMLESS}


# mistakes, and the command line


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda p: p.write_bytes(b"PK\x03\x04 torn"), "not a readable wheel"),
        (lambda p: p.unlink(), "not a readable wheel"),
        (lambda p: wheel(p.parent, name="other").replace(p), "a wheel of other"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "METADATA"),
    ],
)
def test_a_file_that_is_no_wheel_of_it_is_said_so(tmp_path: Path, make: Callable[[Path], Any], hint: str) -> None:
    path = wheel(tmp_path)
    make(path)
    with pytest.raises(MoecheckError, match=hint):
        store.read(path, "lib", WANTED)


def test_a_source_that_does_not_parse_is_unknown_and_no_crash(tmp_path: Path) -> None:
    assert "lib.cutlass" not in contract(tmp_path, "def cutlass(:\n").entries
    with zipfile.ZipFile(wheel(tmp_path, "from .core import loop as loop\n")) as archive:
        assert Sources(archive).find("lib.core.loop") is None
        assert extract(archive, Wanted(("lib.core.loop",))) == {}


def test_canonical_is_the_same_for_any_python() -> None:
    """Of 3.11 to 3.14: no field that only some have may be in it."""
    assert canonical(ast.parse("def f(x: int) -> int:\n  'doc'\n  return x[0]").body[0]) == (
        "(FunctionDef 'f' (arguments (arg 'x')) (Return (Subscript (Name 'x') (Constant 0))))"
    )


def test_properties_read_one_thing(tmp_path: Path) -> None:
    found = contract(tmp_path)
    asked = {
        "lib.cutlass:default.mode": "Mode.B",
        "lib.cutlass:position.ids": "1",
        "lib.cutlass:position.mode": "keyword",
        "lib.cutlass:parameter.no": "not there",
        "lib.pair:returns": "tuple or value",
        "lib.raw:returns": None,
        "lib.Mode:value.B": "1",
        "lib.Mode:value.C": None,
        "lib.no:exists": "not there",
        "lib.no": None,
        "lib/k.cpp:check.should have": "there",
    }
    assert {q: read_property(found, *split(q)) for q in asked} == asked
    with pytest.raises(UnknownName, match="returns"):
        split("lib.cutlass:return")
    with pytest.raises(MoecheckError, match=r"default\.NAME"):
        split("lib.cutlass:default")


def test_diff_is_quick_and_breaks_us_with_exit_code_1(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    """A plugin that calls the MXINT4 layer is broken by 0.6.5; nobody else is."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from dataclasses import replace\nfrom harness.backends.torch_grouped_mm import BACKENDS as B\n"
        "BACKENDS = (replace(B[0], name='mine', entries=('flashinfer.fused_moe.trtllm_mxint4_block_scale_moe',)),)\n"
    )
    started = time.monotonic()
    answer = moecheck("contracts", "diff", FLASHINFER, "0.6.4", "0.6.5", "--plugin", str(plugin))
    assert time.monotonic() - started < 3
    assert answer.code == 1
    assert "breaks us  flashinfer.fused_moe.trtllm_mxint4_block_scale_moe: changed return" in answer.out
    assert "mine]" in answer.out
    assert moecheck("contracts", "diff", FLASHINFER, "0.6.3", "0.6.4", "--plugin", str(plugin)).code == 0


def test_show_and_mistakes(moecheck: Callable[..., Any]) -> None:
    shown = moecheck("contracts", "show", FLASHINFER, "newest", "cutlass_fused_moe")
    assert shown.code == 0
    assert "use_w4_group_scaling: bool = False" in shown.out
    for arguments, hint in (
        (("show", "flashinfer", "newest"), "did you mean flashinfer-python"),
        (("show", FLASHINFER, "newest", "cutlas_fused_moe"), "cutlass_fused_moe"),
        (("diff", FLASHINFER, "0.4.0", "newest"), "no contract is stored; stored: 0.5.0 to"),
        (("diff", FLASHINFER, "latest", "newest"), "is no version"),
    ):
        answer = moecheck("contracts", *arguments)
        assert answer.code == 3
        assert hint in answer.err
