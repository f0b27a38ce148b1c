"""One case meeting one subject: prepare, launch, and what a subject raises kept apart from what we raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from harness.backends.base import Backend, Device, Launch
from harness.case import Case
from harness.compare import compare
from harness.guard import Violation, armed
from harness.inputs import Inputs
from harness.memory import NAN, poisoned
from harness.op_answers import promised
from harness.oracle import Expected, expect
from harness.variants import copied, judged_on, other_tokens, other_weights
from harness.verdict import Finding

T = TypeVar("T")


class SubjectError(Exception):
    """Carries what the subject raised past our own code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def guarded(call: Callable[[], T]) -> T:
    """Run the subject's code; whatever it raises, sys.exit included, is its verdict."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SubjectError(error) from error


def prepared(backend: Backend, given: Inputs, device: Device) -> Launch:
    """The backend's launch on these inputs, guarded from now on. SubjectError(Violation): no launch, or a broken contract."""
    with poisoned(NAN, device):
        launch = guarded(lambda: backend.prepare(given.case, given))
    if not isinstance(launch, Launch):
        text = f"prepare() must return a Launch, got {type(launch).__name__}"
        raise SubjectError(Violation([Finding("prepare", text)]))
    return guarded(lambda: armed(launch, device.kind))


@dataclass
class Subject:
    """A prepared subject and what it returned. output: the tensor of the first call itself; result: its copy on the CPU."""

    case: Case
    backend: Backend
    device: Device
    inputs: Inputs
    expected: Expected
    launch: Launch
    output: Tensor
    result: Tensor
    known: dict[int, tuple[Inputs, Expected]] = field(default_factory=dict)

    @cached_property
    def other(self) -> Inputs:
        """Another step of the same layer."""
        return other_tokens(self.inputs)

    @cached_property
    def other_layer(self) -> Inputs:
        """Another layer of the same shapes."""
        return other_weights(self.inputs)

    def prepare(self, inputs: Inputs, copy: bool = True) -> Launch:
        """A launch of the same backend on other inputs, a copy of them unless their strides matter."""
        return prepared(self.backend, copied(inputs) if copy else inputs, self.device)

    def run(self, call: Callable[[], object], poison: int = NAN) -> object:
        """Call, with poison in whatever nobody wrote, and wait for the device, so that its error is this call's."""
        with poisoned(poison, self.device):
            return guarded(lambda: synchronised(call, self.device))

    def expect(self, inputs: Inputs) -> Expected:
        """What these inputs should give, under the same declared rounding; computed once while they exist."""
        if inputs is self.inputs:
            return self.expected
        if id(inputs) not in self.known:
            declared = self.backend.rounding(inputs.case)
            self.known[id(inputs)] = inputs, expect(inputs.case, judged_on(inputs), declared, guard=False)
        return self.known[id(inputs)][1]

    def expect_rows(self, inputs: Inputs, rows: Tensor) -> Expected:
        """What `inputs`, which are the tokens `rows` of this case, should give."""
        return self.expected.rows(rows.cpu()) if self.expected.by_row else self.expect(inputs)

    def judge(self, check: str, what: str, inputs: Inputs, output: object, expected: Expected | None = None) -> Finding | None:
        """A finding of `check` if `output` is not what the oracle expects of `inputs`, or `expected` where that is known;
        `what` names the call."""
        if finding := malformed(inputs.case, output, self.device):
            return Finding(check, f"{what}: {finding.text}")
        assert isinstance(output, Tensor)
        comparison = compare(expected or self.expect(inputs), output.detach().cpu())
        if comparison.agrees:
            return None
        share = f"{comparison.beyond} of {comparison.total} elements beyond the bound, worst z {comparison.worst:.3g}"
        return Finding(check, f"{what} is wrong: {share}", {"beyond": comparison.beyond, "rows": comparison.rows_hit})


def synchronised(call: Callable[[], object], device: Device) -> object:
    """The call's result once the device is done with it. An error that the call left for the next one to raise, a launch of
    no blocks whose status nobody read, is this call's."""
    output = call()
    if device.kind == "cuda":
        torch.cuda.synchronize()
        try:
            torch.zeros(1, device="cuda")  # torch asks for the last error after each launch of its own
        except RuntimeError as error:
            text = str(error).strip().splitlines()[0]
            raise RuntimeError(f"the call returned and left an error behind for whoever comes next: {text}") from error
    return output


def malformed(case: Case, output: object, device: Device) -> Finding | None:
    """The output must be a tensor of the shape and dtype that `promised` says on the case's device."""
    if not isinstance(output, Tensor):
        return Finding("output_type", f"returned {type(output).__name__}, wanted a tensor")
    shape, wanted = promised(case)
    if tuple(output.shape) != shape:
        return Finding("output_shape", f"returned shape {tuple(output.shape)}, wanted {shape}")
    if output.dtype != wanted:
        return Finding("output_dtype", f"returned {output.dtype}, wanted {wanted}")
    if output.device.type != device.kind and case.shape.tokens != 0:
        return Finding("output_device", f"returned a tensor on {output.device}, wanted {device.kind}")
    return None


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def equal_bits(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Of pairs of tensors of one shape and dtype on one device, which are equal bit for bit; a GPU is waited for once."""
    found = [_equal(bits(a), bits(b)) for a, b in pairs]
    asked = [flag for flag in found if isinstance(flag, Tensor)]
    answers = iter(torch.stack([flag.to(asked[0].device) for flag in asked]).tolist() if asked else ())
    return [next(answers) if isinstance(flag, Tensor) else flag for flag in found]


def _equal(a: Tensor, b: Tensor) -> Tensor | bool:
    if a.device.type == "cpu":
        return torch.equal(a, b)
    if all(raw.numel() % 8 == raw.storage_offset() % 8 == 0 for raw in (a, b)):  # a comparison writes a byte an element
        a, b = a.view(torch.int64), b.view(torch.int64)
    return (a == b).all()


def same(first: Tensor, second: object) -> bool:
    """Bit for bit equal tensors of one shape and dtype, wherever they live."""
    if not isinstance(second, Tensor) or second.shape != first.shape or second.dtype != first.dtype:
        return False
    if first.device != second.device:
        first, second = first.cpu(), second.cpu()
    return torch.equal(bits(first), bits(second))
