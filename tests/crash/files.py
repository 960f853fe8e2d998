"""Points at file calls, in the service and in its process that reads records."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from consumer.pipeline import reader, snapshot
from tests.crash import points

_begin = reader.begin


def watch_files() -> None:
    """Make every rename, link and sync of the service a point."""
    for name in ("rename", "replace", "link", "fsync"):
        setattr(os, name, _watched(name, getattr(os, name)))
    setattr(snapshot, "sync_file_system", _watched("syncfs", snapshot.sync_file_system))  # noqa: B010 - for mypy


def watch_reader() -> None:
    """Let the reading process begin with points of its own."""
    setattr(reader, "begin", begin)  # noqa: B010 - for mypy


def begin(settings: reader.ReaderSettings, parent: int) -> None:
    """Begin as the reading process does."""
    points.in_reader(parent)
    watch_files()
    _begin(settings, parent)


def _watched(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*arguments: Any, **keywords: Any) -> Any:
        name = points.caller(sys._getframe(1))  # noqa: SLF001 - the caller is what the point is named by
        if name is None:
            return function(*arguments, **keywords)
        if kind != "fsync":  # a kill loses nothing that was written, so before it is like after it
            points.reach(f"{kind}:{name}:before")
        result = function(*arguments, **keywords)
        points.reach(f"{kind}:{name}:after")
        return result

    return watched
