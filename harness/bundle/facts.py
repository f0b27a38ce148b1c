"""environment.json: what a failure may depend on outside its inputs. An allow-list: nothing else leaves the machine."""

from __future__ import annotations

import os
import platform as host
import re
from collections.abc import Mapping
from importlib import metadata

import torch

from harness.backends.base import Backend, Device
from harness.device import driver_version, version

PREFIXES = ("CUDA_", "TORCH", "TRITON_", "FLASHINFER_", "VLLM_")
NAMES = ("OMP_NUM_THREADS",)
# words of the names of secrets (VLLM_API_KEY); VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE is none
SECRET = {"KEY", "KEYS", "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "AUTH", "CREDENTIAL", "CREDENTIALS"}
CREDENTIALS_IN_URL = re.compile(r"://[^/\s@]*@")
WHEELS = re.compile(r"(torch|triton|flashinfer|vllm|nvidia|onnx|numpy|cuda|ml[-_]dtypes)", re.IGNORECASE)


def environment(backend: Backend, device: Device) -> dict[str, dict[str, str]]:
    """Group -> fact -> value: machine (driver, CUDA, device), wheels, variables."""
    machine = {
        "python": host.python_version(),
        "system": host.platform(),
        "device": device.name or host.machine(),
        "arch": device.arch,
        "driver": driver_version(),
        "cuda": str(torch.version.cuda or ""),
    }
    return {"machine": machine, "wheels": _wheels(backend.library), "variables": variables(os.environ)}


def variables(given: Mapping[str, str]) -> dict[str, str]:
    """The variables that kernels and their libraries read, without any that may be secret."""
    relevant = {name: value for name, value in given.items() if name.startswith(PREFIXES) or name in NAMES}
    return {n: v for n, v in sorted(relevant.items()) if not SECRET & set(n.split("_")) and not CREDENTIALS_IN_URL.search(v)}


def _wheels(library: str) -> dict[str, str]:
    names = {str(d.metadata["Name"]) for d in metadata.distributions() if WHEELS.match(str(d.metadata["Name"] or ""))}
    return {name: version(name) for name in sorted({*names, library}) if version(name)}
