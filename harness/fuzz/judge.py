"""Judges a reader on one malformed input: it reads it or refuses it, clearly, and does nothing else."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from harness import cli
from harness.errors import MoecheckError
from harness.fuzz.mutate import MARKER
from harness.fuzz.targets import Attempt
from harness.fuzz.watch import Violation, watched

MAX_MESSAGE = 3000  # characters that a person will look at


def complaint(attempt: Attempt, folder: Path, commands: bool = True) -> tuple[bool, str]:
    """(was it refused, what is wrong with that, "" for nothing). `commands`: a refusal is asked of the command line too."""
    refused, problem = True, ""
    try:
        with watched(folder):
            attempt.read()
        refused = False
    except MoecheckError as error:
        problem = _unclear(str(error), attempt)
    except (Exception, Violation, RecursionError) as error:
        problem = f"{type(error).__name__}: {error!s:.500}"
    if not problem and any(folder.parent.rglob(MARKER)):
        problem = "a payload was executed"
    if not problem and refused and commands and attempt.argv:
        problem = _command(attempt, folder)
    return refused, problem


def _unclear(message: str, attempt: Attempt) -> str:
    if attempt.names not in message:
        return f"the message does not name {attempt.names}: {message:.300}"
    if attempt.lined and not re.search(r"\.(yaml|jsonl):[1-9]\d*: ", message):
        return f"the message names no line: {message:.300}"
    if len(message) > MAX_MESSAGE:
        return f"a message of {len(message)} characters: {message:.100}"
    return ""


def _command(attempt: Attempt, folder: Path) -> str:
    """What is wrong with how `moecheck` itself refuses: exit code 3 and one message, on a terminal that speaks UTF-8."""
    streams = sys.argv, sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code: object = None
    try:
        sys.argv, sys.stdout, sys.stderr = ["moecheck", *attempt.argv], out, err
        with watched(folder):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    except (Exception, Violation) as error:
        return f"moecheck {attempt.argv[0]}: {type(error).__name__}: {error!s:.500}"
    finally:
        sys.argv, sys.stdout, sys.stderr = streams
    err.flush()
    text = err.buffer.getvalue().decode()
    if code != cli.USER_ERROR or not text.startswith("moecheck: ") or "Traceback" in text:
        return f"moecheck {attempt.argv[0]}: exit code {code}: {text:.500}"
    return ""
