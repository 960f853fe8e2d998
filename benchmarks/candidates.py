"""The programs that are compared: how each is started, and what has to lie ready for it."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import messages
from tools.records import Record

ROOT = Path(__file__).resolve().parent.parent
_PLUGINS = ROOT / "benchmarks" / "plugins"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One consumer program, ready to be started in its folder."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path


Prepare = Callable[[str, Path, Sequence[Record]], Candidate]


def bare(url: str, folder: Path, _records: Sequence[Record]) -> Candidate:
    """Prepare the plain aio-pika loop."""
    return _peer("benchmarks.bare", url, folder)


def faststream(url: str, folder: Path, _records: Sequence[Record]) -> Candidate:
    """Prepare the FastStream application."""
    return _peer("benchmarks.faststream_peer", url, folder)


def ours(url: str, folder: Path, records: Sequence[Record]) -> Candidate:
    """Prepare this project's consumer: record files, a database file, one destination that does nothing."""
    data = folder / "data"
    files = data / "records"
    files.mkdir(parents=True)
    for record in records:
        (files / record.name).write_bytes(record.content)
    spool = folder / "spool"
    spool.mkdir()
    settings = {
        "NX_AMQP_URL": url,
        "NX_DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'bench.db'}",
        "NX_DATA_PATH": str(data),
        "NX_RECORDS_PATH": str(files),
        "NX_SPOOL_PATH": str(spool),
        "NX_DESTINATIONS_PATH": str(_PLUGINS),
    }
    return Candidate((sys.executable, "-m", "consumer", "run"), _clean(settings), folder)


CANDIDATES: Mapping[str, Prepare] = {"ours": ours, "bare": bare, "faststream": faststream}


def _peer(module: str, url: str, folder: Path) -> Candidate:
    return Candidate((sys.executable, "-m", module), _clean({messages.URL_VARIABLE: url}), folder)


def _clean(settings: Mapping[str, str]) -> dict[str, str]:
    """Join the settings with the environment, without the settings of whoever runs the benchmark."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NX_")}
    return {**inherited, "PYTHONPATH": str(ROOT), **settings}
