"""Points: each passing of a door has a name, ``write:Engine._claim:before-commit:2``, and one may be the last.

The environment says what happens: ``CRASH_TRACE`` names a file that all points are noted in, ``CRASH_POINT`` the
point to die at, and ``CRASH_REACHED`` the file that says so before.
"""

import os
import signal
import threading
from collections import Counter
from types import FrameType

TRACE, POINT, REACHED = "CRASH_TRACE", "CRASH_POINT", "CRASH_REACHED"

#: How often these are passed is a matter of time, so only the first is a point.
_ONCE = "Housekeeping._heartbeat"

_lock = threading.Lock()
_counts: Counter[str] = Counter()
_service = os.getpid()
_prefix = ""


def in_service() -> None:
    """Say that this is the service, forked or not."""
    global _service  # noqa: PLW0603
    _service = os.getpid()


def in_reader(service: int) -> None:
    """Say that this is the process that reads records; a crash here takes the whole service."""
    global _service, _prefix
    _service, _prefix = service, "reader:"


def reach(name: str) -> None:
    """Pass a point: note it, and die if it is the one."""
    with _lock:
        _counts[name] += 1
        if _ONCE in name and _counts[name] > 1:
            return
        point = f"{_prefix}{name}:{_counts[name]}"
        _append(TRACE, point)
        if point == os.environ.get(POINT):
            _append(REACHED, point)
            os.kill(_service, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def caller(frame: FrameType) -> str | None:
    """Name the function of the service that called; None for everybody else's."""
    if not str(frame.f_globals.get("__name__", "")).startswith("consumer."):
        return None
    return frame.f_code.co_qualname


def _append(variable: str, line: str) -> None:
    path = os.environ.get(variable)
    if path:
        with open(path, "ab", buffering=0) as file:  # noqa: PTH123 - one write call, which no kill can cut
            file.write(line.encode() + b"\n")
