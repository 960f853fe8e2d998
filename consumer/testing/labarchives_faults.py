"""Trouble on demand and a record of every request, for tests of plugins only."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

#: Two requests leave in time and arrive a little closer together.
JITTER_SECONDS = 0.05


@dataclass
class Fault:
    """Trouble for the next ``count`` requests of a method (``*``: any).

    ``when``: ``before`` or ``after`` the request had its effect, or ``late``: ``seconds`` after the connection was
    cut. ``what``: ``cut`` the connection, ``status`` (an HTML page, ``retry_after`` as its header), ``code`` (an
    error of the API), ``stall`` for ``seconds``, ``truncate`` the XML, ``odd`` (another XML document).
    """

    method: str
    when: Literal["before", "after", "late"] = "after"
    what: Literal["cut", "status", "code", "stall", "truncate", "odd"] = "cut"
    count: int = 1
    status: int = 502
    code: int = 4999
    seconds: float = 0.0
    retry_after: str | None = None
    #: this many requests of the method pass first
    skip: int = 0


class Faults:
    """The troubles that are waiting."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Let it happen to the next requests that it is for."""
        self._waiting.append(fault)

    def clear(self) -> None:
        """Let nothing more happen."""
        self._waiting.clear()

    def take(self, method: str) -> Fault | None:
        """Return what is to happen to this request."""
        for fault in self._waiting:
            if fault.method not in {"*", method}:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                return None
            fault.count -= 1
            if fault.count <= 0:
                self._waiting.remove(fault)
            return fault
        return None


@dataclass
class Line:
    """One request as it arrived; ``at`` is monotonic, ``gap_seconds`` counts from the one before of the same key."""

    method: str
    verb: str
    at: float
    uid: str
    params: dict[str, str]
    body_bytes: int
    gap_seconds: float | None
    status: int = 0
    code: int | None = None
    effect: bool = False
    fault: dict[str, Any] | None = field(default=None)


class Ledger:
    """Every request in order, also as lines of a JSON file, and those that came too soon."""

    def __init__(self, path: Path | None, interval_seconds: float) -> None:
        self._path = path
        self._interval = interval_seconds
        self._last: dict[str, float] = {}
        self.lines: list[Line] = []

    def arrived(self, key: str, *, method: str, verb: str, uid: str, params: dict[str, str], body_bytes: int) -> Line:
        """Note a request; what signs it is left out."""
        now = time.monotonic()
        before = self._last.get(key)
        self._last[key] = now
        shown = {
            name: text for name, text in params.items() if name not in {"akid", "sig", "uid", "expires", "password"}
        }
        gap = None if before is None else now - before
        line = Line(method, verb, now, uid, shown, body_bytes, gap)
        self.lines.append(line)
        return line

    def answered(self, line: Line) -> None:
        """Write a line when all of it is known."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line)) + "\n")

    @property
    def too_soon(self) -> list[Line]:
        """Return the requests that came less than the interval after the one before."""
        return [
            line for line in self.lines
            if line.gap_seconds is not None and line.gap_seconds < self._interval - JITTER_SECONDS
        ]  # fmt: skip

    def described(self) -> dict[str, Any]:
        """Return everything for the control interface."""
        lines = [asdict(line) for line in self.lines]
        return {"requests": lines, "too_soon": [asdict(line) for line in self.too_soon]}

    def clear(self) -> None:
        """Forget all lines; the next request has none before it."""
        self.lines.clear()
        self._last.clear()
