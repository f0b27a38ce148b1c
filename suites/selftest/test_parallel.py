"""Several ranks over gloo: right kernels pass, whatever the shares; a wrong host or rank is caught, and that rank named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.backends import discover
from harness.backends.base import CPU, Device
from harness.case import Case
from harness.errors import MoecheckError
from harness.parallel import blame
from harness.parallel.blame import Answer as Said
from harness.parallel.cases import indivisible
from harness.parallel.group import Group
from harness.parallel.placement import Placement, share
from harness.parallel.rank import RankSetup
from harness.parallel.run import Ranks
from harness.select import Item
from harness.verdict import Status, Verdict

SLOTS, TOKENS = "torch_grouped_mm", "flashinfer_cutlass_bf16_twin"  # a packet is a slot; a packet is a token
CASE = "moe.bf16.t9.h64.i64.e9.k2.renormalize.swiglu.standard.real.s0"
LIMIT_S = 30.0
# of the processes of a test plugin; rank 1 is the guilty one
KERNELS = """
import ctypes
import torch, torch.distributed as dist
from dataclasses import replace
from harness.backends.torch_grouped_mm import BACKENDS as REAL
from harness.backends.base import Launch

def made(name, deed):
    def prepare(case, inputs):
        launch = REAL[0].prepare(case, inputs)
        def call():
            rows = launch.call()
            return deed(rows) if dist.get_rank() == 1 else rows
        return Launch(call, launch.buffers)
    return replace(REAL[0], name=name, prepare=prepare)

def spin(rows):
    while True:
        pass

BACKENDS = (made("dies", lambda rows: ctypes.string_at(0)), made("spins", spin), made("doubles", lambda rows: rows * 2))
"""


class Groups:
    """One group for each host and number of ranks, started when asked for."""

    def __init__(self, plugins: tuple[str, ...]) -> None:
        self._stack, self._plugins = ExitStack(), plugins
        self._groups: dict[tuple[int, str], Ranks] = {}

    def judge(self, backend: str, case: str = CASE, ranks: int = 2, host: str = "", limit_s: float = LIMIT_S) -> Verdict:
        """The verdict on one case."""
        where = f"harness.faults.hosts:{host}" if host else "harness.parallel.host:Host"
        if (ranks, where) not in self._groups:
            self._groups[ranks, where] = self._stack.enter_context(Ranks(CPU, ranks, LIMIT_S, self._plugins, where))
        group = self._groups[ranks, where]
        group.limit_s = group.group.limit_s = limit_s
        return group.judge(Item(case, f"{backend}_ep{ranks}"))

    def close(self) -> None:
        """End them all."""
        self._stack.close()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    plugin = tmp_path_factory.mktemp("plugin") / "guilty.py"
    plugin.write_text(KERNELS)
    found = Groups((str(plugin),))
    yield found
    found.close()


def vary(**axes: int | str) -> str:
    return Case.parse(CASE).vary(**axes).id


RIGHT = {
    "experts and tokens do not divide": (3, {"experts": 7, "tokens": 10}),
    "four ranks, one token": (4, {"tokens": 1}),
    "ranks that receive nothing": (4, {"skew": "half"}),
    "everything goes to one rank": (3, {"skew": "hot", "top_k": 1}),
    "no tokens at all": (3, {"tokens": 0}),
    "experts with biases": (3, {"bias": "bias", "experts": 7}),
    "bits are due": (2, {"fill": "exact"}),
}


@pytest.mark.parametrize("backend", [SLOTS, TOKENS])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_passes_on_any_shares(groups: Groups, backend: str, name: str) -> None:
    ranks, axes = RIGHT[name]
    verdict = groups.judge(backend, vary(**axes), ranks)
    assert verdict.status is Status.PASSED, verdict.reason
    assert verdict.comparison is not None
    if axes.get("fill") == "exact":
        assert verdict.comparison.lane == "exact"


def test_a_weight_on_the_input_cannot_stay_at_home() -> None:
    case = Case.parse(vary(weighting="oninput"))
    assert "sent without its weight" in str(indivisible(discover(())[SLOTS], case))
    assert indivisible(discover(())[TOKENS], case) is None


WRONG = {
    "WrongSplits": "rank 1, during dispatch: it sends",
    "OtherTokens": "rank 1, during dispatch:",
    "SwappedCombine": "rank 1, during combine:",
    "DroppedResults": "rank 0, during combine: the results of rank 1 are missing",
    "SilentReturn": "rank 1, during return:",
    "WeightsTwice": "rank 1, during combine: the routing weights are applied twice",
}


@pytest.mark.parametrize("host", WRONG)
def test_a_wrong_host_is_caught_and_the_rank_named(groups: Groups, host: str) -> None:
    verdict = groups.judge(SLOTS, host=host)
    assert verdict.status is Status.WRONG
    assert verdict.reason.startswith(WRONG[host]), verdict.reason


FATAL = {
    "Segfaults": (Status.CRASHED, "rank 1 of 2, during return: killed by SIGSEGV"),
    "Exits": (Status.CRASHED, "rank 1 of 2, during dispatch: the process exited with code 7"),
    "Raises": (Status.CRASHED, "rank 1 of 2, during combine: RuntimeError: no room for the sum"),
}


@pytest.mark.parametrize("host", FATAL)
def test_a_rank_that_dies_is_named_and_the_next_case_has_another_group(groups: Groups, host: str) -> None:
    status, text = FATAL[host]
    for _ in range(2):
        verdict = groups.judge(SLOTS, host=host)
        assert (verdict.status, verdict.reason[: len(text)]) == (status, text)


def test_a_rank_that_hangs_is_named_not_the_one_that_waits_for_it(groups: Groups) -> None:
    verdict = groups.judge(SLOTS, host="Hangs", limit_s=2.0)
    assert verdict.status is Status.HUNG
    assert verdict.reason.startswith("rank 1 of 2, during dispatch: no answer within 2 s")
    assert verdict.findings[0].evidence["others"] == {"0": "waits in dispatch"}


def test_a_wrong_or_deadly_kernel_of_one_rank_is_that_ranks(groups: Groups) -> None:
    assert groups.judge("doubles").reason.startswith("rank 1, during launch: its kernel's rows are wrong")
    assert groups.judge("dies").reason.startswith("rank 1 of 2, during launch: killed by SIGSEGV")
    assert groups.judge("spins", limit_s=2.0).reason.startswith("rank 1 of 2, during launch: no answer within 2 s")
    assert groups.judge(SLOTS).status is Status.PASSED


def test_survivors_of_a_dead_rank_are_not_blamed() -> None:
    aborted = Said(0, "return", waits=True, dead=True, exit_code=-6, at=1.0)
    gave_up = Said(1, "dispatch", waits=True, raised={"status": "CRASHED", "kind": "RuntimeError", "text": "reset"}, at=2.0)
    guilty = Said(2, "launch", dead=True, exit_code=-11, at=3.0)
    verdict = blame.verdict(Case.parse(CASE), "x_ep3", [aborted, gave_up, guilty], 9.0, {})
    assert verdict.reason == "rank 2 of 3, during launch: killed by SIGSEGV"
    assert verdict.findings[0].evidence["others"] == {"0": "died in return", "1": "gave up in dispatch"}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_what_the_device_said_is_the_cause_not_the_drivers_chatter(tmp_path: Path, kind: str) -> None:
    """On two H200 a bad address came home as `having said: coredump: All done`."""
    said = "coredump: Detected an exception of type CUDBG_EXCEPTION_WARP_ILLEGAL_ADDRESS (14)\ncoredump: All done (took 00s)\n"
    ours, theirs = Pipe()
    theirs.close()
    log = SimpleNamespace(since=lambda mark: said)
    channel = SimpleNamespace(pipe=ours, receive=lambda deadline: ours.recv())
    group = Group(RankSetup(Device(kind, "sm90"), (), "", ranks=1), tmp_path, 1.0)
    group._children = [SimpleNamespace(channel=channel, log=log, process=SimpleNamespace(sentinel=ours), pid=7, resident=0)]  # type: ignore[list-item]
    group._children[0].exit_code = lambda: -6  # type: ignore[method-assign]
    (answer,) = group._listen(time.monotonic() + 5, [0])
    reason = blame.verdict(Case.parse(CASE), "x_ep1", [answer], 9.0, {}).reason
    assert ("killed by SIGABRT: CUDA exception Warp Illegal Address (said by the process log)" in reason) == (kind == "cuda"), (
        reason
    )


def test_ranks_that_wait_for_each_other_are_told_apart_by_what_the_routing_says() -> None:
    due = {"dispatch": [((1, 2), (1, 3)), ((3, 1), (2, 1))], "return": [((1, 3), (1, 2)), ((2, 1), (3, 1))]}
    ranks = [Said(0, "dispatch", waits=True, hang="in a wait"), Said(1, "dispatch", waits=True, hang="in a wait")]
    ranks[0].hear({"stage": "dispatch", "waits": True, "send": [1, 2], "receive": [1, 3]})
    ranks[1].hear({"stage": "dispatch", "waits": True, "send": [2, 1], "receive": [2, 1]})
    verdict = blame.verdict(Case.parse(CASE), "x_ep2", ranks, 9.0, due)
    assert verdict.status is Status.WRONG
    assert "; then: the ranks wait for each other" in verdict.reason
    assert verdict.reason.startswith(
        "rank 1, during dispatch: it sends [2, 1] rows and receives [2, 1]; the routing says [3, 1]"
    )


@pytest.mark.parametrize(("total", "ranks"), [(0, 3), (1, 4), (7, 3), (8, 4)])
def test_shares_are_whole_in_order_and_even(total: int, ranks: int) -> None:
    shares = [share(total, ranks, rank) for rank in range(ranks)]
    assert [i for part in shares for i in part] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Placement(ranks, total, 9, True).tokens_of(0) == shares[0]


def test_the_command_records_and_resumes(moecheck, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    asked = ("parallel", "--ranks", "2", "--platform", "cpu", "-b", SLOTS, "--case", CASE)
    first = moecheck(*asked, "--out", str(tmp_path / "run"))
    assert first.code == 0, first.err
    assert "1 passed" in first.out
    again = moecheck("parallel", "--resume", str(tmp_path / "run"))
    assert again.code == 0
    assert "PASSED" not in again.out.splitlines()[0]
    other = moecheck("parallel", "--resume", str(tmp_path / "run"), "--host", "harness.faults.hosts:Exits")
    assert (other.code, "was begun with harness.parallel.host:Host" in other.err) == (3, True)
    refused = moecheck(*asked, "--transport", "nccl", "--out", str(tmp_path / "other"))
    assert (refused.code, (tmp_path / "other").exists()) == (3, False)
    assert "gloo" in refused.err


def test_the_rerun_line_names_the_ranks(groups: Groups) -> None:
    rerun = groups.judge(SLOTS).rerun
    assert rerun.startswith(f"moecheck parallel --ranks 2 --case {CASE} --backend {SLOTS}")


def test_a_host_that_is_none_is_the_users_fault() -> None:
    with (
        pytest.raises(MoecheckError, match="wanted MODULE:CLASS"),
        Ranks(CPU, 2, LIMIT_S, (), "harness.parallel.host:Nobody") as group,
    ):
        group.judge(Item(CASE, f"{SLOTS}_ep2"))
