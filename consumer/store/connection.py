"""The connection to SQLite or PostgreSQL, and what each needs to be safe.

SQLite: WAL, ``BEGIN IMMEDIATE``, synchronous FULL, one writing connection, one engine process (a lock file).
PostgreSQL: the database's clock decides what is due, so that consumers need no common one.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from consumer.errors import ConfigurationError, NexusExportError

BUSY_SECONDS = 60
#: PostgreSQL ends a transaction whose process says nothing for so long; ours last milliseconds.
IDLE_MILLISECONDS = "10000"
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    f"busy_timeout={BUSY_SECONDS * 1000}",
    "cache_size=-8192",  # 8 MiB for each connection; with 64 the memory grew for an hour
    "wal_autocheckpoint=8000",  # 32 MiB; the default copies pages back every few commits
)

#: What the pipeline hands from one store function to the next: an open transaction.
Connection = AsyncConnection
_NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "fuse.sshfs",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "afs",
    "9p",
}

#: Failures of the database itself: the work goes back and is tried again when the database answers.
DatabaseError = (SQLAlchemyError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)


class DatabaseLockedError(NexusExportError):
    """Another engine already works on this SQLite file."""


class Database:
    """One database; ``write`` and ``read`` give connections, ``now`` the clock that rules due times."""

    def __init__(self, url: str) -> None:
        try:
            self.url = make_url(url)
        except ArgumentError:
            message = "NX_DATABASE_URL is not a database address (sqlite:///file.db or postgresql://user@host/name)"
            raise ConfigurationError(message) from None
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if not self.is_sqlite and self.url.drivername != "postgresql+asyncpg":
            message = f"NX_DATABASE_URL: {self.url.drivername} is not supported; use sqlite or postgresql"
            raise ConfigurationError(message)
        self._lock_file: int | None = None
        self._writing = asyncio.Lock()
        self._clock_offset = timedelta(0)
        if self.is_sqlite:
            _refuse_network_folder(self.path)
            self._writer = _sqlite_engine(self.path, pool_size=1, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(self.path, pool_size=4, begin="BEGIN")
        else:
            options: dict[str, Any] = {
                "pool_size": 8, "max_overflow": 8, "pool_pre_ping": True, "pool_timeout": 30,
                # a consumer that is stopped inside a transaction must not hold its rows against the others
                "connect_args": {"server_settings": {"idle_in_transaction_session_timeout": IDLE_MILLISECONDS}},
            }  # fmt: skip
            self._writer = self._reader = create_async_engine(self.url, **options)

    @property
    def path(self) -> Path:
        """Return the SQLite file."""
        return Path(self.url.database or "nexus-export.db").absolute()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection and give the lock back."""
        await self._writer.dispose()
        await self._reader.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def lock_for_engine(self) -> None:
        """Make this process the only engine on a SQLite file; PostgreSQL needs no such lock.

        Raises ``DatabaseLockedError`` that names the other process.
        """
        if not self.is_sqlite:
            return
        lock = Path(f"{self.path}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = (
                f"another engine (process {holder}) works on {self.path}; SQLite takes one. "
                "Stop it, or use PostgreSQL (NX_DATABASE_URL) for several consumers"
            )
            raise DatabaseLockedError(message) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock_file = descriptor

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that commits at the end; on SQLite they run one after the other."""
        if not self.is_sqlite:
            async with self._writer.begin() as connection:
                yield connection
            return
        async with self._writing, self._writer.begin() as connection:
            yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that sees one state of the database and changes nothing."""
        async with self._reader.connect() as connection:
            yield connection

    async def now(self, connection: AsyncConnection) -> datetime:
        """Return the time that due times and leases are measured by."""
        local = datetime.now(UTC)
        if self.is_sqlite:
            return local
        value: datetime = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        self._clock_offset = value.astimezone(UTC) - local
        return value.astimezone(UTC)

    def clock(self) -> datetime:
        """Return the database's time without asking it: this machine's time and the offset last seen."""
        return datetime.now(UTC) + self._clock_offset


def is_data_error(error: BaseException) -> bool:
    """Tell a statement that the data broke from a database that is away, busy or not up to date.

    PostgreSQL says it by the class of its SQLSTATE: 22 data exception, 23 integrity constraint.
    """
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    state = str(getattr(error.orig, "sqlstate", "") or "")
    return state[:2] in {"22", "23"} or isinstance(error, DataError | IntegrityError)


def _sqlite_engine(path: Path, *, pool_size: int, begin: str) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=BUSY_SECONDS * 2,
        connect_args={"timeout": BUSY_SECONDS, "isolation_level": None},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _refuse_network_folder(path: Path) -> None:
    """WAL needs memory shared by all processes, which network file systems do not give."""
    kind = file_system_of(path)
    if kind in _NETWORK_FILE_SYSTEMS:
        message = (
            f"{path} lies on {kind}: SQLite would lose data there. "
            "Set NX_DATABASE_URL to a file on a local disk, or to PostgreSQL"
        )
        raise ConfigurationError(message)


def file_system_of(path: Path) -> str:
    """Return the type of the file system that a path lies (or would lie) on, as /proc/mounts names it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    best, kind = "", "unknown"
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _device, mount, name, *_rest = line.split(" ")
        folder = mount.replace("\\040", " ").rstrip("/")
        if (str(path).startswith(folder + "/") or folder == "") and len(folder) >= len(best):
            best, kind = folder, name
    return kind
