"""`moecheck overlay PACKAGE==VERSION`: an overlay to put in front of PYTHONPATH, to try by hand what a bisect tried."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from harness.cli_options import Allow, Index, Wheelhouse
from harness.errors import MoecheckError
from harness.versions.env import Source, cache_folder, make
from harness.versions.uv import PYPI

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def command(
    requirements: Annotated[list[str], typer.Argument(metavar="PACKAGE==VERSION...", help="The releases you want.")],
    wheelhouse: Wheelhouse = None,
    index: Index = PYPI,
    allow: Allow = None,
) -> None:
    """Make the overlay of these releases and print its folders: PYTHONPATH=$(moecheck overlay X==1) moecheck repro ..."""
    pins = {name: version for name, _, version in (requirement.partition("==") for requirement in requirements)}
    if not all(pins.values()):
        raise MoecheckError(f"given {' '.join(requirements)!r}; wanted PACKAGE==VERSION, e.g. flashinfer-python==0.6.5")
    source = Source(index, None if wheelhouse is None else wheelhouse.absolute(), tuple(allow or ()))
    overlay = make(pins, source, cache_folder())
    moved = ", ".join(f"{name} {version}" for name, version in overlay.packages.items())
    err.print(f"moecheck: {moved or 'nothing differs from what is installed'}", markup=False)
    out.print(os.pathsep.join(map(str, overlay.folders)), markup=False)
