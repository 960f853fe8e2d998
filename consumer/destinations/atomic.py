"""Files that survive a power cut: whole and synced, or not there; no symbolic link is followed on the way.

Everything happens relative to an open folder, so a folder swapped for a link in between changes nothing.
"""

import errno
import hashlib
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a pipe must not hang us
_TOKEN = re.compile(r"[0-9a-f]{16}\.part")
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class RootMissingError(OSError):
    """The folder that everything lies below is not there."""


class NotPlainError(Exception):
    """A link, pipe or the like lies where a regular file or a folder should be."""


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file as it was read."""

    sha256: str
    size: int
    modified: datetime


@contextmanager
def open_folder(root: Path, parts: Sequence[str] = (), *, make: bool = False) -> Iterator["Folder"]:
    """Open a folder below ``root``; ``make`` makes what is missing, never the root itself.

    Raises ``RootMissingError``, ``FileNotFoundError`` (without ``make``), ``NotPlainError`` or another ``OSError``.
    """
    chain: list[int] = []
    try:
        chain.append(_open_root(root))
        for part in parts:
            chain.append(_enter(chain[-1], part, make=make))
        yield Folder(chain)
    finally:
        for descriptor in chain:
            os.close(descriptor)


def _open_root(root: Path) -> int:
    try:
        return os.open(root, _FOLDER)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RootMissingError(error.errno, error.strerror, str(root)) from None


def _enter(folder: int, part: str, *, make: bool) -> int:
    try:
        return os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
        with suppress(FileExistsError):  # another thread was faster
            os.mkdir(part, dir_fd=folder)
        return _enter(folder, part, make=False)
    except OSError as error:
        if error.errno in {errno.ENOTDIR, errno.ELOOP}:
            raise NotPlainError(f"{part} is no folder") from None
        raise


class Folder:
    """An open folder with the folders above it, up to the root."""

    def __init__(self, chain: Sequence[int]) -> None:
        self._chain = chain
        self._here = chain[-1]

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None when there is none. Raises ``NotPlainError``."""
        with self._opened(name) as file:
            return None if file is None else file.read()

    def look(self, name: str) -> Found | None:
        """Return a file's sha256, size and age, or None when there is none. Raises ``NotPlainError``."""
        with self._opened(name) as file:
            if file is None:
                return None
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            status = os.fstat(file.fileno())
            return Found(sha256, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def create(self, name: str, content: bytes) -> None:
        """Write a new file; raises ``FileExistsError`` rather than replace what somebody else made meanwhile."""
        with self._written(name, content) as temporary:
            self._link(temporary, name)
        self.sync()

    def replace(self, name: str, content: bytes) -> None:
        """Write a file in the place of another one, which is whole until the new one is."""
        with self._written(name, content) as temporary:
            os.rename(temporary, name, src_dir_fd=self._here, dst_dir_fd=self._here)
        self.sync()

    def keep(self, name: str, other: str) -> None:
        """Give a file a second name, so that it outlives being replaced; raises ``FileExistsError``."""
        try:
            self._link(name, other)
        except PermissionError:  # Linux refuses to link some files of other users (fs.protected_hardlinks)
            self.create(other, self.read(name) or b"")
        self.sync()

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=self._here)

    def sync(self, name: str | None = None) -> None:
        """Sync the folder, and first a file in it that somebody else wrote."""
        if name is not None:
            with self._opened(name) as file:
                if file is not None:
                    os.fsync(file.fileno())
        _sync_folder(self._here)

    def prepare(self, stem: str, mark: str) -> None:
        """Remove what a killed process left of ``stem``; sync the folders above until a ``mark`` file is here.

        Such a file is written last, so without one nobody may yet have synced the folders that were made.
        """
        names = os.listdir(self._here)  # noqa: PTH208 - a descriptor has no path
        beginning = f".{stem}."
        left = [name for name in names if name.startswith(beginning) and _TOKEN.fullmatch(name, len(beginning))]
        for name in left:
            with suppress(FileNotFoundError):
                self.remove(name)
        if not any(name.endswith(mark) for name in names):
            for descriptor in self._chain:
                _sync_folder(descriptor)

    @contextmanager
    def _opened(self, name: str) -> Iterator[io.FileIO | None]:
        try:
            descriptor = os.open(name, _READ, dir_fd=self._here)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENXIO}:
                raise NotPlainError(f"{name} is no regular file") from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotPlainError(f"{name} is no regular file")
            with open(descriptor, "rb", buffering=0, closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)

    @contextmanager
    def _written(self, name: str, content: bytes) -> Iterator[str]:
        temporary = f".{PurePath(name).stem}.{secrets.token_hex(8)}.part"
        descriptor = os.open(temporary, _WRITE, 0o666, dir_fd=self._here)  # the umask decides
        try:
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield temporary
        finally:
            with suppress(OSError):  # after a rename it is gone; else what went wrong before counts
                self.remove(temporary)

    def _link(self, name: str, other: str) -> None:
        os.link(name, other, src_dir_fd=self._here, dst_dir_fd=self._here, follow_symlinks=False)


def _sync_folder(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of network file systems that sync folders by themselves
            raise
