"""Faults that eLabFTW's test server has in stock, and the ledger of what it was asked. For tests of plugins only."""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

#: ``error``: a status instead of the work, ``error_after``: a status after it. ``cut``: the connection is reset
#: before the work, ``cut_after``: after it, ``late``: the work is done ``seconds`` after the reset. ``stall``: no
#: answer and no work for ``seconds``, ``stall_after``: the work is done first. ``truncate``: half of the answer.
#: ``rate_limit``: 429 with ``retry_after`` in seconds, as a date if ``date`` is set.
Kind = Literal["error", "error_after", "cut", "cut_after", "late", "stall", "stall_after", "truncate", "rate_limit"]


@dataclass(slots=True)
class Fault:
    """What happens to the next requests that match; ``path`` is a regular expression for the end of the path."""

    kind: Kind
    method: str = "POST"
    path: str = ""
    skip: int = 0
    times: int = 1
    seconds: float = 0.0
    status: int = 502
    body: str = ""
    retry_after: float | None = None
    date: bool = False

    @classmethod
    def of(cls, value: dict[str, Any]) -> "Fault":
        """Read one of the control interface. Raises ``TypeError`` or ``ValueError`` for what makes no sense."""
        fault = cls(**value)
        if fault.kind not in get_args(Kind):
            raise ValueError(f"unknown kind {fault.kind!r}")
        re.compile(fault.path)
        return fault

    def matches(self, method: str, path: str) -> bool:
        """Tell whether a request is of this fault's kind."""
        return method == self.method and re.search(f"{self.path}$", path) is not None


@dataclass(slots=True)
class Faults:
    """The faults in stock, in the order in which they are tried."""

    waiting: list[Fault] = field(default_factory=list)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault of a request, and use it up."""
        for fault in self.waiting:
            if not fault.matches(method, path):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if fault.times <= 0:
                self.waiting.remove(fault)
            return fault
        return None


@dataclass(frozen=True, slots=True)
class Line:
    """One request; ``status`` is None where no answer was given, ``json`` what was sent as such."""

    number: int
    at: float
    user: int | None
    method: str
    path: str
    query: dict[str, str]
    json: Any
    status: int | None
    fault: str | None


class Ledger:
    """Every request, in memory and, line by line as JSON, in a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.lines: list[Line] = []
        self._file: TextIO | None = path.open("a", encoding="utf-8") if path else None

    def add(self, **facts: Any) -> None:
        """Note a request."""
        line = Line(number=len(self.lines) + 1, at=time.time(), **facts)
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(asdict(line)) + "\n")
            self._file.flush()

    def entries(self) -> list[dict[str, Any]]:
        """Return all lines as JSON objects."""
        return [asdict(line) for line in self.lines]
