"""Reading files that an event names, without ever leaving the folder they belong to."""

import errno
import os
import stat
from pathlib import Path, PurePosixPath

from consumer.errors import RecordNotThereYet, RecordRefused, RecordsRootMissing

_MISSING = {errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}


def safe_parts(path: str) -> tuple[str, ...]:
    """Split a relative path; raises ``RecordRefused`` for one that could lead out of its folder."""
    pure = PurePosixPath(path)
    if pure.is_absolute():
        raise RecordRefused("path_refused", f"path {path!r} is absolute; give it relative to NX_RECORDS_PATH")
    if ".." in pure.parts:
        raise RecordRefused("path_refused", f"path {path!r} holds '..'")
    if not pure.parts:
        raise RecordRefused("path_refused", f"path {path!r} names no file")
    if any(len(part.encode()) > 255 for part in pure.parts):  # noqa: PLR2004 - NAME_MAX of Linux
        raise RecordRefused("path_refused", "a part of the path is longer than 255 bytes")
    return pure.parts


def read_below(root: Path, parts: tuple[str, ...], limit: int) -> bytes:
    """Read a regular file below ``root``, following no symbolic link on the way.

    Each folder is opened relative to the one before it, so a link swapped in between check and use is
    refused too. Raises ``RecordRefused``, ``RecordNotThereYet`` or ``RecordsRootMissing``.
    """
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        message = f"records root {root} cannot be opened: {error.strerror}"
        raise RecordsRootMissing("records_root_missing", message) from None
    shown = "/".join(parts)
    try:
        for part in parts[:-1]:
            inner = _open(part, folder, shown, os.O_DIRECTORY)
            os.close(folder)
            folder = inner
        descriptor = _open(parts[-1], folder, shown, os.O_NONBLOCK)
    finally:
        os.close(folder)
    try:
        return _read(descriptor, shown, limit)
    finally:
        os.close(descriptor)


def _open(name: str, folder: int, shown: str, flags: int) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EMLINK} or (error.errno == errno.ENOTDIR and _is_link(name, folder)):
            raise RecordRefused("path_refused", f"{shown}: {name!r} is a symbolic link") from None
        if error.errno == errno.ENOTDIR:
            raise RecordRefused("path_refused", f"{shown}: {name!r} is no folder") from None
        if error.errno in _MISSING:
            raise RecordNotThereYet("record_missing", f"{shown}: {error.strerror}") from None
        if error.errno in {errno.EACCES, errno.EPERM}:
            message = f"{shown}: permission denied; the service's user must be able to read it"
            raise RecordNotThereYet("record_unreadable", message) from None
        raise RecordRefused("record_unreadable", f"{shown}: {error.strerror}") from None


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode)
    except OSError:
        return False


def _read(descriptor: int, shown: str, limit: int) -> bytes:
    try:
        status = os.fstat(descriptor)
    except OSError as error:  # a network file system may lose a file that is open
        raise RecordNotThereYet("record_unreadable", f"{shown}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise RecordRefused("record_not_a_file", f"{shown} is no regular file")
    if status.st_size > limit:
        raise RecordRefused("record_too_large", f"{shown} has {status.st_size} bytes; the limit is {limit}")
    chunks: list[bytes] = []
    left = limit + 1
    while left > 0:
        try:
            chunk = os.read(descriptor, min(left, 1 << 20))
        except OSError as error:
            raise RecordNotThereYet("record_unreadable", f"{shown}: {error.strerror}") from None
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        left -= len(chunk)
    raise RecordRefused("record_too_large", f"{shown} grew over the limit of {limit} bytes")
