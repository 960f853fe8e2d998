"""Logs: one event name for each fact, session and event in the context, as JSON or for a terminal."""

import logging
import sys
from pathlib import Path
from typing import Any, TextIO

import structlog

get_logger = structlog.get_logger


def configure_logging(*, level: str, style: str, folder: Path | None = None, quiet: bool = False) -> None:
    """Send structured logs to standard error and, if a folder is given, to ``nexus-export.log`` in it.

    ``style`` is ``json``, ``console`` or ``auto`` (console at a terminal). Our own events are written straight
    away; only what libraries log goes through the slower standard handlers. ``quiet``: a command that tells
    failures itself, so libraries say nothing.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    streams: list[TextIO] = [sys.stderr]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        streams.append((folder / "nexus-export.log").open("a", encoding="utf-8", buffering=1))
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(stream) for stream in streams]
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for noisy in ("aiormq", "aio_pika", "httpx", "alembic", "asyncio"):
        lowest = logging.CRITICAL if quiet else logging.WARNING
        logging.getLogger(noisy).setLevel(max(lowest, logging.getLevelName(level)))
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Lines(streams),
        cache_logger_on_first_use=True,
    )


class _Lines:
    """Writes each rendered event as one line to every stream."""

    def __init__(self, streams: list[TextIO]) -> None:
        self._streams = streams

    def msg(self, line: str) -> None:
        for stream in self._streams:
            stream.write(line + "\n")
            stream.flush()

    log = debug = info = warning = error = critical = exception = msg
