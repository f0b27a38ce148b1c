"""Contracts: read from wheels by AST, stored per release, compared; checked against what is known of the releases."""

from __future__ import annotations

import inspect
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.backends import discover
from harness.entry import twins
from harness.errors import MoecheckError, UnknownName
from harness.versions import store
from harness.versions.contracts import Contract, Entry, Wanted, canonical, checks, extract
from harness.versions.diff import Change, Effect, Kind, diff
from harness.versions.properties import read_property, split
from harness.versions.returns import kinds
from harness.versions.source import Sources

FLASHINFER = "flashinfer-python"
NEWEST = store.releases(FLASHINFER)[-1]
MOE = "flashinfer.fused_moe."

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


def test_a_removed_entry_names_its_heir(tmp_path: Path) -> None:
    """0.6.14 called the fusion with any activation act_fusion; it was swiglu_fusion."""
    assert [(c.kind, c.text) for c in changes("0.6.13", "0.6.14", "swiglu_fusion_nvfp4")] == [
        (
            Kind.RENAMED,
            "now flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_gather_grouped_gemm_act_fusion."
            "blockscaled_contiguous_gather_grouped_gemm_act_fusion_nvfp4",
        )
    ]


# the releases as they are


def changes(old: str, new: str, entry: str) -> list[Change]:
    every = diff(store.load(FLASHINFER, old), store.load(FLASHINFER, new))
    return [c for c in every if c.entry.endswith(entry)]


@pytest.mark.parametrize(
    ("old", "new", "entry", "kind", "text"),
    [
        # do_finalize came in the middle of the positional parameters with 0.6.5, not with 0.6.4
        ("0.6.4", "0.6.5", "fused_moe.trtllm_bf16_moe", Kind.NEW_DEFAULT, "do_finalize=True"),
        ("0.6.4", "0.6.5", "fused_moe.trtllm_bf16_moe", Kind.MOVED, "enable_pdl (16 -> 17)"),
        ("0.6.4", "0.6.5", "fused_moe.trtllm_fp8_block_scale_routed_moe", Kind.MOVED, "enable_pdl (19 -> 20)"),
        ("0.6.4", "0.6.5", "fused_moe.trtllm_mxint4_block_scale_moe", Kind.RETURN, "value -> list[1] or list[3]"),
        ("0.5.3", "0.6.0", "fused_moe.trtllm_fp4_block_scale_moe", Kind.GONE, "tile_tokens_dim"),
        ("0.6.2", "0.6.3", "fused_moe.trtllm_fp4_block_scale_moe", Kind.PARAMETER_RENAMED, "gated_act_type -> activation_type"),
        ("0.6.3", "0.6.4", "fused_moe.trtllm_fp8_block_scale_moe", Kind.NEW_DEFAULT, "fp8_quantization_type"),
        ("0.6.7.post3", "0.6.8", "fused_moe.RoutingMethodType", Kind.VALUE, "Unspecified: 6 -> 8"),
        ("0.6.8.post1", "0.6.11.post2", "fused_moe.RoutingMethodType", Kind.VALUE, "Unspecified: 8 -> 9"),
        ("0.6.17", "0.6.18", "fused_moe.RoutingMethodType", Kind.VALUE, "Unspecified: 9 -> 10"),
        ("0.6.12", "0.6.13", "fused_moe.ActivationType", Kind.VALUE, "Identity: 7 -> 8"),
        ("0.6.13", "0.6.14", "fused_moe.ActivationType", Kind.VALUE, "Identity: 8 -> 9"),
        ("0.6.8.post1", "0.6.11.post2", "flashinfer.fp4_quantize", Kind.MOVED, "enable_pdl"),
        ("0.6.11.post2", "0.6.13", "fused_moe.trtllm_bf16_routed_moe", Kind.MOVED, "tune_max_num_tokens"),
        ("0.6.14", "0.6.15", "fused_moe.trtllm_fp8_block_scale_moe", Kind.MOVED, "activation_type"),
        ("0.6.15.post1", "0.6.16", "fused_moe.cutlass_fused_moe", Kind.MOVED, "tune_max_num_tokens"),
        ("0.6.7.post3", "0.6.8", "comm.trtllm_moe_finalize_allreduce_fusion", Kind.NEW_REQUIRED, "routed_scaling_factor"),
        ("0.6.18.post1", "0.7.0", "fused_moe.QuantVariant", Kind.REMOVED, "gone"),
        ("0.7.1", "0.7.2", "fused_moe.prepare_bgmv_moe", Kind.DEFAULT, "backend: 'blackwell' -> 'cake'"),
        ("0.6.10.post1", "0.6.11", "thop/fp4Quantize.cpp", Kind.CHECKS, "globalScale should have shape [1] or [num_tokens]"),
    ],
)
def test_the_stored_releases_show_the_drift_that_is_known(old: str, new: str, entry: str, kind: Kind, text: str) -> None:
    assert any(c.kind is kind and text in c.text for c in changes(old, new, entry))


def since(version: str) -> tuple[str, ...]:
    every = store.releases(FLASHINFER)
    return every[every.index(version) :]


def test_nothing_of_do_finalize_is_in_0_6_4() -> None:
    for old, new in (("0.6.3", "0.6.4"), ("0.6.5", "0.6.6")):
        assert not [c for c in changes(old, new, "_moe") if "do_finalize" in c.text and c.kind is not Kind.ADDED]


def test_a_layout_flips_under_one_signature_and_back() -> None:
    """The scale fold of SM90's mixed GEMM: 3-D, 5-D in 0.6.16, 3-D in .post3 to 0.6.17, 5-D from 0.6.18."""
    name = MOE + "interleave_moe_scales_for_sm90_mixed_gemm"
    body = {v: store.load(FLASHINFER, v).entries[name] for v in since("0.6.15")}
    assert len({entry.signature for entry in body.values()}) == 1
    flat = {body[v].body for v in ("0.6.15", "0.6.15.post1", "0.6.16.post3", "0.6.16.post4", "0.6.17")}
    folded = {body[v].body for v in ("0.6.16", "0.6.16.post1", "0.6.16.post2")}
    assert len(flat) == len(folded) == 1
    assert flat.isdisjoint(folded | {body[v].body for v in ("0.6.18", NEWEST)})


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        (MOE + "trtllm_bf16_moe", "0.5.3", NEWEST),
        (MOE + "trtllm_mxint4_block_scale_moe", "0.6.0", NEWEST),
        (MOE + "mono_moe", "0.6.15", NEWEST),
        (MOE + "cute_dsl_fused_moe_bf16", "0.7.0", NEWEST),
        (MOE + "interleave_moe_weights_for_sm90_mixed_gemm", "0.6.10", NEWEST),
        (MOE + "QuantVariant", "0.6.14", "0.6.18.post1"),
        ("flashinfer.nvfp4_kv_quantize", "0.6.7", NEWEST),
    ],
)
def test_every_release_in_between_has_what_appeared_once(name: str, first: str, last: str) -> None:
    there = [v for v in store.releases(FLASHINFER) if name in store.load(FLASHINFER, v).entries]
    every = store.releases(FLASHINFER)
    assert there == list(every[every.index(first) : every.index(last) + 1])


@pytest.mark.parametrize("package", store.packages())
def test_the_stored_releases_load_and_say_their_wheel(package: str) -> None:
    for version in store.releases(package):
        found = store.load(package, version)
        assert (found.package, found.version, len(found.sha256)) == (package, version, 64)
        assert f"-{version}-" in found.wheel
        assert len(found.entries) > 40


def test_every_listed_name_is_in_some_release() -> None:
    for package in store.packages():
        seen = {name for v in store.releases(package) for name in store.load(package, v).entries}
        want = store.wanted(package)
        assert not {*want.entries, *want.helpers, *want.sources} - seen


def known(name: str, version: str) -> Entry | None:
    package = FLASHINFER if name.startswith("flashinfer.") else name.partition(".")[0]
    if package not in store.packages():
        return None
    return store.load(package, version if package == FLASHINFER else store.releases(package)[-1]).entries.get(name)


def shape(function: Callable[..., Any]) -> list[tuple[str, bool, bool]]:
    """(name, required, keyword only) of each parameter."""
    every = inspect.signature(function).parameters.values()
    return [(p.name, p.default is p.empty, p.kind is p.KEYWORD_ONLY) for p in every]


@pytest.mark.parametrize("name", sorted(twins()) or ["none yet"])
def test_a_twin_has_the_signature_of_a_stored_release(name: str) -> None:
    """Of the newest release, or of 0.6.11.post2, the one vLLM pinned for long."""
    if name == "none yet":
        pytest.skip("harness/twins/libs has no twin")
    entries = [e for version in (NEWEST, "0.6.11.post2") if (e := known(name, version))]
    assert entries, f"no stored contract has {name}: add it to configs/contracts/*/entries.yaml, moecheck contracts extract"
    wanted = [[(p.name, p.default is None, p.kind == "keyword") for p in e.parameters] for e in entries]
    assert shape(twins()[name]) in wanted


def test_every_entry_that_a_backend_calls_has_a_contract() -> None:
    calls = {name for b in discover().values() for name in b.entries if name.split(".")[0] in ("flashinfer", "vllm")}
    assert not [name for name in calls if known(name, NEWEST) is None]


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
    import ast

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
    assert "[mine]" in answer.out
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
