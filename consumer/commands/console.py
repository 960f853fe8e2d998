"""What commands share: tables for people, JSON for programs, one sentence for a failure."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: wide where nobody looks at it, so that names stay whole for grep
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under headings; values are shown as text, never as markup."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(plain(value) for value in row))
    out.print(shown)


def plain(value: Any) -> str:
    """Return a value as text that can do nothing to a terminal."""
    text = "" if value is None else str(value)
    return escape(
        "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
    )


def print_json(value: Any) -> None:
    """Print a value as one JSON document."""
    sys.stdout.write(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def say(text: str, style: str | None = None) -> None:
    """Print one line."""
    out.print(plain(text), style=style)


def complain(text: str) -> None:
    """Print one line to standard error."""
    err.print(plain(text), style="red")


def ago(moment: datetime | None) -> str:
    """Return how long ago a moment was, in words of one unit."""
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    ahead = seconds < 0
    seconds = abs(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{'in ' if ahead else ''}{seconds / size:.0f} {unit}{'' if ahead else ' ago'}"
    return f"in {seconds:.0f} s" if ahead else f"{seconds:.0f} s ago"
