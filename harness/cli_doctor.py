"""moecheck doctor: what this machine has."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.markup import escape
from rich.table import Column, Table

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
    OUT.print(_backend_table(found, tuple(plugin or ())))


def _backend_table(found: dict[str, Backend], plugins: tuple[str, ...]) -> Table:
    table = Table(Column("backend", no_wrap=True), "here", "recipes", "what it is / why not", header_style="bold")
    with tempfile.TemporaryDirectory(prefix="moecheck-") as logs, Supervisor(detect(), plugins, Path(logs), 120.0) as worker:
        for name, backend in sorted(found.items()):
            support, _ = worker.probe(name)
            if support.ok and backend.archs and detect().arch not in backend.archs:
                support = type(support).no("arch", f"needs {' or '.join(backend.archs)}")
            here = "[green]yes[/green]" if support.ok else "[yellow]no[/yellow]"
            table.add_row(name, here, ", ".join(backend.recipes), escape(backend.summary if support.ok else support.reason))
    return table
