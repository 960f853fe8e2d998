"""A real CDCS (core-main-app under gunicorn, on SQLite) for tests, the demo and measurements.

Its packages live in a virtual environment of their own under `.services`, since they would not go with ours.
The first use builds it; it is kept until the requirements change.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tools.servers.ports import free_port, is_free
from tools.servers.process import Child, ServerError, children, clean_environment

PROJECT = Path(__file__).resolve().parents[2]
DJANGO = PROJECT / "tests" / "cdcs"
REQUIREMENTS = DJANGO / "requirements.txt"
SERVICES = PROJECT / ".services"
ENVIRONMENT = SERVICES / "cdcs-venv"
START_SECONDS = 60
STOP_SECONDS = 10
DATABASE = "cdcs.sqlite3"
MEDIA = "media"


class CdcsServer:
    """One CDCS. Database and media lie in the folder and serve the next start there again.

    It knows the users `admin` (superuser, password admin) and `plain`, and the templates "Another Schema"
    and, after it, "Nexus Experiment Schema".
    """

    admin_token = "a" * 40
    plain_token = "b" * 40

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.port = 0
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base address, with the slash at its end."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def schema_path(self) -> Path:
        """The XSD file behind the template "Nexus Experiment Schema"."""
        return schema_path()

    @property
    def pid(self) -> int:
        """The gunicorn process that the workers belong to; ServerError when it does not run."""
        if self._child is None:
            raise ServerError("CDCS is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether start() was called and neither stop() nor kill() since."""
        return self._child is not None

    def start(self) -> None:
        """Start the server and return when it answers; it does nothing when already started."""
        if self._child is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / DATABASE).exists():
            shutil.copytree(seeded_data(), self.folder, dirs_exist_ok=True)
        # The same address again after a restart, since records carry it in their links.
        self.port = self.port if self.port and is_free(self.port) else free_port()
        child = Child(
            [*self._command(), "cdcs_min.wsgi"],
            env=_django_environment(self.folder),
            log=self.folder / "server.log",
            cwd=DJANGO,
            at_our_death=signal.SIGQUIT,
        )
        child.wait_until(self._answers, START_SECONDS, f"CDCS on port {self.port}")
        self._child = child

    def stop(self) -> None:
        """End the server and its workers, after the requests they are at; nothing when not started."""
        if self._child is not None:
            self._child.stop(STOP_SECONDS)
            self._child = None

    def kill(self) -> None:
        """SIGKILL the server with its workers, in the middle of whatever they do."""
        if self._child is not None:
            self._child.kill(*children(self._child.pid))
            self._child = None

    def restart(self) -> None:
        """Start again, after stop() if it runs, with the same data and, if still free, the same port."""
        self.stop()
        self.start()

    def _command(self) -> list[str | Path]:
        options = ["--bind", f"127.0.0.1:{self.port}", "--workers", "2", "--threads", "4", "--preload"]
        # Without the last one it writes a socket into the user's home folder.
        options += ["--graceful-timeout", str(STOP_SECONDS - 2), "--no-control-socket"]
        return [ENVIRONMENT / "bin" / "python", "-m", "gunicorn", *options]

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Authorization": f"Token {self.admin_token}"}
        try:
            connection.request("GET", "/rest/template-version-manager/global/", headers=headers)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def schema_path() -> Path:
    """Return the Nexus Experiment XSD, out of the package nexusLIMS in CDCS's virtual environment."""
    build_environment()
    return next(ENVIRONMENT.glob("lib/python3*/site-packages/nexusLIMS/schemas/nexus-experiment.xsd"))


def build_environment() -> None:
    """Make the virtual environment unless the one that is there was made from the same requirements."""
    wanted = _digest(REQUIREMENTS)
    marker = ENVIRONMENT / "built-from"
    with _lock("cdcs-venv"):
        if marker.exists() and marker.read_text(encoding="ascii") == wanted:
            return
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        print("Making the virtual environment of the test CDCS (10-30 s, once)", file=sys.stderr)
        log = SERVICES / "cdcs-venv.log"
        log.unlink(missing_ok=True)
        _run([sys.executable, "-m", "venv", ENVIRONMENT], os.environ, log)
        # The caller's own pip settings apply here, a mirror or a proxy for instance.
        install: list[str | Path] = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet"]
        install += ["--disable-pip-version-check", "--no-deps", "--require-hashes", "-r", REQUIREMENTS]
        _run(install, os.environ, log)
        # Last, so that a half-made environment is made again.
        marker.write_text(wanted, encoding="ascii")


def seeded_data() -> Path:
    """Return the folder of a database with users and templates, to be copied; made once per version of it."""
    xsd = schema_path()
    sources = [REQUIREMENTS, DJANGO / "seed.py", DJANGO / "cdcs_min" / "settings.py"]
    ready = SERVICES / f"cdcs-data-{_digest(*sources)[:16]}"
    with _lock("cdcs-data"):
        if ready.exists():
            return ready
        for outdated in SERVICES.glob("cdcs-data-*"):
            shutil.rmtree(outdated)
        with tempfile.TemporaryDirectory(dir=SERVICES) as temporary:
            fresh = Path(temporary) / "data"
            fresh.mkdir()
            python = ENVIRONMENT / "bin" / "python"
            log = Path(temporary) / "log"
            _run([python, DJANGO / "manage.py", "migrate", "-v", "0"], _django_environment(fresh), log)
            _run([python, DJANGO / "seed.py", xsd], _django_environment(fresh), log)
            fresh.rename(ready)
    return ready


def _django_environment(folder: Path) -> dict[str, str]:
    return clean_environment(
        CDCS_TEST_DATABASE=str(folder / DATABASE),
        CDCS_TEST_MEDIA=str(folder / MEDIA),
        CDCS_TEST_SECRET_KEY=secrets.token_hex(32),
        HOME=str(folder),
        PYTHONPATH=str(DJANGO),
        PYTHONDONTWRITEBYTECODE="1",
    )


def _digest(*files: Path) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Let one process at a time build what others wait for."""
    SERVICES.mkdir(exist_ok=True)
    with (SERVICES / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str | Path], env: "os._Environ[str] | dict[str, str]", log: Path) -> None:
    result = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    with log.open("a", encoding="utf-8") as file:
        file.write(result.stdout + result.stderr)
    if result.returncode != 0:
        raise ServerError(f"{' '.join(map(str, command))}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
