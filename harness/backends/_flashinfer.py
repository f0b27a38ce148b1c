"""What the FlashInfer backends share: activations by the library's names, and a rank's place among equal shards."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.backends.base import YES, Device, Support
from harness.case import Case, Limit
from harness.entry import needs, resolve
from harness.inputs import Inputs

ACTIVATION_TYPE = "flashinfer.fused_moe.ActivationType"
MEMBERS = {
    "swiglu": "Swiglu",
    "swiglu_oai": "Swiglu",  # with alpha, beta and limit
    "swiglu_step": "SwigluStep",
    "geglu": "Geglu",
    "geglu_tanh": "GegluTanh",
    "situ": "Situ",
    "silu": "Silu",
    "gelu": "Gelu",
    "relu": "Relu",
    "relu2": "Relu2",
    "identity": "Identity",
}


def activation_type(case: Case, device: str) -> Any:
    """The member of the library's enum, by name: its numbers move from release to release."""
    return getattr(resolve(ACTIVATION_TYPE, device), MEMBERS[case.activation])


def known(function: Callable[..., Any], **options: object) -> dict[str, object]:
    """Those options that the installed release has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


def accepting(entry: str, parameter: str, *entries: str) -> Callable[[Device], Support]:
    """A probe: are the functions there, and has `entry`, one of them, a parameter of that name?"""

    def probe(device: Device) -> Support:
        support = needs(*entries)(device)
        if not support.ok or known(resolve(entry, device.kind), **{parameter: None}):
            return support
        return Support.no("library", f"{entry} of the installed release has no {parameter}")

    return probe


def built(module: str, *entries: str) -> Callable[[Device], Support]:
    """A probe: are the functions there, and is the module that they load compiled? `{arch}` in its name stands for "90". The
    first call would compile it otherwise, fused_moe_90 from 242 CUDA files for hours, which a verdict would call a hang."""

    def probe(device: Device) -> Support:
        if not (support := needs(*entries)(device)).ok:
            return support
        env = importlib.import_module("flashinfer.jit.env")
        name = module.format(arch=device.arch.removeprefix("sm"))
        folders = (*getattr(env, "FLASHINFER_AOT_DIRS", (env.FLASHINFER_AOT_DIR,)), env.FLASHINFER_JIT_DIR)
        if any(path for folder in folders for path in (Path(folder) / name).glob("*.so")):
            return YES
        return Support.no(
            "library", f"{name} is not compiled: flashinfer install-jit-cache-wheel, or one call outside of moecheck"
        )

    return probe


def whole(hidden: int, inter: int, why: str) -> Limit:
    """hidden and inter must be multiples of these; `why` names the check."""

    def refuses(case: Case) -> str | None:
        for name, size, unit in (("hidden", case.shape.hidden, hidden), ("inter", case.shape.inter, inter)):
            if size % unit:
                return f"{name} {size} is not a multiple of {unit}: {why}"
        return None

    return Limit(("hidden", "inter"), refuses)


@dataclass(frozen=True)
class Placement:
    """A rank in a layer that is cut into `size` shards of equal length: it is number `rank`, and every expert's id is
    `shift` more than in the case."""

    size: int
    rank: int
    shift: int

    @classmethod
    def of(cls, inputs: Inputs) -> Placement:
        """Where `inputs.local` lies. A range that is no shard is one of a wider layer, whose other experts no token names:
        one expert after 4 others at length 3 is number 2 of ids that begin at 2."""
        mine, start = len(inputs.local), inputs.local.start
        rank = -(-start // mine)
        shift = rank * mine - start
        return cls(-(-(inputs.case.shape.experts + shift) // mine), rank, shift)
