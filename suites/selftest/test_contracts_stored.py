"""The stored contracts: of every release, with the drift that is known, and as the twins and the backends have it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from harness.backends import discover
from harness.entry import twins
from harness.versions import store
from harness.versions.contracts import Entry
from harness.versions.diff import Change, Kind, diff

FLASHINFER = "flashinfer-python"
NEWEST = store.releases(FLASHINFER)[-1]
MOE = "flashinfer.fused_moe."


@cache
def every_change(old: str, new: str) -> tuple[Change, ...]:
    return diff(store.load(FLASHINFER, old), store.load(FLASHINFER, new))


def changes(old: str, new: str, entry: str) -> list[Change]:
    return [c for c in every_change(old, new) if c.entry.endswith(entry)]


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


def known(name: str) -> list[Entry]:
    """Its contract in the releases that a twin may follow: the newest FlashInfer and the one vLLM pinned for long, any vLLM."""
    package = FLASHINFER if name.startswith("flashinfer.") else name.partition(".")[0]
    versions = (NEWEST, "0.6.11.post2") if package == FLASHINFER else store.releases(package)
    return [entry for version in versions if (entry := store.load(package, version).find(name))]


def readable(name: str) -> bool:
    """vLLM's copy of DeepGEMM is bound in C++: its wheel has no Python text of it."""
    return name.partition(".")[0] in ("flashinfer", "vllm") and not name.startswith("vllm.third_party.")


STORED = sorted(filter(readable, twins()))


def agrees(function: Callable[..., Any], entry: Entry) -> bool:
    """Names, order, what is required or keyword only, and every default that the text of the contract gives away."""
    if entry.values:
        return all(member.value == entry.values.get(name) for name, member in function.__members__.items())  # type: ignore[attr-defined]
    ours = list(inspect.signature(function).parameters.values())
    shape = [(p.name, p.default is p.empty, p.kind is p.KEYWORD_ONLY) for p in ours]
    wanted = [(p.name, p.default is None, p.kind == "keyword") for p in entry.parameters]
    return shape == wanted and all(same(theirs.default, p.default) for p, theirs in zip(ours, entry.parameters, strict=True))


def same(text: str | None, value: object) -> bool:
    if text is None:
        return True
    try:
        return bool(ast.literal_eval(text) == value)
    except ValueError:
        if text.startswith("torch."):
            return str(value) == text
    enum, _, member = text.removesuffix(".value").rpartition(".")
    numbers = [e.values[member] for n, e in store.load(FLASHINFER, NEWEST).entries.items() if n.endswith(f".{enum}")]
    return not numbers or int(value) == numbers[0]  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("name", STORED or ["none yet"])
def test_a_twin_has_the_signature_of_a_stored_release(name: str) -> None:
    if name == "none yet":
        pytest.skip("harness/twins/libs has no twin")
    assert (entries := known(name)), f"{name} is in no stored contract; moecheck contracts extract"
    assert any(agrees(twins()[name], entry) for entry in entries)


def test_a_wrong_default_or_order_of_a_twin_is_seen() -> None:
    entry = Entry("core.py", "(x: Tensor, mode: int=ActivationType.Swiglu.value, *, dtype=torch.bfloat16)")
    assert agrees(lambda x, mode=3, *, dtype=torch.bfloat16: None, entry)
    for wrong in (
        lambda x, mode=4, *, dtype=torch.bfloat16: None,
        lambda x, mode=3, *, dtype=torch.float16: None,
        lambda x, mode=3, dtype=torch.bfloat16: None,
        lambda mode, x=3, *, dtype=torch.bfloat16: None,
        lambda x, mode, *, dtype=torch.bfloat16: None,
        lambda x, mode=3: None,
    ):
        assert not agrees(wrong, entry)


def test_every_entry_that_a_backend_calls_has_a_contract() -> None:
    calls = {name for b in discover().values() for name in b.entries if readable(name)}
    assert not [name for name in calls if not known(name)]


def test_a_removed_entry_names_its_heir() -> None:
    """0.6.14 called the fusion with any activation act_fusion; it was swiglu_fusion."""
    assert [(c.kind, c.text) for c in changes("0.6.13", "0.6.14", "swiglu_fusion_nvfp4")] == [
        (
            Kind.RENAMED,
            "now flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_gather_grouped_gemm_act_fusion."
            "blockscaled_contiguous_gather_grouped_gemm_act_fusion_nvfp4",
        )
    ]
