"""The argument guard: what a kernel is handed, looked at before every launch. A violation is the verdict CONTRACT, and the
kernel is not run: a wrong pointer is named instead of read out of a coredump, if it crashes at all (vllm#38169).

Device, natural alignment and aliasing are asked of every buffer. What an entry point wants beyond that its backend declares:
on its `Launch` for the buffers, as an `Entry` for arguments that are made on the way. Only metadata is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.verdict import Finding

if TYPE_CHECKING:
    from harness.backends.base import Launch

OUT = "out"  # the buffer of this name is written, every other one is read


@dataclass(frozen=True)
class Argument:
    """What an entry point wants of one tensor.

    dtype: one or several, None for any; shape: sizes, or names that must mean one size throughout the call; device: kind, ""
    for the kernel's; contiguous: dense in row order; align, stride_align: bytes that its start, and every stride except that
    of neighbours, must be a multiple of; written: it may overlap no other argument, nor itself.
    """

    name: str
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None
    shape: tuple[int | str, ...] | None = None
    device: str = ""
    contiguous: bool = False
    align: int = 1
    stride_align: int = 1
    written: bool = False


class Violation(ValueError):
    """Arguments that break the contract of the call, one finding each; raised instead of the call."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(f.text for f in self.findings))


@dataclass(frozen=True)
class Entry:
    """A library function with its contract, which names its arguments in their order; called like the function."""

    function: Callable[..., Any]
    contract: tuple[Argument, ...]

    def __call__(self, *args: object, **named: object) -> Any:
        """The function's result; Violation if a tensor breaks the contract."""
        given = {**{a.name: value for a, value in zip(self.contract, args, strict=False)}, **named}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if tensors:
            refuse(tensors, self.contract, next(iter(tensors.values())).device.type)
        return self.function(*args, **named)


def armed(launch: Launch, device: str) -> Launch:
    """The same launch on a device of this kind, its arguments checked now and before each of its calls."""

    def check(**more: Tensor) -> None:
        refuse({**launch.buffers, **more}, launch.contract, device)

    def before(call: Callable[[], Any]) -> Callable[[], Any]:
        def checked() -> Any:
            check()
            return call()

        return checked

    def into(buffer: Tensor) -> object:
        check(**{OUT: buffer})
        assert launch.out is not None
        return launch.out(buffer)

    check()
    return replace(
        launch,
        call=before(launch.call),
        out=None if launch.out is None else into,
        capture=None if launch.capture is None else before(launch.capture),
        tactics={name: before(call) for name, call in launch.tactics.items()},
    )


def refuse(arguments: Mapping[str, Tensor], contract: Iterable[Argument], device: str) -> None:
    """Violation if `violations` finds any."""
    if found := violations(arguments, contract, device):
        raise Violation(found)


def violations(arguments: Mapping[str, Tensor], contract: Iterable[Argument], device: str) -> list[Finding]:
    """What is wrong with the arguments of a kernel that runs on a device of this kind; one finding for each argument."""
    wanted = {a.name: a for a in contract}
    found = [
        _finding(n, "missing", "nothing", "a tensor", f"{n} is not among the arguments") for n in _missing(wanted, arguments)
    ]
    sizes: dict[str, int] = {}
    home: torch.device | None = None
    written = set()
    for name, tensor in arguments.items():
        argument = wanted.get(name) or Argument(name, written=name == OUT)
        if not isinstance(tensor, Tensor):
            given = type(tensor).__name__
            found.append(_finding(name, "type", given, "a tensor", f"{name} is {given}, wanted a tensor"))
            continue
        if finding := _misplaced(argument, tensor, device, home) or _malformed(argument, tensor, sizes):
            found.append(finding)
            continue
        home = home or (None if argument.device else tensor.device)
        written |= {name} if argument.written else set()
    return found or _overlaps(arguments, written)


def _missing(wanted: Mapping[str, Argument], arguments: Mapping[str, Tensor]) -> list[str]:
    """Only a call with a caller's buffer is handed what is written."""
    return [name for name, argument in wanted.items() if name not in arguments and not argument.written]


def _finding(name: str, about: str, given: object, wanted: object, text: str) -> Finding:
    evidence = {"argument": name, "property": about, "given": str(given), "wanted": str(wanted)}
    return Finding("argument", text, evidence)


def _misplaced(argument: Argument, tensor: Tensor, device: str, home: torch.device | None) -> Finding | None:
    at = tensor.device
    if at == home and not argument.device:
        return None
    wanted = argument.device or device
    if at.type == wanted and (argument.device or home is None or at == home):
        return None
    does = "write" if argument.written else "read"
    how = f"{does} through a host address" if at.type == "cpu" else f"{does} memory of another device"
    runs = f"it belongs on {wanted}" if argument.device else f"the kernel runs on {home or wanted}"
    return _finding(argument.name, "device", at, home or wanted, f"{argument.name} is on {at}, {runs}: it would {how}")


def _malformed(argument: Argument, tensor: Tensor, sizes: dict[str, int]) -> Finding | None:
    """The first thing wrong with the tensor itself; `sizes` learns what the shape's names mean."""
    name = argument.name
    if argument.dtype is not None and tensor.dtype is not argument.dtype:
        dtypes = argument.dtype if isinstance(argument.dtype, tuple) else (argument.dtype,)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(d) for d in dtypes)
            return _finding(name, "dtype", tensor.dtype, wanted, f"{name} is {tensor.dtype}, wanted {wanted}")
    given = tensor.shape
    if argument.shape is not None and given != argument.shape and not _fits(given, argument.shape, sizes):
        shape = ", ".join(str(s) if isinstance(s, int) else f"{s} {sizes.get(s, '')}".rstrip() for s in argument.shape)
        return _finding(name, "shape", tuple(given), f"({shape})", f"{name} has shape {tuple(given)}, wanted ({shape})")
    return None if tensor.numel() == 0 else _laid_out(argument, tensor)


def _fits(given: torch.Size, wanted: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    if len(given) != len(wanted):
        return False
    learnt = dict(sizes)
    if any(s != (learnt.setdefault(w, s) if isinstance(w, str) else w) for s, w in zip(given, wanted, strict=True)):
        return False
    sizes.update(learnt)
    return True


def _laid_out(argument: Argument, tensor: Tensor) -> Finding | None:
    """Strides and alignment of a tensor that is not empty. The strides of axes of size 1 are never used."""
    name, size = argument.name, tensor.element_size()
    if argument.contiguous and not tensor.is_contiguous():
        text = f"{name} is not contiguous: strides {tensor.stride()} of shape {tuple(tensor.shape)}"
        return _finding(name, "strides", tensor.stride(), "contiguous", text)
    if argument.stride_align > 1:
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        rows = [stride * size for stride, length in pairs if length > 1 and stride != 1]
        if any(row % argument.stride_align for row in rows):
            text = f"{name} has strides of {rows} bytes, wanted multiples of {argument.stride_align}"
            return _finding(name, "strides", rows, argument.stride_align, text)
    align = max(argument.align, size if size in (1, 2, 4, 8) else 1)
    if beyond := tensor.data_ptr() % align:
        text = f"{name} is not aligned: it starts {beyond} bytes after a multiple of {align}"
        return _finding(name, "alignment", beyond, align, text)
    return None


def _overlaps(arguments: Mapping[str, Tensor], written: set[str]) -> list[Finding]:
    """Written arguments whose range of bytes meets another's. Two that interleave without meeting are not told apart."""
    found = []
    for name in sorted(written):
        begin, end = _span(arguments[name])
        if end - begin < arguments[name].numel() * arguments[name].element_size():
            found.append(_finding(name, "aliasing", name, "bytes of its own", f"{name} overlaps itself: expanded strides"))
        for other, tensor in arguments.items():
            first, last = _span(tensor)
            shared = min(end, last) - max(begin, first)
            if other != name and shared > 0:
                text = f"{name} overlaps {other} by {shared} bytes: it would overwrite what it reads"
                found.append(_finding(name, "aliasing", other, "bytes of its own", text))
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    """The range of addresses [first, last) that the elements lie in; empty for an empty tensor."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum(stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()
