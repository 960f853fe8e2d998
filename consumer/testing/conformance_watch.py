"""What the kit watches while a case runs: secrets in texts and logs, and the memory that it takes."""

import logging
import traceback
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

#: The case whose task is running, so that a log line finds its case.
case_name: ContextVar[str] = ContextVar("case_name", default="")

#: Libraries whose chatter the service silences too.
_SILENCED = ("aiormq", "aio_pika", "httpx", "alembic", "asyncio")


@dataclass
class Secrets:
    """Finds secrets; ``leaks`` are the log lines that held one, by case, without the line."""

    values: frozenset[str]
    leaks: dict[str, list[str]] = field(default_factory=dict)

    def within(self, *texts: Any) -> bool:
        """Tell whether a value, an error and all that led to it included, holds a secret."""
        return any(secret in text for text in map(_as_text, texts) for secret in self.values)

    def note(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Look at one structured log line."""
        self._look(str(event.get("event")), str(dict(event)))
        return event

    def _look(self, name: str, text: str) -> None:
        if any(secret in text for secret in self.values):
            self.leaks.setdefault(case_name.get(), []).append(name)

    @contextmanager
    def watched_logs(self) -> Iterator[None]:
        """Look at every log line of the block; none of them is written anywhere."""
        handler = _Lines(self)
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            with capture_logs(processors=[self.note]):
                yield
        finally:
            root.removeHandler(handler)


class _Lines(logging.Handler):
    """Hands what libraries log on, as far as the service would write it."""

    def __init__(self, secrets: Secrets) -> None:
        super().__init__(logging.INFO)
        self._secrets = secrets

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one line."""
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] not in _SILENCED:
            self._secrets._look(record.name, self.format(record))  # noqa: SLF001 - a part of it


def _as_text(value: Any) -> str:
    if isinstance(value, BaseException):
        return "".join((repr(value), *traceback.format_exception(value)))
    return value if isinstance(value, str) else repr(value)


class Memory:
    """The process's memory at its highest in a block, in bytes above where it began; 0 where Linux's /proc is not."""

    def __init__(self) -> None:
        self._before = 0

    def begin(self) -> None:
        """Forget the highest point so far."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return
        self._before = _status("VmRSS")

    def risen(self) -> int:
        """Return how far it has risen since."""
        return max(0, _status("VmHWM") - self._before) if self._before else 0


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def lines_of(texts: Iterable[str]) -> str:
    """Join the names of log lines for a message."""
    return ", ".join(sorted(set(texts)))
