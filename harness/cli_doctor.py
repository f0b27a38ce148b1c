"""moecheck doctor: what this machine has."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.markup import escape

from harness import __version__, config
from harness.backends import discover
from harness.backends.base import Backend
from harness.cli_options import OUT, Plugins
from harness.device import detect, driver_version, gpus, version
from harness.worker.supervisor import Supervisor


def command(plugin: Plugins = None) -> None:
    """What is here: GPU, driver, library versions, and which backends can run."""
    found = discover(plugin or ())
    device = detect()
    OUT.print(f"moecheck {__version__}, python {sys.version.split()[0]}")
    OUT.print("GPU: " + ("; ".join(f"{g.name} ({g.arch})" for g in gpus()) or "none (NVML finds no driver or no device)"))
    OUT.print(f"driver {driver_version() or '-'}, platform {device.arch}")
    known = config.names("platforms")
    if device.arch not in known:
        OUT.print(f"[yellow]no configs/platforms/{device.arch}.yaml; there are: {', '.join(known)}[/yellow]")
    libraries = sorted({b.library for b in found.values()} | {"torch", "triton", "flashinfer-python", "vllm"})
    OUT.print(", ".join(f"{name} {version(name) or '-'}" for name in libraries))
    _tell_backends(found, tuple(plugin or ()))


def _tell_backends(found: dict[str, Backend], plugins: tuple[str, ...]) -> None:
    """Two lines each: a reason is too long for a column of a table, and in a log there is no wider terminal."""
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(detect(), plugins, Path(logs), 120.0) as worker:
        for name, backend in sorted(found.items()):
            support, _ = worker.probe(name)
            if support.ok and backend.archs and detect().arch not in backend.archs:
                support = type(support).no("arch", f"needs {' or '.join(backend.archs)}")
            here = "[green]yes[/green]" if support.ok else "[yellow]no[/yellow] "
            OUT.print(f"{here} [bold]{escape(name)}[/bold]: {escape(', '.join(backend.recipes))}")
            OUT.print(f"    {backend.summary if support.ok else support.reason}", markup=False)
