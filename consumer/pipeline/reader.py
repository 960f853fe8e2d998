"""Reads, checks and keeps records in a process of its own.

File calls and parsing would hold up the event loop, a dead network file system can be given up by ending the
process, and a record that breaks the XML parser takes nothing else with it.
"""

import asyncio
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from consumer.errors import RecordError, RecordNotThereYet, RecordRefused, RecordsRootMissing
from consumer.events import restore_built
from consumer.pipeline.snapshot import Snapshot, SnapshotReader, Spool
from consumer.telemetry import get_logger

#: A batch that takes longer hangs: its process is ended, and the records are asked for again later.
READ_SECONDS = 120.0
#: So many bytes of records are held in memory before they are written.
PORTION_BYTES = 64 * 1024**2

_PR_SET_PDEATHSIG = 1

_log = get_logger()

Kind = Literal["kept", "refused", "not_there_yet", "root_missing", "spool_failed"]


@dataclass(frozen=True, slots=True)
class ReaderSettings:
    """Where records come from, what they must satisfy, and where they are kept."""

    root: Path | None
    limit: int
    schema: Path | None
    spool: Path


@dataclass(frozen=True, slots=True)
class Read:
    """What became of one record; ``facts`` are what it says of itself."""

    kind: Kind
    code: str = ""
    message: str = ""
    sha256: str = ""
    name: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class RecordReader:
    """Hands batches to the reading process, and starts a new one when it breaks or hangs.

    Raises ``ConfigurationError`` when built with a schema that cannot be used.
    """

    def __init__(self, settings: ReaderSettings) -> None:
        self._settings = settings
        SnapshotReader(settings.root, settings.limit, settings.schema)  # a bad schema is told here, not over there
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Start the process ahead of the first record."""
        self._running_pool().submit(os.getpid)

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._end_pool()

    async def read(self, events: Sequence[str]) -> list[Read]:
        """Read the records of some events; a record that breaks the process twice is refused."""
        try:
            return await self._try_read(events)
        except BrokenProcessPool:
            _log.exception("reader_broken", records=len(events))
            self._end_pool()
        return [await self._read_alone(event) for event in events]

    async def _read_alone(self, event: str) -> Read:
        try:
            return (await self._try_read([event]))[0]
        except BrokenProcessPool:
            self._end_pool()
            return Read("refused", "record_malformed", "the record broke the process that reads it")

    async def _try_read(self, events: Sequence[str]) -> list[Read]:
        work = asyncio.get_running_loop().run_in_executor(self._running_pool(), read_batch, list(events))
        done, _ = await asyncio.wait({work}, timeout=READ_SECONDS)
        if done:
            return work.result()
        self._end_pool()
        work.add_done_callback(lambda late: late.cancelled() or late.exception())
        message = f"reading took over {READ_SECONDS:g} s; the file system hangs"
        return [Read("not_there_yet", "record_unreadable", message) for _ in events]

    def _running_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=begin, initargs=(self._settings, os.getpid())
            )
        return self._pool

    def _end_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()


# --- in the other process ----------------------------------------------------------------------------------------

_state: dict[str, Any] = {}


def begin(settings: ReaderSettings, parent: int) -> None:
    """Prepare the reading process: it ends with its parent, and leaves Ctrl-C and SIGTERM to it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _state["reader"] = SnapshotReader(settings.root, settings.limit, settings.schema)
    _state["spool"] = Spool(settings.spool)


def read_batch(events: list[str]) -> list[Read]:
    """Read, check and keep the records of some events, in portions of bounded size."""
    reader, spool = _state["reader"], _state["spool"]
    found: list[Read] = []
    portion: list[Snapshot] = []
    for event in events:
        try:
            snapshot = reader.read(restore_built(event).data)
        except RecordError as error:
            found.append(Read(_kind(error), error.code, str(error)))
            continue
        found.append(Read("kept", "", "", snapshot.sha256, snapshot.name, snapshot.facts))
        portion.append(snapshot)
        if sum(len(item.content) for item in portion) > PORTION_BYTES:
            found = _keep(spool, portion, found)
            portion = []
    return _keep(spool, portion, found)


def _keep(spool: Spool, portion: list[Snapshot], found: list[Read]) -> list[Read]:
    try:
        spool.keep(portion)
    except OSError as error:
        lost = {item.sha256 for item in portion}
        failed = Read("spool_failed", "spool_failed", f"the spool {spool.root} cannot be written: {error.strerror}")
        return [failed if item.kind == "kept" and item.sha256 in lost else item for item in found]
    return found


def _kind(error: RecordError) -> Kind:
    if isinstance(error, RecordsRootMissing):
        return "root_missing"
    if isinstance(error, RecordNotThereYet):
        return "not_there_yet"
    assert isinstance(error, RecordRefused)  # noqa: S101 - the three kinds of the error tree
    return "refused"
