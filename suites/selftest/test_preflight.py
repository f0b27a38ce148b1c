"""Preflight: the calls that an adapter makes over its twin, bound to the signature of another release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from harness import entry
from harness.backends.base import Backend, Launch
from harness.backends.torch_grouped_mm import BACKENDS
from harness.case import Case
from harness.entry import resolve
from harness.inputs import Inputs
from harness.versions.contracts import Contract, Entry
from harness.versions.preflight import preflight

NAME = "lib.moe.layer"
CASE = Case.parse("moe.bf16.t3.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0")


def layer(x: Tensor, ids: Tensor, scale: float = 1.0, do_finalize: bool = True) -> Tensor:
    """A twin."""
    return x


def prepare(case: Case, inputs: Inputs) -> Launch:
    function = resolve(NAME, "cpu")
    return Launch(lambda: function(inputs.x, inputs.topk_ids, 2.0, do_finalize=True))


BACKEND: Backend = replace(BACKENDS[0], name="layer_twin", prepare=prepare, entries=(NAME,))


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {**entry.twins(), NAME: layer}
    for module in ("harness.entry", "harness.versions.preflight"):
        monkeypatch.setattr(f"{module}.twins", lambda: functions)


@pytest.mark.parametrize(
    ("signature", "text"),
    [
        ("(x, ids, scale=1.0, do_finalize=True)", None),
        ("(x, ids, scale=1.0, do_finalize=True, more=None, **options)", None),
        ("(x, ids, scale=1.0)", "unexpected keyword argument 'do_finalize'"),
        ("(x, ids, scale, do_finalize, bias)", "missing a required argument: 'bias'"),
        ("(x, ids, bias=None, scale=1.0, do_finalize=True)", "by position scale would get another argument"),
        ("(x, *, ids, scale=1.0, do_finalize=True)", "positional"),
        ("", "lib 2.0 has no lib.moe.layer"),
    ],
)
def test_a_call_is_bound_to_the_signature_of_the_other_release(signature: str, text: str | None) -> None:
    entries = {NAME: Entry("lib/moe.py", signature)} if signature else {}
    refusals = list(preflight(Contract("lib", "2.0", "", "", entries), [(BACKEND, CASE)]))
    assert len(refusals) == (text is not None)
    for refusal in refusals:
        assert (refusal.backend, refusal.entry) == ("layer_twin", NAME)
        assert text is not None
        assert text in refusal.text


def test_the_command_line_says_what_breaks(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "from dataclasses import replace\nfrom harness.backends.torch_grouped_mm import BACKENDS as B\n"
        "BACKENDS = (replace(B[0], name='mine', entries=('flashinfer.fused_moe.trtllm_mxint4_block_scale_moe',)),)\n"
    )
    options = ("--no-resolve", "--plugin", str(plugin), "--backend", "mine")
    answer = moecheck("preflight", "flashinfer-python==0.6.5", "--from", "0.6.4", *options)
    assert answer.code == 1
    assert "breaks us  flashinfer.fused_moe.trtllm_mxint4_block_scale_moe: changed return" in answer.out
    assert moecheck("preflight", "flashinfer-python==0.6.4", "--from", "0.6.3", *options).code == 0
    for given, hint in (
        ("flashinfer-python", "PACKAGE==VERSION"),
        ("vllm==0.33.0", "--from VERSION"),
        ("torch==1", "is unknown"),
    ):
        refused = moecheck("preflight", given, "--no-resolve")
        assert refused.code == 3
        assert hint in refused.err
