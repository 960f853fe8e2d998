"""Starts services by forking: a process with everything imported, so that a start costs a moment and not a second.

Asked by lines of JSON on its standard input, it answers each on its standard output; it ends with its input and
takes every service with it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from tools.servers.process import clean_environment, wait_for

PROJECT = Path(__file__).resolve().parents[2]


class Nursery:
    """The process that forks services; any thread may ask it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.crash.nursery"]
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            command, cwd=PROJECT, env=clean_environment(), text=True, bufsize=1, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, **question: Any) -> Any:
        """Ask and return the answer."""
        with self._lock:
            if self._process.stdin is None or self._process.stdout is None:
                raise RuntimeError("the nursery has no pipes")
            self._process.stdin.write(json.dumps(question) + "\n")
            return json.loads(self._process.stdout.readline())

    def start(self, log: Path, folder: Path, environment: Mapping[str, str]) -> "Service":
        """Start a service."""
        return Service(self, self.ask(log=str(log), folder=str(folder), environment=dict(environment)), log)


class Service:
    """A service that was forked."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery = nursery
        self._pid = pid
        self._code: int | None = None
        self.log = log

    @property
    def exit_code(self) -> int | None:
        """Return how it ended, the negative number of a signal too; None while it runs."""
        if self._code is None:
            self._code = self._nursery.ask(pid=self._pid)
        return self._code

    def logged(self) -> str:
        """Return all it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def end(self, number: signal.Signals, seconds: float) -> None:
        """Send a signal, if it still runs, and wait for its end."""
        if self.exit_code is None:  # until we have asked, its number belongs to nobody else
            os.kill(self._pid, number)
            wait_for(lambda: self.exit_code is not None, seconds, "the end of the service", self.log)


def _serve() -> None:
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            answer = _status(children, question["pid"])
        else:
            answer = os.fork()
            if answer == 0:
                _become(question)
            children[answer] = None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        if _status(children, pid) is None:
            os.kill(pid, signal.SIGKILL)


def _status(children: dict[int, int | None], pid: int) -> int | None:
    if children[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        children[pid] = os.waitstatus_to_exitcode(status) if found else None
    return children[pid]


def _become(question: Mapping[str, Any]) -> NoReturn:
    """Be the service, as ``nexus-export run`` would be."""
    code = 1
    try:
        os.setsid()
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        empty = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((empty, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(question["folder"])
        os.environ.clear()
        os.environ.update(question["environment"])
        sys.argv = ["nexus-export", "run"]
        points.in_service()
        doors.run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":  # the process that reads records imports this file too
    from tests.crash import doors, points

    _serve()
