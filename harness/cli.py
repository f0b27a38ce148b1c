"""The command line: which function is which command, and the exit codes. A command's module is imported when it is asked for:
most want torch, whose import takes longer than all that some of them do.

Exit codes: 0 clean, 1 a kernel failed, 2 incomplete (resume), 3 our or the user's fault.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from harness.cli_options import ERR
from harness.errors import Incomplete, MoecheckError, WorkerBug

CLEAN, KERNEL_FAILED, INCOMPLETE, USER_ERROR = 0, 1, 2, 3
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
COMMANDS = {  # command -> module and function, or the app of a group, in the order of --help
    "run": "cli_run:run",
    "plan": "cli_plan:command",
    "list": "cli_list:command",
    "doctor": "cli_doctor:command",
    "repro": "cli_repro:repro",
    "shrink": "cli_shrink:shrink",
    "load": "cli_bundle:load",
    "import-dump": "cli_dump:import_dump",
    "merge": "cli_shards:merge_",
    "report": "cli_report:command",
    "diff": "cli_diff:command",
    "history": "cli_history:command",
    "coverage": "cli_coverage:command",
    "known": "cli_known:command",
    "faults": "cli_faults:faults",
    "audit": "cli_audit:command",
    "parallel": "cli_parallel:command",
    "latency": "cli_latency:app",
    "warm": "cli_warm:command",
    "contracts": "cli_versions:app",
    "preflight": "cli_preflight:command",
    "overlay": "cli_overlay:command",
    "bisect": "cli_bisect:command",
    "attribute": "cli_attribute:command",
    "matrix-versions": "cli_matrix_versions:command",
    "pipeline": "cli_pipeline:app",
}

# typer ships its own click from 0.26 on and used the real one before: its usage errors are found by their base class.
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Lazy(TyperGroup):
    """The group of all commands, each made when it is named; `--help` makes them all."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        found = getattr(import_module(f"harness.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False)
            found.command(cmd_name)(function)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(cls=Lazy, add_completion=False)


@app.callback()
def _all() -> None:
    """Checks MoE kernels against a pure-PyTorch reference."""


def _reader_gone(self: Console) -> None:
    """`| head` has read enough: the rest goes nowhere, and the exit code stays the command's. rich would exit 1 here, which
    says that a kernel failed, in the middle of a run."""
    self.quiet = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self.file.fileno())
    os.close(nowhere)


def main() -> NoReturn:
    """Console entry point: every fault of the user is one message and exit code 3."""
    code = CLEAN
    Console.on_broken_pipe = _reader_gone  # type: ignore[method-assign]  # typer's own consoles as well
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a message may quote what no encoding holds, or a terminal speak ASCII
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False) or CLEAN
    except typer.Abort:
        code = INCOMPLETE
    except ClickException as error:
        wanted = error.format_message() or "a command is wanted"  # typer has printed the help of a group that was given none
        ERR.print(f"moecheck: {wanted}", style="red", markup=False)
        code = USER_ERROR
    except (MoecheckError, WorkerBug) as error:
        ERR.print(f"moecheck: {error}", style="red", markup=False)
        code = USER_ERROR
    except Incomplete as stopped:
        ERR.print(f"moecheck: {stopped}", style="yellow", markup=False)
        code = INCOMPLETE
    except OSError as error:
        code = USER_ERROR
        what = "a file or the output" if error.filename is None else error.filename
        again = f"{what}: cannot be written: {error.strerror}; make room, and give the same command again"
        ERR.print(f"moecheck: {again}" if error.errno in NO_ROOM else traceback.format_exc(), style="red", markup=False)
    except Exception:  # Python's own exit code would be 1: a kernel failed
        ERR.print(traceback.format_exc(), style="red", markup=False)
        code = USER_ERROR
    sys.exit(code)
