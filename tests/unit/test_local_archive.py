"""The local archive: what lies where, what is never overwritten, and what a crash at any moment leaves.

Run as a program, this file is the child that is killed: it repeats one export, killed after its first system call
that changes something, then after its second, and so on.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumer.config import Environment, Value
from consumer.destinations.archive_layout import safe_name
from consumer.destinations.contract import (
    Absent,
    ExportContext,
    ExportResult,
    LastExport,
    Partial,
    Present,
    Unsure,
)
from consumer.destinations.local_archive import LocalArchive
from consumer.errors import Misconfigured, Permanent, Transient

A, B, C = b"<a>first</a>", b"<b>second, which is longer</b>", b"<c>third</c>"
FOLDER = "FEI-Titan-TEM/2026/11"
RECORD = f"{FOLDER}/2026-11-24_titan.xml"
MANIFEST = f"{FOLDER}/2026-11-24_titan.json"
V1, V2, V3 = (f"{FOLDER}/2026-11-24_titan.v{number}.xml" for number in (1, 2, 3))
CDCS = {"cdcs": ExportResult(success=True, destination_name="cdcs", record_url="https://cdcs.test/1")}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive(root: Path) -> LocalArchive:
    return LocalArchive(LocalArchive.Settings(path=root))


def context(root: Path, content: bytes, *, name: str = "2026-11-24_titan.xml", **changes: Any) -> ExportContext:
    """Make a context; its copy of the record lies in a folder beside the archive."""
    path = root.parent / "spool" / sha(content) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    fields: dict[str, Any] = {
        "xml_file_path": path,
        "session_identifier": "session-1",
        "instrument_pid": "FEI-Titan-TEM",
        "dt_from": datetime(2026, 11, 24, 9, tzinfo=UTC),
        "dt_to": datetime(2026, 11, 24, 17, tzinfo=UTC),
        "record_sha256": sha(content),
    }
    return ExportContext(**{**fields, **changes})


def export(root: Path, content: bytes, **changes: Any) -> ExportResult:
    return archive(root).export(context(root, content, **changes))


def manifest(root: Path) -> Any:
    return json.loads((root / MANIFEST).read_bytes())


def versions(root: Path) -> list[bytes]:
    """Return the contents of the versions; what the manifest says of them must be true."""
    found = []
    for version in manifest(root)["versions"]:
        content = (root / FOLDER / version["file"]).read_bytes()
        assert (version["sha256"], version["size"]) == (sha(content), len(content))
        assert datetime.fromisoformat(version["archived_at"]).tzinfo is not None
        found.append(content)
    return found


def files(root: Path) -> dict[str, bytes]:
    """Return all files, hidden ones too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def states(root: Path) -> dict[Path, tuple[int, int, int]]:
    """Return what changes when somebody touches a file or folder."""
    stats = {path: path.lstat() for path in [root, *root.rglob("*")]}
    return {path: (item.st_ino, item.st_mtime_ns, item.st_ctime_ns) for path, item in stats.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give an empty archive."""
    folder = tmp_path / "archive"
    folder.mkdir()
    return folder


# What lies where


def test_a_record_lies_by_instrument_and_month_with_its_manifest_beside_it(root: Path) -> None:
    result = export(root, A, previous_results=CDCS)
    assert set(files(root)) == {RECORD, MANIFEST}
    assert (root / RECORD).read_bytes() == A
    assert manifest(root) == {
        "format": 1,
        "session_identifier": "session-1",
        "instrument_pid": "FEI-Titan-TEM",
        "file": "2026-11-24_titan.xml",
        "sha256": sha(A),
        "size": len(A),
        "versions": [],
        "links": {"cdcs": "https://cdcs.test/1"},
    }
    assert (result.success, result.action, result.destination_name) == (True, "created", "local_archive")
    assert (result.record_id, result.record_url) == (RECORD, (root / RECORD).as_uri())
    assert result.metadata == {"manifest": MANIFEST, "version": 1}
    assert result.stored_sha256 == sha(A)


def test_a_manifest_is_sorted_indented_and_readable(root: Path) -> None:
    export(root, A, session_identifier="Sitzung µ")
    text = (root / MANIFEST).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert "Sitzung µ" in text


def test_the_month_is_that_of_the_instruments_own_clock(root: Path) -> None:
    early = datetime(2027, 1, 1, 0, 30, tzinfo=timezone(timedelta(hours=9)))
    assert export(root, A, dt_from=early).record_id == "FEI-Titan-TEM/2027/01/2026-11-24_titan.xml"


def test_a_record_stays_where_it_was_put_first(root: Path) -> None:
    first = export(root, A)
    last = LastExport(record_id=str(first.record_id), record_url=None, sent_sha256=sha(A), stored_sha256=sha(A))
    moved: dict[str, Any] = {
        "name": "other.xml",
        "instrument_pid": "other",
        "dt_from": datetime(2030, 1, 1, tzinfo=UTC),
    }
    result = export(root, B, last_export=last, **moved)
    assert (result.action, result.record_id) == ("updated", RECORD)
    assert set(files(root)) == {RECORD, MANIFEST, V1}
    assert manifest(root)["instrument_pid"] == "other"
    assert archive(root).verify(context(root, B, last_export=last, **moved)) == Present(RECORD, result.record_url)


@pytest.mark.parametrize(
    "record_id",
    [
        "../out.xml",
        "/etc/out.xml",
        "a/../../out.xml",
        "a//b.xml",
        "./a.xml",
        "",
        "a.json",
        "a\0b.xml",
        ".a/b.xml",
        ".xml",
    ],
)
def test_a_recorded_place_outside_the_archive_is_refused(root: Path, record_id: str) -> None:
    last = LastExport(record_id=record_id, record_url=None, sent_sha256=None, stored_sha256=None)
    with pytest.raises(Permanent, match="no path inside the archive") as caught:
        export(root, A, last_export=last)
    assert caught.value.code == "conflict"
    assert files(root.parent / "archive") == {}


@pytest.mark.parametrize("name", [".xml", ".hidden.xml", "a\nb.xml", "ü" * 120 + ".xml", "x" * 250 + ".xml"])
def test_any_file_name_can_be_archived_with_versions(root: Path, name: str) -> None:
    first = export(root, A, name=name)
    assert export(root, B, name=name).record_id == first.record_id
    stem = Path(str(first.record_id)).stem
    assert not stem.startswith(".")
    assert set(files(root)) == {f"{FOLDER}/{stem}{end}" for end in (".xml", ".json", ".v1.xml")}


# The folder of an instrument

AWKWARD = st.text(st.sampled_from("aA./\\:\0\n -_0fü\ud800"), max_size=40)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=150)


@given(st.one_of(ANY_TEXT, AWKWARD))
@example("")
@example("..")
@example("x" * 101)
@example("a-0123456789abcdef")
def test_an_instruments_folder_is_one_safe_component(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name.encode()) <= 100
    assert not set(name) & set("/\0")
    assert name.isprintable()
    assert not name.startswith(".")
    assert Path("root", name).parts == ("root", name)


@given(st.one_of(ANY_TEXT, AWKWARD), st.one_of(ANY_TEXT, AWKWARD))
def test_two_instruments_never_share_a_folder(one: str, other: str) -> None:
    # also when one is called like the folder of the other
    different = list({one, other, safe_name(one), safe_name(other), safe_name(safe_name(one))})
    assert len({safe_name(text) for text in different}) == len(different)


@pytest.mark.parametrize("text", ["FEI-Titan-TEM-635816", "Zeiss Gemini (Raum 3)", "電子顕微鏡", "x" * 100])
def test_a_plain_instrument_names_its_folder(text: str) -> None:
    assert safe_name(text) == text


def test_an_instrument_that_is_a_web_address_is_still_recognised(root: Path) -> None:
    folder = str(export(root, A, instrument_pid="https://hdl.handle.net/21.1/x").record_id).split("/")[0]
    assert folder.startswith("https___hdl.handle.net_21.1_x-")


# The same again


def test_the_same_content_again_touches_nothing(root: Path) -> None:
    first = export(root, A, previous_results=CDCS)
    before = states(root)
    again = export(root, A, previous_results=CDCS)
    assert states(root) == before
    assert again.action == "unchanged"
    assert (again.record_id, again.record_url, again.metadata) == (first.record_id, first.record_url, first.metadata)


def test_a_late_link_writes_the_manifest_and_nothing_else(root: Path) -> None:
    export(root, A)
    before = states(root)
    result = export(root, A, previous_results=CDCS, purpose="link")
    changed = {path for path, state in states(root).items() if before.get(path) != state}
    assert changed == {root / MANIFEST, root / FOLDER}
    assert result.action == "linked"
    assert manifest(root)["links"] == {"cdcs": "https://cdcs.test/1"}
    assert export(root, A, previous_results=CDCS, purpose="link").action == "linked"


def test_links_name_successful_exports_elsewhere_and_are_not_forgotten(root: Path) -> None:
    others = {
        "failed": ExportResult(success=False, destination_name="failed", record_url="https://x.test"),
        "silent": ExportResult(success=True, destination_name="silent"),
        "local_archive": ExportResult(success=True, destination_name="local_archive", record_url="file:///x"),
    }
    export(root, A, previous_results={**CDCS, **others})
    export(root, B, previous_results=others)
    assert manifest(root)["links"] == {"cdcs": "https://cdcs.test/1"}


def test_what_a_person_added_to_a_manifest_stays(root: Path) -> None:
    export(root, A)
    (root / MANIFEST).write_text(json.dumps({**manifest(root), "note": "see notebook 12"}))
    export(root, B)
    assert manifest(root)["note"] == "see notebook 12"
    assert manifest(root)["sha256"] == sha(B)


# Versions


def test_other_content_keeps_the_earlier_one_as_a_version(root: Path) -> None:
    export(root, A)
    written = (root / RECORD).stat()
    result = export(root, B)
    assert (result.action, result.metadata["version"]) == ("updated", 2)
    assert ((root / RECORD).read_bytes(), versions(root)) == (B, [A])
    assert (root / V1).stat().st_ino == written.st_ino
    archived_at = datetime.fromisoformat(manifest(root)["versions"][0]["archived_at"])
    assert abs(archived_at.timestamp() - written.st_mtime) < 0.001


def test_going_back_to_earlier_content_keeps_all_versions(root: Path) -> None:
    for content in (A, B, A):
        result = export(root, content)
    assert (result.action, result.metadata["version"]) == ("updated", 3)
    assert ((root / RECORD).read_bytes(), versions(root)) == (A, [A, B])
    assert set(files(root)) == {RECORD, MANIFEST, V1, V2}


def test_a_version_name_that_holds_the_same_bytes_is_used_again(root: Path) -> None:
    export(root, A)
    os.link(root / RECORD, root / V1)
    export(root, B)
    assert versions(root) == [A]
    assert set(files(root)) == {RECORD, MANIFEST, V1}


def test_a_version_name_that_holds_other_bytes_is_left_alone(root: Path) -> None:
    export(root, A)
    (root / V1).write_bytes(b"somebody else's")
    export(root, B)
    assert (root / V1).read_bytes() == b"somebody else's"
    assert manifest(root)["versions"][0]["file"] == Path(V2).name
    assert versions(root) == [A]


def test_a_version_is_copied_where_the_system_refuses_to_link_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: str, *arguments: Any, **options: Any) -> None:
        if not source.startswith("."):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(source, *arguments, **options)

    export(root, A)
    monkeypatch.setattr(os, "link", link)
    export(root, B)
    assert ((root / RECORD).read_bytes(), versions(root)) == (B, [A])


# What is not ours


def test_an_identical_file_without_a_manifest_is_adopted(root: Path) -> None:
    (root / FOLDER).mkdir(parents=True)
    (root / RECORD).write_bytes(A)
    inode = (root / RECORD).stat().st_ino
    assert export(root, A).action == "created"
    assert (root / RECORD).stat().st_ino == inode
    assert manifest(root)["sha256"] == sha(A)


def conflict(root: Path, content: bytes, match: str, code: str = "conflict", **changes: Any) -> None:
    """Expect a refusal that changes nothing."""
    before = states(root)
    with pytest.raises(Permanent, match=match) as caught:
        export(root, content, **changes)
    assert caught.value.code == code
    assert states(root) == before


def test_a_different_file_without_a_manifest_is_a_conflict(root: Path) -> None:
    (root / FOLDER).mkdir(parents=True)
    (root / RECORD).write_bytes(B)
    conflict(root, A, "no manifest")
    assert archive(root).verify(context(root, A)) == Absent()


def test_another_sessions_manifest_is_a_conflict(root: Path) -> None:
    export(root, A)
    conflict(root, A, "belongs to session 'session-1'", session_identifier="session-2")
    with pytest.raises(Permanent, match="belongs to session") as caught:
        archive(root).verify(context(root, A, session_identifier="session-2"))
    assert caught.value.code == "conflict"


@pytest.mark.parametrize("content", [B, A])
def test_a_file_that_a_person_changed_is_left_alone(root: Path, content: bytes) -> None:
    export(root, A)
    (root / RECORD).write_bytes(b"<a>corrected by hand</a>")
    conflict(root, content, "changed after it had been archived", "changed_at_destination", sent_hashes={sha(A)})
    assert archive(root).verify(context(root, content)) == Partial(RECORD)


def test_a_file_that_a_person_removed_is_written_again(root: Path) -> None:
    export(root, A)
    (root / RECORD).unlink()
    assert archive(root).verify(context(root, A)) == Partial(RECORD)
    assert export(root, A).action == "created"
    assert ((root / RECORD).read_bytes(), versions(root)) == (A, [])


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 2}', b"\xff"])
def test_a_damaged_manifest_is_a_conflict_that_names_the_file(root: Path, damage: bytes) -> None:
    export(root, A)
    (root / MANIFEST).write_bytes(damage)
    conflict(root, A, f"{MANIFEST} is damaged")


@pytest.mark.parametrize("path", [RECORD, MANIFEST, FOLDER, "FEI-Titan-TEM"])
def test_symbolic_links_below_the_root_are_not_followed(root: Path, path: str) -> None:
    export(root, A)
    elsewhere = root.parent / "elsewhere"
    (root / path).rename(elsewhere)
    (root / path).symlink_to(elsewhere)
    before = states(elsewhere)
    conflict(root, B, r"is no (regular file|folder)")
    assert states(elsewhere) == before
    with pytest.raises(Permanent, match=r"is no (regular file|folder)"):
        archive(root).verify(context(root, A))


def test_a_symbolic_link_in_place_of_a_version_is_not_followed(root: Path) -> None:
    export(root, A)
    (root / V1).symlink_to(root / RECORD)
    conflict(root, B, "v1.xml is no regular file")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("path", [RECORD, MANIFEST])
def test_what_is_no_file_is_a_conflict(root: Path, path: str, make: Callable[[Path], None]) -> None:
    (root / FOLDER).mkdir(parents=True)
    make(root / path)
    conflict(root, A, "is no regular file")


def test_a_file_in_place_of_a_folder_is_a_conflict(root: Path) -> None:
    (root / "FEI-Titan-TEM").write_bytes(b"")
    conflict(root, A, "FEI-Titan-TEM is no folder")


def test_the_root_itself_may_be_a_symbolic_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert export(link, A).record_url == (link / RECORD).as_uri()
    assert set(files(root)) == {RECORD, MANIFEST}


def test_a_file_that_appears_in_between_is_not_overwritten(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            (root / RECORD).write_bytes(B)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(Transient):
            export(root, A)
    assert files(root) == {RECORD: B}
    conflict(root, A, "no manifest")


def test_a_copy_with_other_bytes_than_were_checked_is_not_archived(root: Path) -> None:
    with pytest.raises(Permanent) as caught:
        export(root, A, record_sha256=sha(B))
    assert caught.value.code == "record_changed"
    assert files(root) == {}


def test_a_copy_that_is_not_there_is_transient_and_not_the_archives_fault(root: Path) -> None:
    given = context(root, A)
    given.xml_file_path.unlink()
    with pytest.raises(Transient) as caught:
        archive(root).export(given)
    assert caught.value.code == "record_unreadable"


# Looking


def test_verify_tells_what_is_there(root: Path) -> None:
    here = archive(root)
    assert here.verify(context(root, A)) == Absent()
    export(root, A)
    assert here.verify(context(root, A)) == Present(RECORD, (root / RECORD).as_uri())
    assert here.verify(context(root, A, record_sha256="")) == Present(RECORD, (root / RECORD).as_uri())
    assert here.verify(context(root, B)) == Partial(RECORD)
    (root / MANIFEST).unlink()
    assert here.verify(context(root, A)) == Partial(RECORD)
    assert here.verify(context(root, B, sent_hashes=frozenset({sha(A)}))) == Partial(RECORD)


def test_verify_is_unsure_when_the_archive_cannot_be_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(root, A)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", failing(errno.EIO))
        assert archive(root).verify(context(root, A)) == Unsure(f"trouble at {root}: {os.strerror(errno.EIO)}")
    root.rename(root.parent / "unmounted")
    answer = archive(root).verify(context(root, A))
    assert isinstance(answer, Unsure)
    assert "mount it again" in answer.reason


# Settings


def test_the_folder_is_read_from_its_setting(root: Path) -> None:
    environment = Environment({"NX_LOCAL_ARCHIVE_PATH": Value(str(root), "test")})
    settings = environment.read(LocalArchive.Settings, "NX_LOCAL_ARCHIVE_")
    assert LocalArchive(settings).enabled
    nothing = LocalArchive(Environment({}).read(LocalArchive.Settings, "NX_LOCAL_ARCHIVE_"))
    assert not nothing.enabled
    ok, message = nothing.validate_config()
    assert not ok
    assert "NX_LOCAL_ARCHIVE_PATH is not set" in str(message)
    with pytest.raises(Misconfigured, match="NX_LOCAL_ARCHIVE_PATH"):
        nothing.export(context(root, A))


def test_a_missing_root_is_made_when_the_settings_are_checked_and_never_later(tmp_path: Path) -> None:
    root = tmp_path / "new" / "archive"
    with pytest.raises(Misconfigured, match="there is no folder"):
        export(root, A)
    here = archive(root)
    assert here.validate_config() == (True, None)
    assert files(root) == {}
    root.rename(tmp_path / "unmounted")
    ok, message = here.validate_config()
    assert not ok
    assert "mount it again" in str(message)
    assert not root.exists()


def test_a_root_that_is_a_file_or_below_one_is_reported(root: Path) -> None:
    (root / "file").write_bytes(b"")
    given = context(root, A)
    for path in (root / "file", root / "file" / "below"):
        ok, message = archive(path).validate_config()
        assert not ok
        assert "name a folder" in str(message)
        with pytest.raises(Misconfigured, match="there is no folder"):
            archive(path).export(given)


@pytest.mark.parametrize("call", ["open", "write", "link"])
def test_a_root_that_refuses_a_file_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(errno.EACCES))
        ok, message = archive(root).validate_config()
    assert not ok
    assert str(root) in str(message)
    assert "needs to write" in str(message)


# Trouble with the disk


def failing(number: int) -> Callable[..., Any]:
    """Stand in for a system call that fails."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "link", "rename"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, Misconfigured),
        (errno.EDQUOT, Misconfigured),
        (errno.EROFS, Misconfigured),
        (errno.EACCES, Misconfigured),
        (errno.EPERM, Misconfigured),
        (errno.EIO, Transient),
        (errno.ESTALE, Transient),
        (errno.ETIMEDOUT, Transient),
    ],
)
def test_trouble_with_the_disk_waits_and_leaves_the_old_state(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], call: str
) -> None:
    given = context(root, B)
    if call == "rename":  # the only call here that a first export does not make
        export(root, A)
    before = files(root)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(number))
        with pytest.raises(expected, match="disk full" if number in {errno.ENOSPC, errno.EDQUOT} else str(root)):
            archive(root).export(given)
    after = files(root)
    after.pop(V1, None)
    assert after == before
    assert export(root, B).success
    assert (root / RECORD).read_bytes() == B


def test_a_file_system_that_does_not_sync_folders_will_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert export(root, A).action == "created"


class SmallDisk:
    """A folder with room for ``free`` bytes: a small file system, or one that says so where none can be mounted."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._monkeypatch = monkeypatch
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(root)]
        self.mounted = (
            shutil.which("mount") is not None
            and not subprocess.run(command, check=False, capture_output=True).returncode
        )

    def fill(self, *, free: int) -> None:
        """Leave room for so many bytes only."""
        if not self.mounted:
            self._monkeypatch.setattr(os, "write", self._limited(os.write, free))
            return
        (self.root / "filler").write_bytes(bytes(64 * 1024 - free))

    def clear(self) -> None:
        """Make room."""
        self._monkeypatch.undo()
        (self.root / "filler").unlink(missing_ok=True)

    def end(self) -> None:
        """Give the disk back."""
        if self.mounted:
            subprocess.run(["umount", str(self.root)], check=True)

    @staticmethod
    def _limited(real: Callable[[int, Any], int], free: int) -> Callable[[int, Any], int]:
        left = free

        def write(descriptor: int, data: Any) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = real(descriptor, data[:left])
            left -= 4096 * -(-done // 4096)
            return done

        return write


@pytest.fixture
def small_disk(root: Path) -> Iterator[SmallDisk]:
    """Give a small disk; it has its own monkeypatch, which ends before the disk does."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = SmallDisk(root, monkeypatch)
        yield disk
    disk.end()


@pytest.mark.parametrize("free", [0, 4096, 8192], ids=["nothing fits", "a part fits", "the record fits"])
def test_a_full_disk_makes_the_work_wait_and_leaves_nothing_half_done(small_disk: SmallDisk, free: int) -> None:
    root, content = small_disk.root, b"<r>" + b"x" * 6000 + b"</r>"
    small_disk.fill(free=free)
    with pytest.raises(Misconfigured, match="disk full"):
        export(root, content)
    assert not list(root.rglob("*.part"))
    assert (root / RECORD).exists() == (free == 8192)
    if free == 0:
        ok, message = archive(root).validate_config()
        assert not ok
        assert "make room" in str(message)
    small_disk.clear()
    assert archive(root).validate_config() == (True, None)
    assert export(root, content).action == "created"
    assert set(files(root)) == {RECORD, MANIFEST}
    assert (root / RECORD).read_bytes() == content


# Several at once


def test_many_records_go_into_one_folder_at_the_same_time(root: Path) -> None:
    def work(number: int) -> list[str | None]:
        here = archive(root)
        contents = [f"<r>{number} {build}</r>".encode() for build in range(3)]
        wanted = [
            context(root, c, name=f"record-{number}.xml", session_identifier=f"session {number}") for c in contents
        ]
        return [here.export(item).action for item in wanted]

    with ThreadPoolExecutor(8) as pool:
        actions = list(pool.map(work, range(40)))
    assert actions == [["created", "updated", "updated"]] * 40
    folder = root / FOLDER
    assert {path.name for path in folder.iterdir()} == {
        f"record-{number}{end}" for number in range(40) for end in (".xml", ".json", ".v1.xml", ".v2.xml")
    }
    for number in range(40):
        assert (folder / f"record-{number}.xml").read_bytes() == f"<r>{number} 2</r>".encode()


def test_only_left_overs_of_the_same_record_are_removed(root: Path) -> None:
    export(root, A)
    folder = root / FOLDER
    own = folder / ".2026-11-24_titan.0123456789abcdef.part"
    others = [
        folder / ".2026-11-24_titan.0123456789abcdef.0123456789abcdef.part",
        folder / ".2026-11-24_titan-2.0123456789abcdef.part",
        folder / ".2026-11-24_titan.part",
    ]
    for path in (own, *others):
        path.write_bytes(b"half")
    export(root, B)
    assert not own.exists()
    assert all(path.exists() for path in others)


# Crashes

CHANGING = ("mkdir", "write", "fsync", "link", "rename", "unlink")


def watch(after: Callable[[str], None], patch: Callable[[object, str, Any], None]) -> None:
    """Have every system call that changes something reported when it has been made; writes are cut in two."""
    for name in CHANGING:
        patch(os, name, watched(name, getattr(os, name), after))


def watched(name: str, real: Callable[..., Any], after: Callable[[str], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if name == "write" and len(arguments[1]) > 8:
            arguments = (arguments[0], arguments[1][: len(arguments[1]) * 2 // 3])
        result = real(*arguments, **options)
        what = arguments[1] if name in {"link", "rename"} else ""
        if name == "fsync":
            what = "folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "file"
        after(f"{name} {what}".strip())
        return result

    return call


def steps(root: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[str]:
    """Return what an export does, in order, with repetitions left out."""
    seen: list[str] = []
    given = context(root, content)
    with monkeypatch.context() as patched:
        watch(seen.append, patched.setattr)
        archive(root).export(given)
    return [step for step, _group in itertools.groupby(seen)]


def test_the_record_is_durable_before_its_manifest_names_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, names, version = Path(RECORD).name, Path(MANIFEST).name, Path(V1).name
    write = ["write", "fsync file"]
    assert steps(root, monkeypatch, A) == [
        *("mkdir", "fsync folder"),
        *(*write, f"link {record}", "unlink", "fsync folder"),
        *(*write, f"link {names}", "unlink", "fsync folder"),
    ]
    assert steps(root, monkeypatch, B) == [
        *(f"link {version}", "fsync folder"),
        *(*write, f"rename {record}", "fsync folder"),
        *(*write, f"rename {names}", "fsync folder"),
    ]
    assert steps(root, monkeypatch, B) == ["fsync folder"]


def test_a_record_that_was_there_is_durable_before_a_manifest_names_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / FOLDER).mkdir(parents=True)
    (root / RECORD).write_bytes(A)
    assert steps(root, monkeypatch, A)[:4] == ["fsync folder", "fsync file", "fsync folder", "write"]


#: name -> contents exported before, and the changes of the export that is killed
SCENARIOS: dict[str, tuple[list[bytes], bytes, dict[str, Any]]] = {
    "first": ([], A, {}),
    "update": ([A], B, {}),
    "back": ([A, B], A, {}),
    "link": ([A], A, {"purpose": "link", "previous_results": CDCS}),
}


def kill_at_each_step(scenario: str, folder: Path) -> None:
    """Export in ``folder/1/archive``, killed after the first step, and so on, until one export survives."""
    earlier, content, changes = SCENARIOS[scenario]
    for number in itertools.count(1):
        root = folder / str(number) / "archive"
        root.mkdir(parents=True)
        for old in earlier:
            export(root, old)
        given = context(root, content, **changes)
        process = os.fork()
        if process == 0:
            watch(kill_after(number), setattr)
            archive(root).export(given)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            return


def kill_after(number: int) -> Callable[[str], None]:
    countdown = itertools.count(number - 1, -1)

    def after(_step: str) -> None:
        if next(countdown) == 0:
            os._exit(9)

    return after


@pytest.fixture(scope="module", params=SCENARIOS)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """Give a scenario and the archives that its killed exports left; the last one was not killed."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, __file__, request.param, str(folder)], check=True, timeout=60)
    roots = [folder / str(number) / "archive" for number in range(1, len(list(folder.iterdir())) + 1)]
    assert len(roots) > 5
    return request.param, roots


@pytest.fixture
def left(killed: tuple[str, list[Path]], tmp_path: Path) -> tuple[str, list[Path]]:
    """Give copies, so that each test finds what the killed process left."""
    scenario, roots = killed
    copies = [tmp_path / root.parent.name / "archive" for root in roots]
    for root, copy in zip(roots, copies, strict=True):
        shutil.copytree(root, copy)
    return scenario, copies


def test_a_killed_export_leaves_the_old_or_the_new_state(left: tuple[str, list[Path]]) -> None:
    scenario, roots = left
    earlier, content, changes = SCENARIOS[scenario]
    old = earlier[-1] if earlier else None
    left_overs = 0
    for root in roots:
        found = files(root)
        left_overs += any(name.endswith(".part") for name in found)
        record = found.get(RECORD)
        assert record in {old, content}
        named = manifest(root)["sha256"] if MANIFEST in found else None
        assert named in {sha(old) if old else None, sha(content)}
        complete = record == content and named == sha(content)
        answer = archive(root).verify(context(root, content, **changes))
        assert isinstance(answer, Present) == complete
        assert isinstance(answer, Absent) == (record is None)
        if record == old and old != content:
            assert named == (sha(old) if old else None)
    assert left_overs  # else no process was killed in the middle of its work


def test_the_next_export_completes_a_killed_one(left: tuple[str, list[Path]]) -> None:
    scenario, roots = left
    earlier, content, changes = SCENARIOS[scenario]
    for root in roots:
        result = export(root, content, **changes)
        assert result.success
        assert archive(root).verify(context(root, content)) == Present(RECORD, result.record_url)
        assert (root / RECORD).read_bytes() == content
        assert manifest(root)["sha256"] == sha(content)
        assert versions(root) == [old for old in earlier if scenario != "link"]
        assert set(files(root)) == {RECORD, MANIFEST, *[V1, V2][: len(versions(root))]}
        assert manifest(root)["links"] == ({"cdcs": "https://cdcs.test/1"} if scenario == "link" else {})


@pytest.mark.parametrize("newer", [C, A], ids=["new content", "first content"])
def test_a_newer_build_after_a_killed_export_keeps_what_was_there(left: tuple[str, list[Path]], newer: bytes) -> None:
    scenario, roots = left
    earlier, content, _changes = SCENARIOS[scenario]
    for root in roots:
        replaced = (root / RECORD).exists() and (root / RECORD).read_bytes() == content
        export(root, newer, sent_hashes=frozenset(map(sha, [*earlier, content])))
        history = [*earlier, content] if replaced and content not in earlier[-1:] else earlier
        assert (root / RECORD).read_bytes() == newer
        assert versions(root) == (history[:-1] if history[-1:] == [newer] else history)
        orphans = set(files(root)) - {RECORD, MANIFEST, *[V1, V2, V3][: len(versions(root))]}
        assert all(files(root)[name] == newer for name in orphans)  # a version name given to what is current again


if __name__ == "__main__":
    kill_at_each_step(sys.argv[1], Path(sys.argv[2]))
