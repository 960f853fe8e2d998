"""Start, wait for and end server processes: always by process id, and never one that outlives us."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# What a server may see of the caller's environment. Everything else (NX_*, RABBITMQ_*, PG*, DJANGO_*)
# would let one person's settings change what a test sees.
INHERITED = ("PATH", "TMPDIR", "TZ")
PAUSE_SECONDS = 0.05
TAIL_LINES = 20

# Sleeps until its standard input ends. A line first means "all is well"; the end without a line means that
# the owner died (even by SIGKILL), and then the server is ended, woken first if it was stopped.
# PR_SET_PDEATHSIG would do without a second process, but it fires when the *thread* that started us ends.
GUARD = 'read -r _ || { kill -s "$1" "$0"; kill -s CONT "$0"; }'


class ServerError(RuntimeError):
    """A private server did not start, or ended by itself; the text says what to do or quotes its log."""


def clean_environment(**settings: str) -> dict[str, str]:
    """Return an environment with these settings and next to nothing of the caller's own."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", **settings}


def tail(log: Path | None) -> str:
    """Return the last lines of a log file as text to append to an error message."""
    if log is None or not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return f"\nThe end of {log}:\n" + "\n".join(lines)


def wait_for(predicate: Callable[[], object], seconds: float, what: str, log: Path | None = None) -> None:
    """Return as soon as the predicate is true; TimeoutError names what was awaited and quotes the log."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s{tail(log)}")
        time.sleep(PAUSE_SECONDS)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which only waits for its parent to look, does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The name in parentheses may itself hold spaces and parentheses; the state follows the last one.
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal; a process that is already gone is what most callers want."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def kill(pids: Sequence[int], seconds: float = 10) -> None:
    """SIGKILL these processes and return when all of them are gone."""
    for pid in pids:
        send(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, pids)), seconds, f"the end of the killed processes {pids}")


def stop(pid: int, seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
    """Ask a process to end, wait that long, then SIGKILL it; return when it is gone."""
    send(pid, first)
    send(pid, signal.SIGCONT)  # a process that a test had stopped must wake up to hear the request
    try:
        wait_for(lambda: not is_alive(pid), seconds, f"the end of process {pid}")
    except TimeoutError:
        kill([pid])


class Child:
    """A server process in a session of its own, with its output in a log file.

    Ctrl-C at the terminal does not reach it, so that it is stopped in order by the program that started it;
    if that program dies without stopping it, a guard process sends `at_our_death`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        log: Path,
        cwd: Path,
        user: int | None = None,
        group: int | None = None,
        at_our_death: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=None if user is None else [],
            )
        self.pid = self._process.pid
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self.pid), at_our_death.name.removeprefix("SIG")],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until(self, ready: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for the server to be ready; if it ends instead, say so at once. It is stopped then."""

        def ready_or_dead() -> bool:
            if self._process.poll() is not None:
                raise ServerError(f"{what}: ended with status {self._process.returncode}{tail(self.log)}")
            return bool(ready())

        try:
            wait_for(ready_or_dead, seconds, what, self.log)
        except BaseException:
            self.stop(seconds=1)
            raise

    def stop(self, seconds: float, first: signal.Signals = signal.SIGTERM) -> None:
        """End the server in order, by force after that many seconds."""
        stop(self.pid, seconds, first)
        self._forget()

    def kill(self, *others: int) -> None:
        """SIGKILL the server, and these processes of it, and return when they are gone."""
        kill([self.pid, *others])
        self._forget()

    def _forget(self) -> None:
        # Until wait() the id cannot be given to another process, so the guard is released before it.
        self._guard.communicate(b"\n")
        self._process.wait()
