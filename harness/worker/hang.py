"""Where does a silent process hang? One signal, three witnesses that need ever more of it to be alive.

faulthandler's C handler prints the Python stack even while C code holds the GIL; a thread that waits for the signal's
wakeup byte needs the GIL; the Python handler needs the main thread to be between two bytecodes.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from types import FrameType

ASK = signal.SIGUSR1
GIL_FREE, IN_PYTHON = "moecheck: the GIL is free", "moecheck: the main thread runs Python"
FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)$', re.MULTILINE)
STATES = {"T": "it is stopped", "D": "it waits in the kernel for a device", "Z": "it is a zombie"}  # proc(5)


def listen() -> None:
    """In the child: be ready to be asked. Call once, when stderr is the log."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(ASK, _python)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    faulthandler.register(ASK, file=sys.stderr, all_threads=False, chain=True)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def _python(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{IN_PYTHON}\n".encode())


def _watch(descriptor: int) -> None:
    while data := os.read(descriptor, 1):
        if data[0] == ASK:
            os.write(2, f"{GIL_FREE}\n".encode())


def complete(output: str) -> bool:
    """Has every witness spoken?"""
    return IN_PYTHON in output and GIL_FREE in output and "(most recent call first)" in output


def where(output: str, letter: str) -> str:
    """What the witnesses' lines and the process's state say of a hang."""
    frame = FRAME.search(output[output.rfind("(most recent call first)") :]) if "(most recent call first)" in output else None
    if frame is None:
        return STATES.get(letter, "it does not handle a signal") + ", so where it hangs is not known"
    place = f"{frame['file'].rsplit('/', 1)[-1]}:{frame['line']} in {frame['name']}"
    if IN_PYTHON in output:
        return f"it runs Python code at {place}"
    doing = "computing" if letter == "R" else "waiting"
    gil = "the GIL released" if GIL_FREE in output else "the GIL held"
    return f"it is {doing} in C code called from {place}, {gil}"
