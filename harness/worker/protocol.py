"""What supervisor and child say to each other: one JSON object a line, over a socket pair.

supervisor -> child   {"judge": case_id, "subject": name, "checks": number or null, "repeats": number, "rules": bool}
                      | {"probe": name} | {"bundle": case_id, "subject": name, "folder": path} | {"stop": true}
child -> supervisor   {"ready": true} | {"stage": name} | {"support": {...}} | {"collected": {...}}
                      | {"verdict": {...}, "prints": [...], "retire": why, if the child must be replaced}
                      | {"user_error": class, "text": ...} | {"bug": traceback}
"""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_MESSAGE = 1 << 20  # bytes: a verdict is a few KiB; more is a corrupted reply
CHUNK = 1 << 16

Message = dict[str, Any]


class CorruptedReply(EOFError):
    """Bytes that are no message."""


class Channel:
    """One end of the pair. Lines, not lengths: a length that a kernel scribbled would block its reader for good."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self._read = b""

    @property
    def pending(self) -> bool:
        """Is a whole message read already?"""
        return b"\n" in self._read

    def send(self, message: Message) -> None:
        """Write one message; OSError when the other side is gone."""
        line = json.dumps(message, allow_nan=False).encode() + b"\n"
        while line:
            line = line[os.write(self.pipe.fileno(), line) :]

    def receive(self, deadline: float | None = None) -> Message | None:
        """The next message; None when `deadline` (time.monotonic) passes; EOFError when the other side is gone."""
        while not self.pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left is not None and not wait([self.pipe], left):
                return None
            self.fill()
        return self.take()

    def fill(self) -> None:
        """Read what there is, or wait for it; EOFError when the other side is gone."""
        try:
            data = os.read(self.pipe.fileno(), CHUNK)
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("closed in the middle of a message" if self._read else "closed")
        self._read += data
        if len(self._read) > MAX_MESSAGE:
            raise CorruptedReply(f"corrupted reply: more than {MAX_MESSAGE} bytes without an end: {self._read[:40]!r}")

    def take(self) -> Message:
        """The first of the messages that were read."""
        line, self._read = self._read.split(b"\n", 1)
        return _parsed(line)


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptedReply(f"corrupted reply: {line[:40]!r}") from error
    if not isinstance(message, dict):
        raise CorruptedReply(f"corrupted reply: {line[:40]!r}")
    return message
