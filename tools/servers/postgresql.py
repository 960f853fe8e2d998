"""A private PostgreSQL cluster that owns nothing outside its folder, for tests and measurements."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tools.servers.ports import free_port, is_free
from tools.servers.process import Child, ServerError, children, clean_environment

START_SECONDS = 30
STOP_SECONDS = 20
SUPERUSER = "postgres"  # of the database; on this machine too when we are root


class PostgresServer:
    """One PostgreSQL cluster on 127.0.0.1, where everybody is let in as `postgres` without a password.

    The data stays in the folder and serves the next start there again. PostgreSQL refuses to run as root:
    then it runs as the user `postgres`, and where that user cannot enter the folder the data lies in a
    temporary folder instead, which the end of the `with` block (or `close`) removes.
    """

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self.folder = folder.resolve()
        self._fsync = fsync
        self._child: Child | None = None
        self._programs = Path()
        self._elsewhere: Path | None = None
        self._account: pwd.struct_passwd | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def data(self) -> Path:
        """The folder of the cluster's files."""
        return (self._elsewhere or self.folder) / "data"

    @property
    def pid(self) -> int:
        """The first process of the server; ServerError when it does not run."""
        if self._child is None:
            raise ServerError("PostgreSQL is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether start() was called and neither stop() nor kill() since."""
        return self._child is not None

    def url(self, database: str = "postgres", driver: str = "postgresql+asyncpg") -> str:
        """Return the address of a database, with the driver's name as its scheme."""
        return f"{driver}://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and return when it answers; it does nothing when already started."""
        if self._child is not None:
            return
        self._programs = _newest_programs()
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            self._become_postgres()
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        self.port = self.port if self.port and is_free(self.port) else free_port()
        child = Child(
            [self._programs / "postgres", "-D", self.data, *self._settings()],
            env=clean_environment(),
            log=self.folder / "server.log",
            cwd=Path("/"),
            user=None if self._account is None else self._account.pw_uid,
            group=None if self._account is None else self._account.pw_gid,
            at_our_death=signal.SIGINT,
        )
        child.wait_until(self._answers, START_SECONDS, f"PostgreSQL on port {self.port}")
        self._child = child

    def stop(self) -> None:
        """Stop the server in order, ending its clients' connections; nothing when not started."""
        if self._child is not None:
            # SIGTERM would wait for the clients to leave.
            self._child.stop(STOP_SECONDS, signal.SIGINT)
            self._child = None

    def kill(self) -> None:
        """SIGKILL every process of the server, as a crash of the machine would; returns when all are gone."""
        if self._child is not None:
            # A new server refuses the data as long as one of the old processes holds its shared memory.
            self._child.kill(*children(self._child.pid))
            self._child = None

    def restart(self) -> None:
        """Start again, after stop() if it runs, with the same data and, if still free, the same port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop, and remove the data if it had to lie outside the folder."""
        self.stop()
        if self._elsewhere is not None:
            shutil.rmtree(self._elsewhere)
            self._elsewhere = None

    def create_database(self, name: str) -> str:
        """Create an empty database and return its address."""
        self._client("createdb", name)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database, ending the connections that are still open to it."""
        self._client("dropdb", "--force", "--if-exists", name)

    def _become_postgres(self) -> None:
        try:
            self._account = pwd.getpwnam("postgres")
        except KeyError:
            raise ServerError("as root, PostgreSQL needs the user `postgres`, which is missing") from None
        if self._elsewhere is None and not _everybody_enters(self.folder):
            self._elsewhere = Path(tempfile.mkdtemp(prefix="nexus-postgresql-"))
            self._elsewhere.chmod(0o755)
        self.data.mkdir(mode=0o700, exist_ok=True)
        os.chown(self.data, self._account.pw_uid, self._account.pw_gid)

    def _initialise(self) -> None:
        options = ["--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        initdb = self._programs / "initdb"
        _run([initdb, "--pgdata", self.data, "--username", SUPERUSER, *options], self._account)

    def _settings(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",  # its default folder belongs to the machine's own server
            "fsync": "on" if self._fsync else "off",
        }
        return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def _answers(self) -> bool:
        program = self._programs / "pg_isready"
        asked = subprocess.run([program, "--quiet", *self._address()], env=clean_environment(), check=False)
        return asked.returncode == 0

    def _client(self, program: str, *arguments: str) -> None:
        _run([self._programs / program, *self._address(), *arguments], None)

    def _address(self) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(self.port), "--username", SUPERUSER]


def _newest_programs() -> Path:
    found = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "initdb").exists()]
    if not found:
        raise ServerError("PostgreSQL is not installed; run `sh tools/packages.sh postgresql`")
    return max(found, key=lambda folder: float(folder.parent.name))


def _everybody_enters(folder: Path) -> bool:
    return all(place.stat().st_mode & 0o001 for place in (folder, *folder.parents))


def _run(command: Sequence[str | Path], account: pwd.struct_passwd | None) -> None:
    result = subprocess.run(
        command,
        env=clean_environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        user=None if account is None else account.pw_uid,
        group=None if account is None else account.pw_gid,
        extra_groups=None if account is None else [],
        check=False,
    )
    if result.returncode != 0:
        raise ServerError(f"{Path(command[0]).name}: {result.stderr.strip()}")
