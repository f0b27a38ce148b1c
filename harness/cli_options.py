"""What several commands share: options, and where they speak. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

OUT = Console(soft_wrap=True, highlight=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def absolute(paths: list[str] | None) -> list[str]:
    """Plans and rerun lines must work from any folder."""
    return [str(Path(path).absolute()) if path.endswith(".py") or "/" in path else path for path in paths or ()]


Platform = Annotated[str | None, typer.Option(help="Platform file under configs/platforms; default: this machine's.")]
TierName = Annotated[str | None, typer.Option("--tier", help="Tier file under configs/tiers.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", "-b", help="Backend to judge; repeatable.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Operation to judge; repeatable.")]
Cases = Annotated[list[str] | None, typer.Option("--case", "-c", help="Case id, or a pattern with *; repeatable.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", callback=absolute, help="Python file or module that defines BACKENDS or FAULTS; repeatable."),
]


def executor(name: str | None) -> str | None:
    """local, which is the default, or ray."""
    if name not in (None, "local", "ray"):
        raise typer.BadParameter(f"{name!r}: there is no such executor; wanted local or ray")
    return name


Executor = Annotated[str | None, typer.Option(callback=executor, help="local, or ray: the devices of a Ray cluster.")]
Wheelhouse = Annotated[Path | None, typer.Option(help="Folder of wheels: nothing is fetched from an index.")]
Index = Annotated[str, typer.Option(help="Package index.", envvar="UV_DEFAULT_INDEX")]
Allow = Annotated[list[str] | None, typer.Option(help="torch or triton: an overlay may replace it; repeatable.")]


def note(text: str) -> None:
    """A remark, on stderr."""
    ERR.print(f"moecheck: {text}", style="yellow", markup=False)
