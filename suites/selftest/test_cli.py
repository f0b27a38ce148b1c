"""The command line: every fault of the user is one helpful message and exit code 3, before the first case is judged."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from harness import cli, cli_run, config, journal, plan
from harness.backends import discover
from harness.backends.base import CPU
from harness.case import Case
from harness.device import detect

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples" / "broken_backends.py")
CASE = "moe.bf16.t33.h256.i128.e5.k2.renormalize.swiglu.standard.real.s0"
GOOD = ("--backend", "torch_grouped_mm", "--case", CASE, "--platform", "cpu")
HEAD = "from dataclasses import replace\nfrom harness.backends.torch_grouped_mm import BACKENDS as B\n"


class Answer(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def refused(answer: Answer, *hints: str) -> None:
    """Exit code 3, one line of ours on stderr that holds every hint, nothing judged."""
    assert answer.code == 3, answer
    assert answer.err.startswith("moecheck: "), answer.err
    assert "Traceback" not in answer.err
    assert "verdicts" not in answer.out
    for hint in hints:
        assert hint in answer.err


def rerun(answer: Answer) -> str:
    """The line that reproduces the first verdict."""
    return answer.out.split("rerun: ")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (("--backend", "torch_groupd_mm"), ["backend 'torch_groupd_mm'", "did you mean torch_grouped_mm"]),
        (("--backend", "zzz*"), ["backend 'zzz*'", "torch_grouped_mm"]),
        (("--platform", "sm09"), ["platform 'sm09'", "did you mean sm90"]),
        (("--tier", "smoek"), ["tier 'smoek'", "did you mean smoke"]),
        (("--case", "moe.bf16"), ["does not parse; wanted e.g. moe."]),
        (("--case", CASE.replace("swiglu", "swigul")), ["activation 'swigul'", "did you mean swiglu"]),
        (("--case", CASE.replace(".k2.", ".k6.")), ["impossible", "top_k 6 exceeds experts 5"]),
        (("--case", CASE, "--op", "mole"), ["nothing to run", "mole"]),
        (("--case", "moe.bf61.*", "--backend", "torch_grouped_mm"), ["nothing to run", "moe.bf61.*"]),
        (("--case", CASE, "--case", "moe.bf16.t33.*", "--case", "moe.typo", *GOOD[:2]), ["moe.typo", "does not parse"]),
        (("--bakend", "torch_grouped_mm"), ["No such option", "--backend"]),
        (("--limit", "0"), ["--limit", "0.1"]),
        (("--limit", "soon"), ["--limit", "valid"]),
        (("stray",), ["stray"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "list"])
def test_a_wrong_name_is_answered_with_the_near_ones(
    moecheck: Call, tmp_path: Path, command: str, arguments: tuple[str, ...], hints: list[str]
) -> None:
    """Click's own exit code for a usage error is 2, which here means: resume me."""
    if command == "list" and "--limit" in arguments:
        hints = ["No such option"]
    folder = tmp_path / "out"
    refused(moecheck(command, *arguments, *(["--out", str(folder)] if command == "run" else [])), *hints)
    assert not folder.exists()


@pytest.mark.parametrize("arguments", [("nope",), ("repro",), ("repro", "moe"), ("repro", CASE, "-b", "torch_groupd_mm")])
def test_other_commands_refuse_too(moecheck: Call, arguments: tuple[str, ...]) -> None:
    refused(moecheck(*arguments))


@pytest.mark.skipif(detect().arch == "sm90", reason="this machine has an sm90 device")
@pytest.mark.parametrize("command", [("run", "--case", CASE), ("repro", CASE)])
def test_a_platform_that_is_not_here_is_refused_with_what_works(moecheck: Call, command: tuple[str, ...]) -> None:
    refused(moecheck(*command, "--platform", "sm90"), "needs a sm90 device", "moecheck list --platform sm90", "--platform cpu")


def test_a_platform_that_is_not_here_can_be_listed(moecheck: Call) -> None:
    answer = moecheck("list", "--platform", "sm90", "--backend", "torch_grouped_mm")
    assert answer.code == 0
    assert len(answer.out.splitlines()) > 10


@pytest.mark.parametrize(
    ("source", "hints"),
    [
        (None, ["no such file"]),
        ("raise RuntimeError('no libfoo')", ["does not import", "RuntimeError: no libfoo"]),
        ("import sys; sys.exit(0)", ["does not import", "SystemExit"]),
        ("def broken(:", ["does not import", "SyntaxError"]),
        ("import nonexistent_kernels", ["nonexistent_kernels"]),
        ("", ["declares no backends", "wanted BACKENDS"]),
        ("BACKENDS = ()", ["declares no backends"]),
        (HEAD + "BACKENDS = list(B)", ["declares no backends"]),
        (HEAD + "BACKENDS = B[0]", ["declares no backends"]),
        ("BACKENDS = ('torch_grouped_mm',)", ["declares no backends"]),
        (HEAD + "BACKENDS = B", ["'torch_grouped_mm' is already defined"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a'), replace(B[0], name='a'))", ["'a' is already defined"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a', recipes=('bf61',)),)", ["backend a", "bf61", "did you mean bf16"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a', activations=('swigul',)),)", ["backend a", "did you mean swiglu"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a', routings=('dfault',)),)", ["backend a", "did you mean default"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a', recipes=()),)", ["backend a", "no recipe"]),
        (HEAD + "BACKENDS = (replace(B[0], name='a', recipes='bf16'),)", ["backend a"]),
        (HEAD + "BACKENDS = (replace(B[0], name='two words'),)", ["'two words'"]),
        (HEAD + "BACKENDS = (replace(B[0], name='[bold]a\\x00'),)", ["name"]),
    ],
)
def test_a_plugin_that_breaks_its_contract_is_named(
    moecheck: Call, tmp_path: Path, source: str | None, hints: list[str]
) -> None:
    """A typo in a declaration would plan nothing for it, which looks like a backend without failures."""
    file = tmp_path / "odd.py"
    if source is not None:
        file.write_text(source)
    refused(moecheck("list", "--plugin", str(file), "--case", CASE, "--backend", "torch_grouped_mm"), str(file), *hints)


@pytest.mark.parametrize(
    ("probe", "jobs"), [("lambda device: True", "1"), ("lambda device: 1 / 0", "1"), ("lambda device: True", "2")]
)
def test_a_plugin_that_lies_in_the_child_is_named_by_run_too(moecheck: Call, tmp_path: Path, probe: str, jobs: str) -> None:
    """The suite ends without a word when pytest has no terminal: exit code 3 alone does not say which plugin. A process of
    several that leaves is an assertion that fails in pytest-xdist."""
    file = tmp_path / "liar.py"
    file.write_text(HEAD + f"BACKENDS = (replace(B[0], name='liar', probe={probe}),)")
    arguments = (
        "--plugin",
        str(file),
        "--backend",
        "liar",
        "--case",
        CASE,
        "--platform",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        jobs,
    )
    answer = moecheck("run", *arguments)
    assert answer.code == 3
    assert "backend liar: probe()" in answer.err
    assert "INTERNALERROR" not in answer.out + answer.err


PROGRAM = [sys.executable, "-c", "from harness.cli import main; main()"]


def test_a_reader_that_leaves_ends_no_run(tmp_path: Path) -> None:
    """`moecheck run -v | head`: rich leaves with 1, a kernel failed, and the cases that are left have no verdict."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [*PROGRAM, "run", *GOOD, "-v", "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    error = process.communicate(timeout=120)[1]
    assert (process.returncode, error) == (0, b"")
    assert len(journal.read(folder)) == 1
    assert (folder / "summary.md").exists()


def test_an_output_that_is_full_is_a_sentence() -> None:
    """A traceback of 40 lines says neither what was full nor what to do."""
    with Path("/dev/full").open("wb") as full:
        answer = subprocess.run(
            [*PROGRAM, "contracts", "show", "flashinfer-python", "newest"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert answer.returncode == 3
    assert answer.stderr.startswith("moecheck: ")
    assert "No space left" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("make", "hints"),
    [
        (lambda folder: (folder / "thesis.tex").touch(), ["exists and is not empty", "not a moecheck run", "another folder"]),
        (lambda folder: (folder / "plan.json").write_text("{}"), ["exists and is not empty", "--resume"]),
        (lambda folder: (folder.rmdir(), folder.touch()), ["exists", "another folder"]),
    ],
)
def test_an_out_folder_that_holds_something_is_refused(
    moecheck: Call, tmp_path: Path, make: Callable[[Path], object], hints: list[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    make(folder)
    before = sorted(tmp_path.rglob("*"))
    refused(moecheck("run", *GOOD, "--out", str(folder)), str(folder), *hints)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_folder_below_a_file_is_refused(moecheck: Call, tmp_path: Path) -> None:
    """Permissions do not stop root; a file in the way stops everybody."""
    (tmp_path / "file").touch()
    refused(moecheck("run", *GOOD, "--out", str(tmp_path / "file" / "out")), "cannot be written", "another folder")


def test_the_name_of_the_out_folder_is_not_markup(moecheck: Call, tmp_path: Path) -> None:
    """rich would drop [red] silently and raise on [/x], after everything was judged."""
    folder = tmp_path / "[red]out[" / "x]"
    answer = moecheck("run", *GOOD, "--out", str(folder))
    assert answer.code == 0
    assert str(folder) in answer.out


def test_help_names_every_command_and_what_it_does(moecheck: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = moecheck("--help")
    assert answer.code == 0
    for name in cli.COMMANDS:
        line = next(line for line in answer.out.splitlines() if f"│ {name} " in line)
        assert len(line.replace("│", "").split()) > 3, line
    assert moecheck("pipeline", "--help").code == moecheck("run", "--help").code == 0


def test_a_command_that_is_none_is_told(moecheck: Call) -> None:
    answer = moecheck("runn")
    assert answer.code == 3
    assert "No such command 'runn'" in answer.err


def test_a_fault_of_ours_is_3_and_shows_its_traceback(moecheck: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own exit code for an uncaught exception is 1: a kernel failed."""

    def boom(*_: object) -> None:
        raise RuntimeError("our own bug")

    monkeypatch.setattr(cli_run, "discover", boom)
    answer = moecheck("list", "--cases")
    assert answer.code == 3
    assert "our own bug" in answer.err


def test_listed_ids_parse_and_are_the_plan(moecheck: Call) -> None:
    answer = moecheck("list", "--backend", "torch_grouped_mm", "--platform", "cpu")
    request = plan.Request("cpu", "smoke", ("torch_grouped_mm",))
    rows = [tuple(line.split()) for line in answer.out.splitlines()]
    assert rows == [(i.subject, i.case_id) for i in plan.make(request, discover(), CPU).items]
    assert all(Case.parse(case_id).id == case_id for _, case_id in rows)
    assert f"{len(rows)} cases" in answer.err


def test_a_pattern_narrows_a_plan_and_an_id_adds_to_it(moecheck: Call) -> None:
    """An id beside a pattern must not vanish because the tier does not plan it."""
    answer = moecheck("list", *GOOD, "--case", "moe.bf16.t33.h64.*")
    ids = [line.split()[1] for line in answer.out.splitlines()]
    assert CASE in ids
    assert len(ids) > 1
    assert all(case_id == CASE or case_id.startswith("moe.bf16.t33.h64.") for case_id in ids)


def test_doctor_shows_every_backend_and_the_reason_of_a_no(moecheck: Call, tmp_path: Path) -> None:
    """A summary or reason goes through rich: [cpu] must not be taken for a colour."""
    file = tmp_path / "away.py"
    no = "lambda device: Support.no('library', 'pip install x[cpu]')"
    file.write_text(HEAD + f"from harness.backends.base import Support\nBACKENDS = (replace(B[0], name='away', probe={no}),)")
    answer = moecheck("doctor", "--plugin", str(file))
    assert answer.code == 0
    assert all(name in answer.out for name in (*discover(), "away", "torch", "platform"))
    assert "    pip install x[cpu]\n" in answer.out, "whole, on a line of its own: a table of 80 columns cut it"


def test_a_run_of_skips_alone_says_that_nothing_ran(moecheck: Call, tmp_path: Path) -> None:
    """A broken install of a library gives a table of zeros and exit code 0, as a clean run does."""
    skipped = CASE.replace("bf16", "nvfp4")
    answer = moecheck("run", "-b", "torch_grouped_mm", "--case", skipped, "--platform", "cpu", "--out", str(tmp_path / "a"))
    assert "NOTHING RAN: every case was skipped" in answer.out
    assert "NOTHING RAN" not in moecheck("run", *GOOD, "--out", str(tmp_path / "b")).out


def test_repro_of_a_passing_case_is_clean(moecheck: Call) -> None:
    answer = moecheck("repro", CASE, "--backend", "torch_grouped_mm", "--platform", "cpu")
    assert answer.code == 0
    assert answer.out.startswith("PASSED torch_grouped_mm on ")


def test_a_failures_rerun_line_fails_the_same_way(moecheck: Call) -> None:
    """A line that is printed but lacks the plugin, or quotes it badly, reproduces nothing."""
    first = moecheck("repro", CASE, "--platform", "cpu", "--backend", "broken_gate_up_swapped", "--plugin", EXAMPLES)
    assert first.code == 1
    assert "gate_up_swap: the output is that of gate and up exchanged" in first.out
    again = moecheck(*shlex.split(rerun(first))[1:])
    assert (again.code, again.out.split(" (stage")[0]) == (1, first.out.split(" (stage")[0])


def test_a_rerun_line_works_from_any_folder(moecheck: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So do plan.json and --resume: they hold the same path."""
    monkeypatch.chdir(Path(EXAMPLES).parent)
    given = ("--backend", "broken_gate_up_swapped", "--plugin", Path(EXAMPLES).name)
    first = moecheck("repro", CASE, "--platform", "cpu", *given)
    monkeypatch.chdir(tmp_path)
    assert moecheck(*shlex.split(rerun(first))[1:]).code == first.code == 1


def test_the_rerun_line_judges_on_the_same_platform(moecheck: Call) -> None:
    """`--platform cpu` on a machine with a GPU: repro would detect the GPU and judge another kernel."""
    answer = moecheck("repro", CASE, "--backend", "torch_grouped_mm", "--platform", "cpu")
    assert "--platform cpu" in rerun(answer)


def test_every_platform_and_tier_can_be_listed(moecheck: Call) -> None:
    for name in config.names("platforms"):
        assert moecheck("list", "--platform", name, "--backend", "torch_grouped_mm", "--case", CASE).code == 0
