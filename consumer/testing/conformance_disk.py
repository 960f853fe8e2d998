"""The proof of a destination of files: each disk fault once, then recovery, then one copy and nothing else."""

import asyncio
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from consumer.testing.conformance import Report
from consumer.testing.conformance_cases import Done
from consumer.testing.conformance_play import Attempt, Journey, Problem
from consumer.testing.conformance_subject import Record, Subject, make_record
from consumer.testing.conformance_watch import Secrets, case_name
from consumer.testing.disk_faults import DISK_FAULTS, KILLED, DiskFault
from consumer.testing.faults import Seen

CHILD_SECONDS = 60.0
_AT_ONCE = 4
_OTHER = b"<Other>of somebody else</Other>\n"


async def prove_on_disk(subject: Subject) -> Report:
    """Run every disk fault; the subject's setting names a folder, and each case gets one of its own."""
    secrets = Secrets(subject.secrets)
    names = tuple(fault.name for fault in DISK_FAULTS)
    wanted = subject.options.only or names
    folder = await asyncio.to_thread(_open_to_all)
    try:
        with secrets.watched_logs():
            faults = [fault for fault in DISK_FAULTS if fault.name in wanted]
            gate = asyncio.Semaphore(_AT_ONCE)
            cases = await asyncio.gather(*(_case(subject, fault, folder, secrets, gate) for fault in faults))
    finally:
        shutil.rmtree(folder)
    return Report(subject.name, tuple(wanted), tuple(cases), (), subject.registered.can_verify)


def _open_to_all() -> Path:
    """Make a folder that every user may look into, since one case goes on as a user without rights."""
    folder = Path(tempfile.mkdtemp(prefix="nexus-conformance-"))
    folder.chmod(0o755)
    return folder


async def _case(subject: Subject, fault: DiskFault, folder: Path, secrets: Secrets, gate: asyncio.Semaphore) -> Done:
    async with gate:
        return await _one_case(subject, fault, folder, secrets)


async def _one_case(subject: Subject, fault: DiskFault, folder: Path, secrets: Secrets) -> Done:
    done = Done(fault.name, fault.name)
    case_name.set(fault.name)
    here = folder / fault.name
    root, model = here / "root", here / "model"
    for path in (here, root, model):
        path.mkdir(mode=0o755)
    record = make_record(here, subject.options.record)
    target, tree = await _model(subject, record, model)
    if target is None:
        done.problems.append(Problem("kit", "an export without faults made no file with the record's bytes"))
        return done
    obstacle = _Obstacle(fault.name, here, root, root / target)
    obstacle.put()
    journey = Journey(subject, record, str(root), done.problems)
    try:
        told = await _in_child(fault, subject, record, root)
        attempt = await _judge(fault, told, done, journey)
        obstacle.check(done)
        obstacle.take_away()
        await journey.finish(attempt)
    finally:
        await journey.close()
    _compare(done, root, tree)
    if secrets.within(*journey.said, done.message) or fault.name in secrets.leaks:
        done.problems.append(Problem("secret", "a secret is in an error, a result or a log line"))
    return done


async def _model(subject: Subject, record: Record, model: Path) -> tuple[Path | None, dict[str, str]]:
    """Export without faults; return where the record's file lies, and all files there are then."""
    journey = Journey(subject, record, str(model))
    try:
        await journey.export()
    finally:
        await journey.close()
    tree = _files(model)
    found = [Path(name) for name, sha256 in tree.items() if sha256 == record.sha256]
    return (found[0] if found else None), tree


def _files(root: Path) -> dict[str, str]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _compare(done: Done, root: Path, tree: dict[str, str]) -> None:
    """Compare the archive with one that saw no fault: each file once, and nothing left over."""
    found = _files(root)
    records = [name for name in found if found[name] in tree.values()]
    done.copies = len(records) and sum(found[name] == found[records[0]] for name in records)
    for name in sorted(tree.keys() - found.keys()):
        done.problems.append(Problem("loss", f"{name} is not there"))
    for name in sorted(found.keys() - tree.keys()):
        kind = "duplicate" if found[name] in tree.values() else "loss"
        done.problems.append(Problem(kind, f"{name} is left over"))
    for name in sorted(tree.keys() & found.keys()):
        if tree[name] != found[name]:
            done.problems.append(Problem("loss", f"{name} has other bytes"))


async def _judge(fault: DiskFault, told: dict[str, Any], done: Done, journey: Journey) -> Attempt:
    """Judge how the attempt ended."""
    done.seconds = round(told.get("seconds", 0.0), 3)
    done.ending, done.message = told["seen"], told.get("message", "")
    journey.kept.update(told.get("kept", {}))
    if not told["struck"]:
        done.problems.append(Problem("kit", "the fault struck nothing: the destination makes no such call of os"))
    if done.ending not in fault.endings:
        right = " or ".join(sorted(fault.endings))
        done.problems.append(Problem("class", f"{done.message or done.ending}; {right} would be right"))
    if done.seconds > journey.subject.options.limit_seconds + 1:
        done.problems.append(Problem("time", f"took {done.seconds:.1f} s"))
    if done.ending == KILLED:
        return await journey.cut()
    return Attempt(Seen(done.ending), done.message, done.seconds)


async def _in_child(fault: DiskFault, subject: Subject, record: Record, root: Path) -> dict[str, Any]:
    """Export in a process of its own, under the fault, and return what it tells."""
    job = {
        "spec": _spec(subject),
        "settings": subject.settings_of(str(root)),
        "setting": subject.url_setting,
        "limit_seconds": subject.options.limit_seconds,
        "record": {name: str(value) for name, value in asdict(record).items() if value},
        "root": str(root),
        "fault": fault.name,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-B", "-m", "consumer.testing.disk_faults",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CHILD_SECONDS):
            output, errors = await process.communicate(json.dumps(job).encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        return {"seen": "nothing", "message": f"the attempt did not end within {CHILD_SECONDS:g} s", "struck": True}
    if process.returncode == 0:
        return dict(json.loads(output))
    if output or errors:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return {"seen": "nothing", "message": f"the process ended with {process.returncode}: {last}", "struck": True}
    return {"seen": KILLED, "struck": True}


def _spec(subject: Subject) -> str:
    found = type(subject.registered.plugin)
    if found.__module__.startswith("nexus_export_plugins."):  # a file, which has no name to import it by
        return f"{inspect.getsourcefile(found)}:{found.__name__}"
    return f"{found.__module__}:{found.__name__}"


class _Obstacle:
    """What a case puts into the way of the file, and takes away again."""

    def __init__(self, fault: str, here: Path, root: Path, target: Path) -> None:
        self._fault = fault
        self._root = root
        self._target = target
        self._outside = here / "outside.xml"

    def put(self) -> None:
        """Put it there."""
        if self._fault.startswith("target_") or self._fault == "other_bytes":
            self._target.parent.mkdir(parents=True, exist_ok=True)
        if self._fault == "target_is_folder":
            (self._target / "full").mkdir(parents=True)
        elif self._fault == "target_is_link":
            self._outside.write_bytes(_OTHER)
            self._target.symlink_to(self._outside)
        elif self._fault == "other_bytes":
            self._target.write_bytes(_OTHER)
        elif self._fault == "folder_missing":
            self._root.rmdir()
        elif self._fault == "no_permission" and os.geteuid() != 0:
            self._root.chmod(0o555)

    def check(self, done: Done) -> None:
        """See that nothing was written over, nor made where nothing should be."""
        untouched: Callable[[], bool] | None = {
            "target_is_folder": (self._target / "full").is_dir,
            "target_is_link": lambda: self._target.is_symlink() and self._outside.read_bytes() == _OTHER,
            "other_bytes": lambda: self._target.read_bytes() == _OTHER,
            "folder_missing": lambda: not self._root.exists(),
        }.get(self._fault)
        if untouched is not None and not untouched():
            done.problems.append(Problem("loss", "what lay in the way was written over, or the folder made anew"))

    def take_away(self) -> None:
        """Do what a person would do: make room."""
        if self._fault == "target_is_folder":
            shutil.rmtree(self._target)
        elif self._fault in {"target_is_link", "other_bytes"}:
            self._target.unlink()
        elif self._fault == "folder_missing":
            self._root.mkdir(exist_ok=True)
        elif self._fault == "no_permission":
            self._root.chmod(0o755)
