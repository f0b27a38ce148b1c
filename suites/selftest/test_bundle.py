"""A repro bundle: runs without moecheck, says the same as the verdict, and a stranger's is judged without being trusted."""

from __future__ import annotations

import ast
import hashlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.backends import discover
from harness.backends.base import CPU, Backend, Device, Launch
from harness.bundle import manifest as m
from harness.bundle import read, standalone, write
from harness.bundle.collect import collect, drawing
from harness.bundle.compare import Outcome, compared
from harness.bundle.facts import environment, variables
from harness.case import Case
from harness.errors import BundleError
from harness.inputs import Inputs, make_inputs
from harness.pipeline import Options, run
from harness.subject import bits
from harness.verdict import Finding, Stage, Status, Verdict

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples" / "broken_backends.py")
CASE = "moe.bf16.t5.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
BROKEN = "moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"
MINE = """
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as B, prepare as right
from harness.backends.base import Launch
def prepare(case, inputs):
    launch = right(case, inputs)
    return {launch}
BACKENDS = (replace(B[0], name="broken_gate_up_swapped", prepare=prepare),)
"""
RIGHT, ZEROS = "launch", "Launch(lambda: launch.call() * 0, launch.buffers)"


def bundled(folder: Path, case_id: str, backend: Backend, verdict: Verdict | None = None) -> m.Manifest:
    """A bundle of what this process finds."""
    case = Case.parse(case_id)
    verdict = verdict or replace(run(case, backend, CPU, options=Options(checks=0)), environment={"arch": "cpu"})
    return write.save(write.new_folder(folder), write.Judged(verdict, backend, CPU), collect(case, backend, CPU, folder))


def repro(folder: Path) -> int:
    """The exit code of its repro.py, run here."""
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(folder / m.SCRIPT), run_name="__main__")
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("subject", "case_id"),
    [
        ("torch_grouped_mm", CASE),
        ("torch_grouped_mm", CASE.replace("swiglu", "geglu").replace(".t5.", ".t0.")),
        ("torch_grouped_mm", CASE.replace("swiglu", "relu")),
        ("torch_grouped_mm", CASE.replace("real", "exact").replace("swiglu", "silu")),
        ("onnxruntime_moe", CASE.replace("bf16", "fp32")),
        ("onnxruntime_moe", CASE.replace("bf16", "int8_channel-fp32").replace("renormalize", "default")),
        ("onnxruntime_moe", CASE.replace("bf16", "int4_channel-fp32").replace("swiglu", "swiglu_oai")),
    ],
)
def test_repro_finds_what_the_verdict_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], subject: str, case_id: str
) -> None:
    """Another draw of the weights, another call or other limits would show in the sixth digit of the worst z."""
    backend = discover()[subject]
    verdict = run(Case.parse(case_id), backend, CPU, options=Options(checks=0))
    assert verdict.comparison is not None
    assert bundled(tmp_path / "b", case_id, backend).standalone
    assert repro(tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"worst z {verdict.comparison.worst:.6g}, mean z^2 {verdict.comparison.mean_z2:.4g} ")
    assert f" 0 of {verdict.comparison.total} " in said
    assert "bits are due" in said if verdict.comparison.lane == "exact" else f"limit {verdict.comparison.limit:.2f}" in said


def test_repro_needs_no_moecheck_and_tells_a_wrong_kernel(tmp_path: Path) -> None:
    """-I: no current folder, no PYTHONPATH. Where moecheck is installed, an import of it would go unnoticed."""
    folder = tmp_path / "b"
    bundled(folder, CASE, discover()["torch_grouped_mm"])
    text = (folder / m.SCRIPT).read_text()
    nodes = list(ast.walk(ast.parse(text)))
    imported = {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
    assert "return by_slot" in text
    (folder / m.SCRIPT).write_text(text.replace("return by_slot", "return 2 * by_slot"))
    done = subprocess.run([sys.executable, "-I", folder / m.SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "elements beyond" in done.stdout
    assert " 0 of " not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run there")
@pytest.mark.parametrize("shown", [True, False])
def test_a_gpus_bundle_says_that_it_wants_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    """Of a call, and of tensors alone, where the backend does not say its call as text."""
    folder, backend = write.new_folder(tmp_path / "b"), discover()["torch_grouped_mm" if shown else "triton_moe"]
    case = Case.parse(CASE)
    verdict = Verdict(case.id, backend.name, Status.CRASHED, Stage.LAUNCH, "died", environment={"arch": "sm90"})
    judged = write.Judged(verdict, backend, Device("cuda", "sm90", "NVIDIA H200"))
    assert write.save(folder, judged, collect(case, backend, CPU, folder)).standalone is shown
    assert repro(folder) == 3
    assert "found on a GPU, and torch sees none here" in capsys.readouterr().out


def test_what_the_hash_gives_again_is_not_stored(tmp_path: Path) -> None:
    """Gigabytes of weights from one seed: the point of a counter-based hash."""
    real = bundled(tmp_path / "real", CASE, discover()["torch_grouped_mm"])
    exact = bundled(tmp_path / "exact", CASE.replace("real", "exact"), discover()["torch_grouped_mm"])
    assert {n for n, b in real.tensors.items() if b.source == "hash"} == {"x", "w13", "w2"}
    assert {b.source for b in exact.tensors.values()} == {"file"}
    assert real.files["inputs.safetensors"].bytes < 1000 < exact.files["inputs.safetensors"].bytes


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_the_embedded_draw_is_the_harness_own(recipe: str, activation: str) -> None:
    case = Case.parse(CASE.replace("bf16", recipe).replace("swiglu", activation).replace(".s0", ".s7"))
    inputs, draw = make_inputs(case), drawing(case)
    assert draw is not None
    w13, w2 = inputs.stacked()
    for name, tensor in (("x", inputs.x), ("w13", w13), ("w2", w2)):
        assert torch.equal(standalone.drawn(name, draw, range(case.shape.experts)), tensor), name


def odd(case: Case, inputs: Inputs) -> Launch:
    """Buffers that safetensors has no type or no strides for."""
    codes = torch.arange(24, dtype=torch.uint8).view(4, 6)
    buffers = {
        "fp8": codes.view(torch.float8_e4m3fn).T,
        "scales": codes.view(torch.float8_e8m0fnu),
        "strided": torch.arange(40.0).view(4, 10)[1:, 2:9:3],
        "expanded": torch.tensor([1.5, 2.5]).expand(3, 2),
        "empty": torch.empty(0, 5, dtype=torch.float16),
        "scalar": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    return Launch(lambda: inputs.x, buffers)


def test_buffers_come_back_with_their_types_and_strides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel reads addresses: a bundle of values alone would not reproduce a fault of strides."""
    case, backend = Case.parse(CASE), replace(discover()["torch_grouped_mm"], prepare=odd)
    found = collect(case, backend, CPU, tmp_path)
    stored = standalone.read_tensors(tmp_path / m.INPUTS)
    for name, wanted in odd(case, make_inputs(case)).buffers.items():
        again = standalone.laid_out(stored[name], found["tensors"][name])
        assert (again.dtype, again.stride()) == (wanted.dtype, wanted.stride()), name
        assert torch.equal(bits(again), bits(wanted)), name
    made = bundled(tmp_path / "b", CASE, backend, Verdict(CASE, backend.name, Status.CRASHED, Stage.LAUNCH, "x"))
    assert not made.standalone  # the text of the call is another prepare's
    assert "prepares it" in made.note
    assert repro(tmp_path / "b") == 3
    assert "NOT STANDALONE" in capsys.readouterr().out
    read.read(tmp_path / "b")


def test_the_environment_holds_no_secret() -> None:
    given = {"CUDA_LAUNCH_BLOCKING": "1", "TORCHINDUCTOR_FREEZING": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    given |= {"VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE": "7", "FLASHINFER_LOGLEVEL": "3"}
    secret = {"VLLM_API_KEY": "a", "TORCH_HUB_TOKEN": "b", "VLLM_PROXY": "http://me:word@host", "HF_TOKEN": "c", "HOME": "/d"}
    assert variables({**given, **secret}) == given
    facts = environment(discover()["onnxruntime_moe"], CPU)
    assert facts["machine"]["arch"] == "cpu"
    assert {"torch", "onnxruntime"} <= set(facts["wheels"])


def broken(case: Case) -> str:
    raise ValueError("no such case")


@pytest.mark.parametrize(("script", "said"), [(broken, "ValueError: no such case"), (lambda case: "def call(:", "SyntaxError")])
def test_a_text_that_cannot_be_made_is_said(tmp_path: Path, script: Callable[[Case], str], said: str) -> None:
    """A backend's mistake must not cost the bundle; a repro.py that does not parse must not be called standalone."""
    backend = replace(discover()["torch_grouped_mm"], prepare=odd, script=script)
    made = bundled(tmp_path, CASE, backend, Verdict(CASE, backend.name, Status.CRASHED, Stage.LAUNCH, "x"))
    assert not made.standalone
    assert said in made.note
    assert repro(tmp_path) == 3


def test_repro_says_what_one_call_cannot_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code of 0 beside a report of a failure would look like a report that is wrong."""
    backend = discover()["torch_grouped_mm"]
    passed = run(Case.parse(CASE), backend, CPU, options=Options(checks=0))
    found = replace(passed, status=Status.UNSTABLE, findings=(Finding("second_call", "differs"),))
    bundled(tmp_path, CASE, backend, found)
    assert repro(tmp_path) == 0
    assert capsys.readouterr().out.startswith("moecheck found UNSTABLE by second_call; this file makes one plain call")


def test_a_folder_that_holds_something_is_refused(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    code, out, err = moecheck("repro", CASE, "-b", "torch_grouped_mm", "--platform", "cpu", "--bundle", str(tmp_path))
    assert (code, out) == (3, "")
    assert "not empty" in err
    code, _, err = moecheck("repro", CASE, "--platform", "cpu", "--bundle", str(tmp_path / "new"))
    assert code == 3
    assert "choose with --backend" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failure_is_bundled_and_judged_again(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    """The same here, another here, right here: three answers, and none without a plugin of one's own."""
    folder = tmp_path / "b"
    arguments = ("repro", BROKEN, "-b", "broken_gate_up_swapped", "--plugin", EXAMPLES, "--platform", "cpu")
    code, out, _ = moecheck(*arguments, "--bundle", str(folder))
    assert code == 1
    assert f"bundle {folder}: 7 files" in out
    assert "not standalone: backend broken_gate_up_swapped does not say its call" in out
    code, _, err = moecheck("load", str(folder))
    assert code == 3
    assert "broken_gate_up_swapped" in err
    marker = tmp_path / "executed"
    (folder / m.SCRIPT).write_text(f"open({str(marker)!r}, 'w')")
    signed(folder, m.SCRIPT)
    for launch, outcome, wanted in (("", "same failure", 1), (ZEROS, "another failure", 1), (RIGHT, "passes here", 0)):
        plugin = tmp_path / "mine.py"
        plugin.write_text(MINE.format(launch=launch))
        code, out, _ = moecheck("load", str(folder), "--plugin", str(plugin) if launch else EXAMPLES)
        assert out.splitlines()[-1].startswith(f"{outcome}: WRONG gate_up_swap there, "), out
        assert code == wanted
    assert not marker.exists()


def test_a_prepare_that_dies_leaves_a_bundle_that_says_so(moecheck: Callable[..., Any], tmp_path: Path) -> None:
    plugin, folder = tmp_path / "mine.py", tmp_path / "b"
    plugin.write_text(MINE.format(launch="__import__('ctypes').string_at(0)"))
    arguments = ("--plugin", str(plugin), "--platform", "cpu", "--bundle", str(folder))
    code, out, _ = moecheck("repro", CASE, "-b", "broken_gate_up_swapped", *arguments)
    assert code == 1
    assert "not standalone: the inputs could not be collected: killed by SIGSEGV" in out
    assert read.read(folder).verdict.status is Status.CRASHED
    assert repro(folder) == 3


@pytest.mark.parametrize(
    ("there", "here", "outcome"),
    [
        (Status.CRASHED, Status.CRASHED, Outcome.SAME),
        (Status.CRASHED, Status.HUNG, Outcome.ANOTHER),
        (Status.UNSUPPORTED, Status.HUNG, Outcome.ANOTHER),
        (Status.CRASHED, Status.UNAVAILABLE, Outcome.UNJUDGED),
    ],
)
def test_statuses_are_compared(there: Status, here: Status, outcome: Outcome) -> None:
    one, two = (Verdict(CASE, "ours", status, Stage.LAUNCH, "reason") for status in (there, here))
    assert compared(one, two) is outcome


def test_another_exit_is_another_failure() -> None:
    """Both CRASHED: a segfault there and an abort here are two bugs."""
    died = [Verdict(CASE, "o", Status.CRASHED, Stage.LAUNCH, "", (Finding("death", "", {"exit_code": e}),)) for e in (-11, -6)]
    assert compared(died[0], died[1]) is Outcome.ANOTHER
    assert compared(died[0], replace(died[0], seconds=9.0)) is Outcome.SAME


def edited(folder: Path, **changes: Any) -> None:
    path = folder / m.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def signed(folder: Path, name: str) -> None:
    """The manifest says what the file is now: whoever edits a bundle can do that too."""
    data = (folder / name).read_bytes()
    files = json.loads((folder / m.MANIFEST).read_text())["files"]
    edited(folder, files={**files, name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


def linked(folder: Path, name: str) -> None:
    """The same bytes, behind a link."""
    (folder.parent / "elsewhere").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "elsewhere")


SIGNED = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("spoil", "file", "hint"),
    [
        (lambda f: (f / m.MANIFEST).unlink(), m.MANIFEST, "No such file"),
        (lambda f: (f / m.REPORT).unlink(), m.REPORT, "No such file"),
        (lambda f: (f / m.REPORT).write_text("x"), m.REPORT, "the manifest says"),
        (lambda f: (f / m.REPORT).write_bytes((f / m.REPORT).read_bytes()[:-1] + b"x"), m.REPORT, "SHA-256"),
        (lambda f: linked(f, m.VERDICT), m.VERDICT, "symbolic link"),
        (lambda f: linked(f, m.MANIFEST), m.MANIFEST, "symbolic link"),
        (lambda f: edited(f, files={"../secret": SIGNED}), m.MANIFEST, "files.../secret"),
        (lambda f: edited(f, files={"/etc/passwd": SIGNED}), m.MANIFEST, "files./etc/passwd"),
        (lambda f: edited(f, files={}), m.MANIFEST, "names no"),
        (lambda f: edited(f, schema_version=2), m.MANIFEST, "schema_version"),
        (lambda f: edited(f, pickle="x"), m.MANIFEST, "pickle"),
        (lambda f: edited(f, backend="a b"), m.MANIFEST, "backend"),
        (lambda f: edited(f, case_id=CASE.replace(".t5.", ".t6.")), m.VERDICT, "the manifest another"),
        (lambda f: edited(f, case_id="moe." + "9" * 5000), m.MANIFEST, "case_id"),
        (lambda f: edited(f, case_id=CASE.replace("h64.i32.e4", "h32768.i32000.e2048")), m.MANIFEST, "a layer of"),
        (lambda f: edited(f, tensors={}), m.INPUTS, "wanted []"),
        (lambda f: (f / m.MANIFEST).write_text("[" * 9000), m.MANIFEST, "deeper"),
        (lambda f: (f / m.MANIFEST).write_bytes(b"{}" + b" " * (1 << 20)), m.MANIFEST, "at most"),
    ],
)
def test_a_strangers_bundle_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], object], file: str, hint: str) -> None:
    folder = tmp_path / "b"
    bundled(folder, CASE, discover()["torch_grouped_mm"], Verdict(CASE, "torch_grouped_mm", Status.CRASHED, Stage.LAUNCH, "x"))
    assert read.read(folder).case.id == CASE
    spoil(folder)
    with pytest.raises(BundleError) as caught:
        read.read(folder)
    assert str(caught.value).startswith(f"{folder / file}: ")
    assert hint in str(caught.value)
