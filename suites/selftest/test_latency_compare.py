"""Two versions in one session: who meets whom, in which order, with what on their path, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness import cli_latency
from harness.backends.base import CPU, Device
from harness.case import Case
from harness.errors import MoecheckError, TimingError
from harness.latency import compare, overlay
from harness.latency.clocks import Clock
from harness.latency.compare import Contest, turn
from harness.latency.statistics import Call, Design
from harness.latency.timer import Side, Timer

CASE = Case.parse("moe.bf16.t3.h64.i64.e4.k2.renormalize.swiglu.standard.real.s0")
PADDED = str(Path(__file__).resolve().parents[2] / "examples" / "padded_kernels.py")
TOY = """
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS, prepare
def released(case, inputs):
    from moecheck_toy import kernel
    launch = prepare(case, inputs)
    return replace(launch, call=lambda: kernel(launch.call()))
BACKENDS = (replace(BACKENDS[0], name="toy", library="moecheck-toy", prepare=released, script=None),)
"""


def release(root: Path, version: str, body: str) -> str:
    """An overlay folder with one release of the toy library."""
    (root / f"moecheck_toy-{version}.dist-info").mkdir(parents=True)
    (root / f"moecheck_toy-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: moecheck-toy\nVersion: {version}\n"
    )
    (root / "moecheck_toy.py").write_text(body)
    return str(root)


class Fake:
    """A child whose calls take what `us` says of its side; every turn is recorded."""

    log: ClassVar[list[str]]
    us: ClassVar[dict[str, float]]
    methods: ClassVar[dict[str, str]]

    def __init__(self, side: Side, device: Device, logs: Path, limit_s: float) -> None:
        self.side, self.environment = side, {"python": "3"}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        self.log.append(f"end {self.side.name}")

    def prepare(self, case: Case, graph: bool) -> None:
        assert graph

    def wait(self) -> dict[str, Any]:
        return {"timed": {"method": self.methods.get(self.side.name, "clock"), "notes": []}}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"timed": {"us": [self.us[self.side.name]] * 4}}

    def slot(self, calls: int) -> tuple[list[float], Clock]:
        self.log.append(self.side.name)
        return [self.us[self.side.name] * (1 + 0.001 * (len(self.log) % 5))] * calls, Clock()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(compare, "Timer", Fake)
    Fake.log, Fake.us, Fake.methods = [], {"a": 100.0, "b": 112.0}, {}
    return Fake


def contest(tmp_path: Path, *sides: Side) -> Contest:
    a, b = sides or (Side("x", name="a"), Side("x", name="b"))
    return Contest(CASE, (a, b), CPU, tmp_path, 60.0, Design(), blocks=4)


def test_every_block_has_each_process_once_and_again_in_reverse(fake: type[Fake], tmp_path: Path) -> None:
    """A A A B B B would give the later one the warmer card."""
    comparison, rounds = contest(tmp_path).run()
    assert comparison.call is Call.SLOWER
    assert comparison.ratio == pytest.approx(1.12, abs=2e-3)
    assert len(rounds) == Design.first
    turns = [name for name in fake.log if not name.startswith("end")]
    assert len(turns) == Design.first * 4 * 8
    blocks = [turns[i : i + 8] for i in range(0, len(turns), 8)]
    assert all(sorted(block) == ["a"] * 4 + ["b"] * 4 for block in blocks)
    assert all(block == block[::-1] for block in blocks)
    assert len({tuple(block) for block in blocks}) > 2, "the order is always the same"
    assert fake.log.count("end a") == fake.log.count("end b") == 2 * Design.first, "a round has fresh processes"


def test_a_graph_is_not_compared_with_a_call(fake: type[Fake], tmp_path: Path) -> None:
    fake.methods = {"a": "graph", "b": "events"}
    with pytest.raises(TimingError, match=r"a is timed by graph, b by events: they cannot be compared .* --no-graph"):
        contest(tmp_path).run()


def test_two_repeats_are_drawn_anew(fake: type[Fake], tmp_path: Path) -> None:
    one = contest(tmp_path)
    one.run()
    first, fake.log = fake.log, []
    one.run()
    assert first != fake.log


def test_a_turn_is_whole_rotations() -> None:
    gpu = replace(CPU, kind="cuda")
    assert [turn(us, 4, gpu) for us in (1.0, 500.0, 1e3, 1e6)] == [64, 20, 8, 4]
    assert turn(1e9, 1, CPU) == 1


def test_two_releases_in_two_overlays_are_two_kernels(
    moecheck: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both children live at once, each with its own release in front of its path; B computes the layer and sleeps."""
    monkeypatch.setattr(cli_latency, "Design", partial(Design, first=1))
    plugin, result = tmp_path / "toy.py", tmp_path / "out.json"
    plugin.write_text(TOY)
    old = release(tmp_path / "old", "1.0", "def kernel(out):\n    return out\n")
    slow = "import time\ndef kernel(out):\n    time.sleep(0.002)\n    return out\n"
    new = release(tmp_path / "new", "2.0", slow)
    sides = ("--a", old, "--b", new, "--backend", "toy", "--plugin", str(plugin))
    answer = moecheck(
        "latency", "compare", CASE.id, *sides, "--platform", "cpu", "--blocks", "2", "--most", "3", "--json", str(result)
    )
    assert answer.code == 0, answer
    data = json.loads(result.read_text())
    assert [s["environment"]["moecheck-toy"] for s in data["sides"]] == ["1.0", "2.0"]
    assert math.log(data["comparisons"][0]["ratio"]) > 0
    assert "toy, moecheck-toy 2.0, timed by clock" in answer.out
    assert len(cli_latency.recorded(result)) == len(data["comparisons"][0]["measured"])
    power = moecheck("latency", "power", str(result), "--trials", "100", "--slowdown", "0.05")
    assert power.code == 0, power
    assert "B slower by 5 %: " in power.out


def test_a_wrong_release_is_not_timed(tmp_path: Path) -> None:
    plugin = tmp_path / "toy.py"
    plugin.write_text(TOY)
    good = release(tmp_path / "old", "1.0", "def kernel(out):\n    return out\n")
    bad = release(tmp_path / "new", "2.0", "def kernel(out):\n    return out * 1.5\n")
    sides = (Side("toy", (str(plugin),), folder, name) for folder, name in ((good, "old"), (bad, "new")))
    with pytest.raises(TimingError, match=r"new is WRONG on moe.bf16.*only correct kernels are timed: moecheck repro"):
        contest(tmp_path, *sides).judge()


def test_a_kernel_that_raises_while_it_is_timed_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "toy.py"
    plugin.write_text(TOY)
    with Timer(Side("toy", (str(plugin),), name="the toy"), CPU, tmp_path, 60.0) as timer:
        timer.prepare(CASE, graph=True)
        with pytest.raises(
            TimingError, match="the toy: ModuleNotFoundError: No module named 'moecheck_toy' while it was timed"
        ):
            timer.wait()


def test_a_library_that_the_worker_has_imported_is_not_timed_under_another_release(tmp_path: Path) -> None:
    """The environment would say 9.9, and every call would run what was imported before."""
    for name, version in (("torch", "9.9"), ("numpy", "0.1")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    with Timer(Side("torch_grouped_mm", (), str(tmp_path), "B"), CPU, tmp_path, 60.0) as timer:
        timer.prepare(CASE, graph=True)
        with pytest.raises(TimingError, match=r"B: torch 9.9 of .* is not used: 2\..* was imported before"):
            timer.wait()
    why, notes = overlay.refusal(str(tmp_path), "vllm")
    assert "numpy" not in why
    assert any(note.startswith("numpy 0.1 of") for note in notes)
    assert overlay.refusal("", "torch") == ("", [])


@pytest.mark.parametrize(
    ("given", "backend", "wanted"),
    [
        (["torch_grouped_mm"], None, Side("torch_grouped_mm", name="A (torch_grouped_mm)")),
        ([PADDED, "triton_moe_padded"], None, Side("triton_moe_padded", (PADDED,), name=f"A ({PADDED} triton_moe_padded)")),
        (["/tmp"], "triton_moe", Side("triton_moe", (), "/tmp", "A (/tmp)")),
    ],
)
def test_a_side_is_a_backend_a_plugin_or_a_folder(given: list[str], backend: str | None, wanted: Side) -> None:
    assert cli_latency.side("A", given, backend, []) == wanted


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["/tmp"], "--a names no backend"),
        ([PADDED], "--a names no backend"),
        (["/no/such/folder"], "no such folder"),
        (["triton_moe", "torch_grouped_mm"], "one backend and one folder a side"),
        (["triton_mo"], "did you mean triton_moe"),
        (["/no/such.py"], "no such file"),
    ],
)
def test_a_side_that_is_none_is_a_clear_error(given: list[str], hint: str) -> None:
    with pytest.raises(MoecheckError, match=hint):
        cli_latency.side("A", given, None, [])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "comparisons": [{"measured": [{"values": 3}]}]}']
)
def test_a_file_of_comparisons_that_is_none_is_a_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TimingError, match=r"x.json: not a file of comparisons .*compare --json FILE"):
        cli_latency.recorded(tmp_path / "x.json")
