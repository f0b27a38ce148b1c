"""Relations, state checks and memory guards: each finds the defect it is for, and nothing in a clean subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness import variants
from harness.backends.base import CPU, Backend, Device, Launch
from harness.case import Case, Limit
from harness.inputs import Inputs, make_inputs
from harness.memory import HUGE, NAN, RED_ZONE, RedZones, held, poisoned
from harness.oracle import expect
from harness.pipeline import Options, run
from harness.relations import CHECKS, _refuses, chosen, step
from harness.twins.aligned import AlignedMoe
from harness.twins.base import Twin
from harness.twins.grouped import GroupedMoe
from harness.variants import another_order, duplicate_expert, relabelled, shards
from harness.verdict import Status
from reference.rounding import Rounding

CASE = Case.parse("moe.bf16.t9.h64.i32.e5.k2.renormalize.swiglu.standard.real.s0")


def judged(twin: type[Twin], case: Case = CASE) -> tuple[Status, str]:
    """(status, first finding) of a twin with all checks asked."""
    verdict = run(case, twin.backend(f"sut_{twin.__name__}"), CPU, options=Options())
    return verdict.status, verdict.findings[0].check if verdict.findings else ""


class Accumulates(AlignedMoe):
    """Adds onto a static buffer that it zeroed once."""

    def run(self, out: Tensor) -> None:
        """Keeps the sum of all calls."""
        super().run(out)
        self.total = out.clone() if not hasattr(self, "total") else self.total + out
        out.copy_(self.total)


class Kept(AlignedMoe):
    """Returns one buffer again and again."""

    def __call__(self) -> Tensor:
        """The buffer of the first call."""
        if not hasattr(self, "kept"):
            self.kept = torch.empty(self.shape.tokens, self.shape.hidden, dtype=self.dtype)
        self.run(self.kept)
        return self.kept


class Remembers(AlignedMoe):
    """Routes every step as the first one."""

    def topk(self) -> tuple[Tensor, Tensor]:
        """Of the first call."""
        if not hasattr(self, "first"):
            self.first = tuple(t.clone() for t in super().topk())
        return self.first[0], self.first[1]


class Rebinds(AlignedMoe):
    """Writes its result to a tensor of its own and rebinds the caller's name."""

    def out(self, buffer: Tensor) -> object:
        """The caller's buffer stays as it was."""
        return self()


class IgnoresStride(AlignedMoe):
    """Writes the out buffer as if its rows were contiguous."""

    def out(self, buffer: Tensor) -> object:
        """Row after row without the gap."""
        flat = torch.as_strided(buffer, (buffer.numel(),), (1,))
        flat.copy_(self().flatten())
        return buffer


class Skips(AlignedMoe):
    """Leaves the last column to whatever memory held."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """All but one column."""
        full = torch.empty_like(out)
        super().combine(rows, full)
        out[:, :-1] = full[:, :-1]


class ReadsPadding(AlignedMoe):
    """Adds a thousandth of what lies behind x."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """One element too far."""
        super().combine(rows, out)
        x = self.step["x"]
        behind = torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel())
        out[0, 0] += (behind.float().abs() > 1).to(out.dtype)[0]


class WritesBehind(AlignedMoe):
    """Writes one element behind x."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """A store without its mask."""
        super().combine(rows, out)
        x = self.step["x"]
        torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel()).fill_(3.0)


class ForgetsRank(AlignedMoe):
    """Takes every slot for a local one."""

    def expert_map(self, ids: Tensor) -> Tensor:
        """Non-local experts fold onto local ones."""
        return ids % len(self.local)


class SharedMaximum(AlignedMoe):
    """Scales the batch by its largest element and back: one bad row is everybody's."""

    def combine(self, rows: Tensor, out: Tensor) -> None:
        """Through the maximum of the batch."""
        super().combine(rows, out)
        top = out.abs().max()
        out.copy_((out.float() / top) * top)


class FrozenReplay(AlignedMoe):
    """A replay that does not read the ids again."""

    def capture(self) -> Callable[[], Tensor]:
        """ids as captured."""
        ids = self.step["ids"].clone()

        def replay() -> Tensor:
            live = self.step["ids"]
            self.step["ids"] = ids
            try:
                return self()
            finally:
                self.step["ids"] = live

        return replay


CACHE: dict[tuple[int, ...], object] = {}


class CachesByShape(AlignedMoe):
    """Prepared weights are looked up by their shape."""

    def pack(self, inputs: Inputs) -> tuple:  # type: ignore[type-arg]
        """The first layer's."""
        key = (self.shape.hidden, self.shape.inter, self.shape.experts)
        return CACHE.setdefault(key, super().pack(inputs))  # type: ignore[return-value]


class CopiesAtPreparation(AlignedMoe):
    """Keeps a private copy of the factors; the buffer it shows is not read."""

    def launch(self) -> Launch:
        """The buffer is a decoy."""
        launch = super().launch()
        return Launch(self, {**launch.buffers, "w2_factors": self.w2.factors.clone(), "w2": self.w2.codes.clone()})


class NarrowTacticIsWrong(GroupedMoe):
    """One of its tactics forgets the routing weights."""

    def _narrow(self) -> Tensor:
        return self() * 2


@pytest.mark.parametrize(
    ("twin", "status", "check"),
    [
        (Accumulates, Status.UNSTABLE, "repeat"),
        (Kept, Status.CORRUPTING, "aliasing"),
        (Remembers, Status.UNSTABLE, "next_step"),
        (Rebinds, Status.WRONG, "out_buffer"),
        (IgnoresStride, Status.WRONG, "out_strided"),
        (Skips, Status.WRONG, "never_written"),
        (ReadsPadding, Status.UNSTABLE, "poison"),
        (WritesBehind, Status.CORRUPTING, "red_zone"),
        (ForgetsRank, Status.WRONG, "expert_parallel"),
        (FrozenReplay, Status.UNSTABLE, "graph"),
        (CachesByShape, Status.UNSTABLE, "other_weights"),
        (CopiesAtPreparation, Status.UNSTABLE, "weights_in_place"),
        (SharedMaximum, Status.WRONG, "garbage_rows"),
        (NarrowTacticIsWrong, Status.WRONG, "tactic"),
    ],
)
def test_each_defect_is_found_by_the_check_it_is_for(twin: type[Twin], status: Status, check: str) -> None:
    assert judged(twin) == (status, check)


def test_every_check_has_a_planted_defect_or_is_a_relation_between_inputs() -> None:
    """The others are judged like cases of their own: a wrong answer is found by the oracle whatever the relation."""
    planted = {"next_step", "other_weights", "out_buffer", "out_strided", "expert_parallel", "graph", "tactic"}
    planted |= {"weights_in_place"}
    between = {"token_permutation", "split_batch", "expert_relabelling", "zero_weight", "duplicate_expert", "strided_inputs"}
    between |= {"garbage_rows", "halved_weights", "zero_rows", "tiny_rows"}
    assert {check.name for check in CHECKS} == planted | between


@pytest.mark.parametrize("fill", ["real", "exact"])
def test_a_clean_twin_passes_every_check(fill: str) -> None:
    for twin in (AlignedMoe, GroupedMoe):
        assert judged(twin, CASE.vary(fill=fill)) == (Status.PASSED, "")


def test_a_declared_exemption_is_not_asked() -> None:
    backend = Rebinds.backend("sut_exempt")
    exempt = {"out_buffer": "returns its result", "out_strided": "returns its result"}
    verdict = run(CASE, Backend(**{**vars(backend), "exempt": exempt}), CPU)
    assert verdict.status is Status.PASSED


def test_checks_are_chosen_by_the_case_and_cover_all_over_a_plan() -> None:
    seen = set()
    for seed in range(60):
        case = CASE.vary(seed=seed)
        subject = _subject(case)
        names = [check.name for check in chosen(subject, 2)]
        assert names == [check.name for check in chosen(subject, 2)]
        assert len(names) == 2
        seen.update(names)
    assert seen == {check.name for check in chosen(_subject(CASE), None)}


def _subject(case: Case) -> object:
    from harness.oracle import expect
    from harness.subject import Subject

    backend = AlignedMoe.backend()
    inputs = make_inputs(case)
    launch = backend.prepare(case, inputs)
    output = launch.call()
    return Subject(case, backend, CPU, inputs, expect(case, inputs, backend.rounding(case)), launch, output, output.clone())


def test_fresh_memory_holds_the_poison() -> None:
    for byte in (NAN, HUGE):
        with poisoned(byte, CPU):
            fresh = [torch.empty(n, dtype=torch.uint8) for n in (2000, 1 << 14, 1 << 20)]
        assert all(bool((t == byte).all()) for t in fresh)
        assert held(fresh[0].view(torch.bfloat16), byte).all()


def test_red_zones_see_one_byte_on_either_side_and_keep_values_views_and_strides() -> None:
    base = torch.arange(24, dtype=torch.float32)
    whole, view = base.view(4, 6), base.view(4, 6).T[1:]
    zones = RedZones()
    zones.move({"whole": whole, "view": view})
    assert torch.equal(whole, torch.arange(24.0).view(4, 6))
    assert torch.equal(view, torch.arange(24.0).view(4, 6).T[1:])
    whole[0, 1] = 99
    assert view[0, 0] == 99  # still one storage
    assert not zones.broken()
    for byte in (NAN, HUGE):
        zones.fill(byte)
        memory = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage())
        memory[RED_ZONE - 1] ^= 1
        memory[RED_ZONE + 96] ^= 1
        assert "1 bytes from 1 bytes before" in zones.broken()["whole"]
        assert "1 bytes up to 1 bytes behind" in zones.broken()["whole"]


def test_variants_keep_what_they_promise() -> None:
    inputs = make_inputs(CASE)
    for tokens in (3, 4, 7, 8, 33, 64):
        order = another_order(tokens)
        assert sorted(order.tolist()) == list(range(tokens))
        assert bool((order != torch.arange(tokens)).all()), tokens
    other = relabelled(inputs)
    assert torch.equal(other.gate_up(0)[0].codes, inputs.gate_up(CASE.shape.experts - 1)[0].codes)
    twice = duplicate_expert(inputs)
    assert bool((twice.topk_ids[::2, 0] == twice.topk_ids[::2, -1]).all())
    assert torch.allclose(twice.routing.weights.sum(-1), inputs.routing.weights.sum(-1))
    total = sum(shard.routing.weights for shard in shards(inputs))
    assert torch.equal(total, inputs.routing.weights)  # type: ignore[arg-type]


def test_a_step_copies_only_named_buffers() -> None:
    inputs, other = make_inputs(CASE), make_inputs(CASE, variant="/other")
    launch = Launch(lambda: inputs.x, {"x": inputs.x.clone(), "w13": torch.ones(2)})
    step(launch, other)
    assert torch.equal(launch.buffers["x"], other.x)
    assert torch.equal(launch.buffers["w13"], torch.ones(2))


def test_the_device_of_the_poison_is_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the allocator's free blocks are filled as well: the ranges come from its snapshot."""
    from harness import memory

    blocks = [{"size": 512, "state": "inactive"}, {"size": 512, "state": "active_allocated", "requested_size": 500}]
    segments = [{"address": 4096, "blocks": [*blocks, {"size": 64, "state": "active_pending_free"}]}]
    assert list(memory._free_ranges(segments)) == [(4096, 512), (5108, 12)]
    filled = []
    monkeypatch.setattr(memory, "_poison_cuda", filled.append)
    with poisoned(HUGE, Device("cuda", "sm90")):
        assert filled == [HUGE]


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (ValueError("x must be contiguous"), True),
        (RuntimeError("expected stride 1 in the last dimension"), True),
        (RuntimeError("CUDA error: misaligned address"), False),
        (RuntimeError("an illegal memory access was encountered"), False),
        (SystemExit("stride"), False),
    ],
)
def test_a_refusal_of_strides_is_told_from_a_crash(error: BaseException, refusal: bool) -> None:
    assert _refuses(error) is refusal


def test_rows_are_cut_out_only_where_no_scale_spans_them() -> None:
    """A scale fitted to the batch: two tokens alone have another one (found by a dynamic per-tensor quantiser on a GPU)."""
    assert not Rounding(gate_up="bf16", middle="bf16>mxfp8").spans_rows
    assert Rounding(middle="fp8_tensor").spans_rows
    assert not Rounding(middle="fp8_tensor", middle_scale=2.0).spans_rows
    assert Rounding(middle="nvfp4").spans_rows
    assert not Rounding(x="nvfp4", x_scale=1.0, middle="nvfp4_token").spans_rows


def test_a_part_that_the_backend_refuses_is_not_asked() -> None:
    """vLLM's WNA16 switches to a kernel that adds in fp16 for few tokens: 21 of 65 tokens alone met it on an H200."""

    def prepare(case: Case, inputs: Inputs) -> Launch:
        if case.shape.tokens < 5:
            raise RuntimeError("no kernel for so few tokens")
        return plain.prepare(case, inputs)

    plain = GroupedMoe.backend("many")
    refusing = replace(
        plain, prepare=prepare, limits=(Limit(("tokens",), lambda c: None if c.shape.tokens >= 5 else "wants five tokens"),)
    )
    assert run(CASE, refusing, CPU, options=Options()).status is Status.PASSED
    assert run(CASE, replace(refusing, limits=()), CPU, options=Options()).status is Status.CRASHED


@pytest.mark.parametrize(
    ("case_id", "factor"),
    [
        ("moe.fp32.t1.h256.i160.e4.k4.renormalize.silu.standard.idcode.s0", 2.0**-20),  # nearly a float32, and yet
        ("moe.fp32.t3.h64.i32.e4.k1.renormalize.swiglu.standard.exact.s0", 2.0**-6),
    ],
)
def test_bits_are_not_due_where_the_activation_rounds(case_id: str, factor: float) -> None:
    """Tokens made tiny leave the saturated gates, and nothing narrower than fp32 is declared that would say so."""
    case = Case.parse(case_id)
    inputs = make_inputs(case)
    assert expect(case, inputs, Rounding()).exact
    tiny = expect(case, variants.scaled_rows(inputs, factor), Rounding(), guard=False)
    assert not tiny.exact
    assert "the activation rounds" in tiny.reason
