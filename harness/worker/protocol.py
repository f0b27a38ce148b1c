"""What supervisor and child say to each other: one JSON object a message, over a pipe.

supervisor -> child   {"judge": case_id, "subject": name, "checks": number or null, "rules": bool} | {"probe": name}
                      | {"bundle": case_id, "subject": name, "folder": path} | {"stop": true}
child -> supervisor   {"ready": pid} | {"stage": name} | {"support": {...}}
                      | {"collected": {...}} | {"verdict": {...}, "retire": true if the child must be replaced}
                      | {"user_error": class, "text": ...} | {"bug": traceback}
"""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

MAX_MESSAGE = 1 << 20  # a verdict is a few KiB; more is a corrupted reply

Message = dict[str, Any]


def send(pipe: Connection, message: Message) -> None:
    """Write one message."""
    pipe.send_bytes(json.dumps(message, allow_nan=False).encode())


def receive(pipe: Connection) -> Message:
    """Read one message; EOFError when the other side is gone or did not send one."""
    try:
        message = json.loads(pipe.recv_bytes(MAX_MESSAGE))
    except (OSError, ValueError) as error:  # a dying child can leave half a message or garbage in the pipe
        raise EOFError(f"corrupted reply: {error}") from error
    if not isinstance(message, dict):
        raise EOFError(f"corrupted reply: {message!r:.80}")
    return message
