"""The disk faults that a destination of files has to survive: a checked-in table, and the process that meets them.

The attempt runs in a process of its own (``python -m consumer.testing.disk_faults``), which can be killed at a
chosen call. Faults of the disk are answered at the calls of ``os`` that reach the kernel, with the error that the
kernel would give; what lies in the way, and missing rights, are real.
"""

import asyncio
import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from consumer.config import Environment, Value
from consumer.testing.conformance_play import Journey, short
from consumer.testing.conformance_subject import Options, Record, Subject, resolve
from consumer.testing.faults import Seen

#: The user without rights of every Unix.
NOBODY = 65534
KILLED = "killed"


@dataclass(frozen=True, slots=True)
class DiskFault:
    """One named fault and the endings that are right; none where the process is killed."""

    name: str
    does: str
    endings: frozenset[str]


_KILLED = frozenset({KILLED})
_M, _P, _T = (frozenset({str(seen)}) for seen in (Seen.MISCONFIGURED, Seen.PERMANENT, Seen.TRANSIENT))

DISK_FAULTS = (
    DiskFault("disk_full", "the disk is full when half of the record is written (ENOSPC)", _M),
    DiskFault("io_error_at_sync", "the disk cannot keep what was written (EIO of fsync)", _T),
    DiskFault("read_only", "the file system has become read-only (EROFS of whatever changes it)", _M),
    DiskFault("no_permission", "the folder belongs to somebody else", _M),
    DiskFault("killed_in_write", "the process is killed when half of the record is written", _KILLED),
    DiskFault("killed_before_sync", "the process is killed after the last byte, before fsync", _KILLED),
    DiskFault("killed_before_rename", "the process is killed before the file gets its name", _KILLED),
    DiskFault("killed_after_rename", "the process is killed when the file has just got its name", _KILLED),
    DiskFault("folder_missing", "the folder is gone (a lost mount); it must not be made anew", _M),
    DiskFault("target_is_folder", "a folder has the name of the file", _P),
    DiskFault("target_is_link", "a symbolic link to a file elsewhere has the name of the file", _P),
    DiskFault("other_bytes", "a file of somebody else has the name of the file", _P),
)


class _Struck:
    """Whether the fault found what it waits for."""

    yes = False


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError  # not reached


def _fails(number: int) -> OSError:
    _Struck.yes = True
    return OSError(number, os.strerror(number))


def _is_file(descriptor: int) -> bool:
    return descriptor > 2 and stat.S_ISREG(os.fstat(descriptor).st_mode)  # noqa: PLR2004 - not the standard streams


def _in_write(then: Callable[[], Any]) -> None:
    """Let the first write to a file end in its middle, and do something at the next one."""
    write = os.write
    halved: set[int] = set()

    def half(descriptor: int, data: Any) -> int:
        if not _is_file(descriptor):
            return write(descriptor, data)
        if descriptor in halved:
            raise then()
        halved.add(descriptor)
        return write(descriptor, bytes(data)[: max(1, len(data) // 2)])

    os.write = half


def _at_sync(then: Callable[[], Any]) -> None:
    sync = os.fsync

    def fsync(fd: Any) -> None:
        if isinstance(fd, int) and _is_file(fd) and not _Struck.yes:
            raise then()
        sync(fd)

    os.fsync = fsync


def _at_rename(*, before: bool) -> None:
    """Die where a file gets its name, by whichever call."""
    for name in ("link", "rename", "replace"):
        call = getattr(os, name)

        def renamed(*arguments: Any, call: Any = call, **more: Any) -> None:
            if not before:
                call(*arguments, **more)
            _die()

        setattr(os, name, renamed)


_CHANGES = {"os.mkdir", "os.link", "os.rename", "os.remove", "os.symlink", "os.truncate"}


def _read_only() -> None:
    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes:
            raise _fails(errno.EROFS)

    sys.addaudithook(refuse)


def _without_rights() -> None:
    _Struck.yes = True
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


_INJECTED: dict[str, Callable[[], None]] = {
    "disk_full": lambda: _in_write(lambda: _fails(errno.ENOSPC)),
    "io_error_at_sync": lambda: _at_sync(lambda: _fails(errno.EIO)),
    "read_only": _read_only,
    "no_permission": _without_rights,
    "killed_in_write": lambda: _in_write(_die),
    "killed_before_sync": lambda: _at_sync(_die),
    "killed_before_rename": lambda: _at_rename(before=True),
    "killed_after_rename": lambda: _at_rename(before=False),
}


async def _attempt(job: dict[str, Any]) -> dict[str, Any]:
    """Export once under a fault and tell what came of it."""
    environment = Environment({name: Value(text, "conformance kit") for name, text in job["settings"].items()})
    subject = Subject(
        resolve(job["spec"], environment), environment, Options(job["limit_seconds"]), url_setting=job["setting"]
    )
    paths = Path(job["record"]["path"]), Path(job["record"]["preview"])
    record = Record(*paths, job["record"]["session"], job["record"]["instrument"], job["record"]["sha256"])
    journey = Journey(subject, record, job["root"])
    inject = _INJECTED.get(job["fault"])
    if inject is None:
        _Struck.yes = True
    else:
        inject()
    attempt = await journey.export()
    told = {"seen": str(attempt.seen), "seconds": attempt.seconds, "message": short(attempt.value)}
    return {**told, "kept": journey.kept, "struck": _Struck.yes}


def main() -> None:
    """Read a job as JSON, export, and write the ending as JSON."""
    told = asyncio.run(_attempt(json.load(sys.stdin)))
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
