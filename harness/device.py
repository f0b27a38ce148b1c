"""What is here: GPU, driver, platform, library versions. Asks the driver through NVML and never initialises CUDA."""

from __future__ import annotations

import os
import platform as host
from functools import cache
from importlib import metadata

from harness.backends.base import CPU, Backend, Device


@cache
def gpus() -> tuple[Device, ...]:
    """The NVIDIA GPUs, by NVML; empty without a driver. CUDA_VISIBLE_DEVICES="" hides them, as it does from torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") == "":
        return ()
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        found.append(Device("cuda", f"sm{major}{minor}", str(pynvml.nvmlDeviceGetName(handle))))
    return tuple(found)


@cache
def driver_version() -> str:
    """The NVIDIA driver's version, or "" without one."""
    if not gpus():
        return ""
    import pynvml

    return str(pynvml.nvmlSystemGetDriverVersion())


def detect() -> Device:
    """The first GPU, else the CPU."""
    return gpus()[0] if gpus() else CPU


def visible() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(given.split(",")) if given else tuple(str(index) for index in range(len(gpus())))


def use(name: str) -> None:
    """Let the processes that are started from now on see this GPU only."""
    os.environ["CUDA_VISIBLE_DEVICES"] = name


def version(distribution: str) -> str:
    """Installed version of a distribution, "" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


@cache
def _machine(device: Device) -> dict[str, str]:
    import torch

    facts = {"python": host.python_version(), "torch": torch.__version__, "arch": device.arch, "device": device.name or _cpu()}
    if device.kind == "cuda":
        facts |= {"driver": driver_version(), "cuda": str(torch.version.cuda)}
    return facts


def _cpu() -> str:
    return host.processor() or host.machine()


def environment(backend: Backend, device: Device) -> dict[str, str]:
    """The facts a verdict is true for: interpreter, torch, device, and the backend's library."""
    return {**_machine(device), backend.library: version(backend.library)}
