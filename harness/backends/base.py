"""What a backend is: one kernel library's MoE entry point, what it can do, and how to call it.

A backend is one file that defines `BACKENDS`. It packs the logical inputs into the library's physical layout; it never
imports the reference's layer, experts or routing: the subject must not be its own oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from harness.case import OPS, Case, Limit
from harness.errors import PluginError
from harness.guard import Argument
from reference.rounding import Rounding

if TYPE_CHECKING:
    from harness.inputs import Inputs


@dataclass(frozen=True)
class Device:
    """Where a case runs. kind: "cpu" or "cuda"; arch: "cpu", "sm90", ...; name: as the driver says."""

    kind: str
    arch: str
    name: str = ""


CPU = Device("cpu", "cpu")


@dataclass(frozen=True)
class Support:
    """An answer given in advance. kind: "ok", "library" or "arch" (UNAVAILABLE), "case" (UNSUPPORTED)."""

    ok: bool
    reason: str = ""
    kind: str = "ok"

    @classmethod
    def no(cls, kind: str, reason: str) -> Support:
        """A refusal; the reason is shown to the user."""
        return cls(False, reason, kind)


YES = Support(True)


@dataclass(frozen=True)
class Launch:
    """A prepared call. `call()` runs the kernel once and returns [tokens, hidden].

    buffers: the tensors it reads, moved between red zones and unchanged by a call. Those named x, logits, bias, ids and
    topk_weights hold the step's data: `call` reads them every time, so that another step's data can be copied into them.
    out(buffer): the same call into the caller's [tokens, hidden] buffer, where the entry point has an out argument.
    capture(): records the call and returns its replay; None means a CUDA graph on CUDA and nothing elsewhere.
    tactics: the same call under each tactic the library exposes.
    contract: what the entry point wants of its buffers beyond their device, checked before each call (harness/guard.py).
    """

    call: Callable[[], Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    out: Callable[[Tensor], object] | None = None
    capture: Callable[[], Callable[[], Tensor]] | None = None
    tactics: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    contract: tuple[Argument, ...] = ()


def always(device: Device) -> Support:
    """A probe that never refuses."""
    return YES


@dataclass(frozen=True)
class Backend:
    """A subject under test.

    op: the kind of question it answers (`harness.case.OPS`); axes that the op does not have are not looked at. What a call of
    the other ops returns is said in harness/op_answers.py.
    name: unique; library: the distribution whose version is recorded; deterministic: the same call twice gives the same
    bits (no default: say it); recipes, activations, routings, archs: what it takes, by name. routings is empty for a
    kernel that is handed top-k ids and weights. biases, weightings: of `harness.axes`, what it takes.
    rounding(case): where it rounds, None where that is not known. probe(device): can it run here at all, asked in the child.
    limits: what else it refuses, with the axes each limit looks at.
    prepare(case, inputs): pack and bind. exempt: check of harness/relations.py -> why it is not promised here.
    expert_parallel: it reads `inputs.local`, skips the slots of other ranks' experts and adds nothing for them.
    prints: regular expressions of lines that its library prints when something failed and it carries on; they become notes.
    activation_format: "standard" for tokens in their order; "batched" where it hands its kernels [experts, rows, hidden] slabs
    with the count of live rows of each expert (masked_m).
    entries: dotted names of the library functions it calls, resolved by `harness.entry.resolve`; where the library cannot run
    on a CPU and every entry has a twin in harness/twins/libs, `twinned` makes the same adapter a subject there, NAME_twin,
    which is the twin of `twin_of`.
    recorded(device): the inputs of its one case, where they are somebody's recorded tensors (harness/dump) and not drawn.
    script(case): Python text that defines `call(b)`, the same call on the `Launch.buffers` by name, with torch and the library
    only, for a maintainer who has no moecheck. It stands in the file of `prepare`: with another `prepare` it is not used.
    """

    name: str
    library: str
    deterministic: bool
    recipes: tuple[str, ...]
    activations: tuple[str, ...]
    prepare: Callable[[Case, Inputs], Launch]
    rounding: Callable[[Case], Rounding | None]
    routings: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    probe: Callable[[Device], Support] = always
    limits: tuple[Limit, ...] = ()
    summary: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)
    expert_parallel: bool = False
    prints: tuple[str, ...] = ()
    activation_format: str = "standard"
    entries: tuple[str, ...] = ()
    twinned: bool = False
    twin_of: str = ""
    recorded: Callable[[str], Inputs] | None = None
    script: Callable[[Case], str] | None = None
    op: str = "moe"
    biases: tuple[str, ...] = ("nobias",)
    weightings: tuple[str, ...] = ("onoutput",)

    def supports(self, case: Case, device: Device) -> Support:
        """Does it take this case on this device? Declarations only: no library is imported, nothing runs."""
        if self.archs and device.arch not in self.archs:
            return Support.no("arch", f"needs {' or '.join(self.archs)}; this is {device.arch}")
        if case.op != self.op:
            return Support.no("case", f"op {case.op}: takes {self.op}")
        for what, given, known in (
            ("recipe", str(case.recipe), self.recipes),
            ("activation", case.activation, self.activations),
            ("routing", case.routing, self.routings or (case.routing,)),
            ("activation_format", case.activation_format, (self.activation_format,)),
            ("bias", case.bias, self.biases),
            ("weighting", case.weighting, self.weightings),
        ):
            if what in OPS[self.op].axes and given not in known:
                return Support.no("case", f"{what.replace('_', ' ')} {given}: takes {', '.join(known)}")
        reason = next((text for limit in self.limits if (text := limit.refuses(case))), None)
        return YES if reason is None else Support.no("case", reason)


def checked_probe(backend: Backend, device: Device) -> Support:
    """The backend's probe; PluginError if it raises or answers something else than Support."""
    try:
        support = backend.probe(device)
    except Exception as error:
        raise PluginError(f"backend {backend.name}: probe() raised {type(error).__name__}: {error}") from error
    if not isinstance(support, Support) or not (support.ok or support.reason):
        raise PluginError(f"backend {backend.name}: probe() must return Support with a reason for a no, got {support!r:.120}")
    return support
