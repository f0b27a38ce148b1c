"""Attribution and the table of releases on real overlays: tiny wheels from a folder, a kernel that depends on them."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from harness.cli_matrix_versions import columns
from harness.errors import MoecheckError
from harness.select import Item
from harness.verdict import Comparison, Finding, Stage, Status, Verdict
from harness.versions import window
from harness.versions.env import Source
from harness.versions.upgrade import Upgrade, pins
from harness.versions.window import Release, spans

CASE = "moe.bf16.t5.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
ITEM = Item(CASE, "toy")
PLUGIN = """
import importlib
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as REAL

def prepare(case, inputs):
    factor = importlib.import_module("moecheck_toy_a").FACTOR
    launch = REAL[0].prepare(case, inputs)
    return replace(launch, call=lambda: launch.call() * factor)

BACKENDS = (replace(REAL[0], name="toy", prepare=prepare, script=None, library="moecheck-toy-a"),)
"""


class Answered(Protocol):
    """See conftest.py."""

    code: int
    out: str
    err: str


Call = Callable[..., Answered]


def wheel(folder: Path, name: str, version: str, code: str, requires: Sequence[str] = ()) -> None:
    stem, needs = f"{name.replace('-', '_')}-{version}", "".join(f"Requires-Dist: {r}\n" for r in requires)
    module, info = f"{name.replace('-', '_')}.py", f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(module, code)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{module},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five packages of two releases; c 2 wants d 2. FACTOR of a: 1, 2 (wrong), and 3 does not import; 4 is right again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "house"
    folder.mkdir()
    for name in "abcde":
        for version in "12":
            needs = ["moecheck-toy-d==2"] if (name, version) == ("c", "2") else []
            wheel(folder, f"moecheck-toy-{name}", version, f"V = {version}\nFACTOR = {version}.0\n", needs)
    wheel(folder, "moecheck-toy-a", "3", "raise ImportError('built for another torch')\n")
    wheel(folder, "moecheck-toy-a", "4", "FACTOR = 1.0\n")
    return folder


def all_at(version: str, names: str = "abcde") -> str:
    return ",".join(f"moecheck-toy-{name}=={version}" for name in names)


def script(expression: str) -> str:
    names = [f"moecheck_toy_{n} as {n}" for n in "abcde" if f"{n}.V" in expression]
    return f"{sys.executable} -S -c 'import sys, {', '.join(names)}; sys.exit(7 * ({expression}))'"


def attributed(moecheck: Call, house: Path, test: str, *more: str) -> Answered:
    ends = ("--from", all_at("1"), "--to", all_at("2"), "--wheelhouse", str(house), "--once", "--command", test)
    return moecheck("attribute", *ends, *more)


def test_a_culprit_is_found_among_five_and_the_journal_answers_again(tmp_path: Path, house: Path, moecheck: Call) -> None:
    """A set with c 2 and d 1 does not resolve: it cannot be told, and does not mislead. The second time nothing is run."""
    files = ("--journal", str(tmp_path / "j.jsonl"), "--json", str(tmp_path / "found.json"))
    answer = attributed(moecheck, house, script("b.V == 2"), *files)
    assert answer.code == 0, answer
    assert answer.out.startswith("moecheck-toy-b==2 breaks it\n")
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["causes"] == [{"packages": ["moecheck-toy-b"], "needed": ["moecheck-toy-b"], "suspects": []}]
    assert data["rest"] == "good"
    again = attributed(moecheck, house, script("b.V == 2"), *files)
    assert again.out == answer.out
    assert again.err == ""


def test_a_pair_that_only_breaks_together(house: Path, moecheck: Call) -> None:
    answer = attributed(moecheck, house, script("d.V + e.V == 4"))
    assert answer.code == 0, answer
    assert answer.out.startswith("moecheck-toy-d==2,moecheck-toy-e==2 breaks it, and only together\n")


def test_what_cannot_be_taken_apart_stays_suspect(house: Path, moecheck: Call) -> None:
    """c 2 does not move without d 2."""
    ends = ("--from", all_at("1", "cd"), "--to", all_at("2", "cd"), "--wheelhouse", str(house), "--once")
    answer = moecheck("attribute", *ends, "--command", script("c.V == 2"))
    assert answer.code == 0, answer
    assert "suspects, of which nothing could be told alone: moecheck-toy-d==2; moecheck-toy-c==2 is needed" in answer.out
    assert "does not resolve" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "a>=1", "--to", "a==2", "--command", "x"), "one exact version"),
        (("--from", "a=1", "--to", "a==2", "--command", "x"), "is no requirement"),
        (("--from", "a==1", "--to", "a==1", "--command", "x"), "nothing moves"),
        (("--from", "a==1", "--to", "a==2"), "--case ID and --backend NAME, or --command"),
        (("--from", "a==1", "--to", "a==2", "--case", CASE, "--platform", "cpu"), "--case needs --backend"),
    ],
)
def test_what_is_no_question_is_refused(arguments: tuple[str, ...], said: str, moecheck: Call) -> None:
    answer = moecheck("attribute", *arguments)
    assert answer.code == 3
    assert said in answer.err


def test_packages_that_arrive_or_go_are_moves_too() -> None:
    upgrade = Upgrade(pins("a==1, B_x==1", "--from"), pins("a==1,c==2", "--to"))
    assert upgrade.changed == ("b-x", "c")
    assert upgrade.pins(frozenset()) == "a==1,b-x==1"
    assert upgrade.pins(frozenset(["c"])) == "a==1,b-x==1,c==2"
    assert upgrade.pins(frozenset(["b-x", "c"])) == "a==1,c==2"
    assert upgrade.label(frozenset(["b-x", "c"])) == "b-x gone,c==2"
    with pytest.raises(MoecheckError, match="one exact version"):
        pins("a==1.*", "--from")


PASSED = Verdict(CASE, "toy", Status.PASSED, Stage.DONE, comparison=Comparison("real", 1, 0, 0, 6, 1, 2, 0, 0, 0, ()))


def verdict(status: Status) -> Verdict:
    return PASSED if status is Status.PASSED else Verdict(CASE, "toy", status, Stage.DONE, "r", (Finding("values", ""),))


def row(text: str) -> list[Release]:
    kinds = {mark: status for status, mark in reversed(window.LETTERS.items())}
    return [Release(str(i), {} if c == "?" else {ITEM: verdict(kinds[c])}) for i, c in enumerate(text)]


@pytest.mark.parametrize(
    ("text", "said", "marked"),
    [
        ("..WW..", "2 to 3", ". . [W] [W] . ."),
        (".?WCW", "2 to the newest tried", ". ? [W] C [W]"),
        ("W-?T.", "0 or older to 0", "[W] - ? T ."),
        (".W.W.", "1 to 1; 3 to 3", ". [W] . [W] ."),
        ("..-", "", ". . -"),
    ],
)
def test_the_window_of_a_case_is_told(text: str, said: str, marked: str) -> None:
    releases = row(text)
    assert "; ".join(map(str, spans(releases, ITEM))) == said
    assert " ".join(window.cells(releases, ITEM)) == marked
    shown = window.markdown("toy", releases, [ITEM])
    assert f"| {marked.replace(' ', ' | ')} | {said} |" in shown
    assert ("UNSUPPORTED: r" in shown) is ("-" in text)


def test_one_plan_over_releases_through_their_overlays(tmp_path: Path, house: Path, moecheck: Call) -> None:
    """2 doubles, 3 does not import; the second time nothing is judged."""
    plugin, runs = tmp_path / "toy.py", tmp_path / "runs"
    plugin.write_text(PLUGIN)
    ends = ("--versions", "2,3", "--wheelhouse", str(house), "--out", str(runs))
    which = ("--case", CASE, "--backend", "toy", "--plugin", str(plugin), "--platform", "cpu")
    files = ("--json", str(tmp_path / "m.json"), "--markdown", str(tmp_path / "m.md"))
    answer = moecheck("matrix-versions", "moecheck-toy-a", *ends, *which, *files)
    assert answer.code == 1, answer
    (only,) = json.loads((tmp_path / "m.json").read_text())["cases"]
    assert only["statuses"] == {"2": "WRONG", "3": "?"}
    assert f"| toy | `{CASE}` | [W] | ? | 2 or older to the newest tried |" in (tmp_path / "m.md").read_text()
    assert "3 cannot be told" in answer.out
    assert "built for another torch" in answer.out
    journal = (runs / "2" / "journal.jsonl").read_bytes()
    assert json.loads(journal)["environment"]["moecheck-toy-a"] == "2"
    other = moecheck("matrix-versions", "moecheck-toy-a", *ends, *which, "--case", CASE.replace(".s0", ".s1"))
    assert other.code == 3
    assert "another plan" in other.err


def test_the_columns_are_named_one_way(house: Path) -> None:
    source = Source(wheelhouse=house)
    assert columns("moecheck-toy-a", None, "1", "newest", source) == ["1", "2", "3", "4"]
    assert columns("moecheck-toy-a", None, "3", "2", source) == ["2", "3"]
    assert columns("x", "0.7, 0.5", None, None, source) == ["0.7", "0.5"]
    for wrong in ((None, None, None), ("1", "1", "2"), (None, "1", None), ("1,1.0", None, None), (",", None, None)):
        with pytest.raises(MoecheckError):
            columns("moecheck-toy-a", *wrong, source)


def test_a_command_that_names_its_pins_makes_its_own_environment(tmp_path: Path, moecheck: Call) -> None:
    """No overlay is made: these packages are nowhere."""
    asked = tmp_path / "asked"
    test = f'{sys.executable} -S -c \'import sys; open(sys.argv[1], "a").write(sys.argv[2] + chr(10)); '
    test += f'sys.exit("b==2" in sys.argv[2])\' {asked} {{pins}}'
    answer = moecheck("attribute", "--from", "a==1,b==1", "--to", "a==2,b==2,c==1", "--once", "--command", test)
    assert answer.code == 0, answer
    assert answer.out.startswith("b==2 breaks it\n")
    assert asked.read_text().splitlines()[:2] == ["a==2,b==2,c==1", "a==1,b==1"]
