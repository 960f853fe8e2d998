"""The demonstration works from an empty clone, keeps out of the caller's settings, and leaves nothing running."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tools.servers.process import clean_environment, wait_for

PROJECT = Path(__file__).parents[2]
HOSTILE = {
    "NX_AMQP_URL": "amqp://nobody:wrong@127.0.0.1:1/",
    "NX_CDCS_URL": "http://127.0.0.1:9/",
    "NX_CDCS_TOKEN": "f" * 40,
    "NX_DATA_PATH": "/nonexistent",
    "NX_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    "NX_EXPORT_STRATEGY": "nonsense",
}
SECONDS = 40


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a copy of what git would clone, with a .env that must not be read."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, target)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in HOSTILE.items()), encoding="utf-8")
    yield folder
    shutil.rmtree(folder)


def start(clone: Path) -> subprocess.Popen[str]:
    """Start the demonstration without a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "tools.demo"],
        cwd=clone,
        # no container engine: these tests know the broker by its processes
        env=clean_environment(**HOSTILE, HOME=str(clone), PYTHONPATH=str(clone), DOCKER_HOST="unix:///nonexistent"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_running(clone: Path) -> list[str]:
    """Return the processes that work in the folder or were told of it; epmd belongs to the machine."""
    found = []
    for process in psutil.process_iter():
        try:
            command, folder, name = " ".join(process.cmdline()), process.cwd(), process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if (str(clone) in command or Path(folder).is_relative_to(clone)) and name != "epmd":
            found.append(f"{process.pid} {command}")
    return found


def archived(clone: Path) -> list[Path]:
    """Return the records in the archive; each has a manifest with its size."""
    files = sorted((clone / ".demo" / "archive").rglob("*.xml"))
    for file in files:
        assert json.loads(file.with_suffix(".json").read_bytes())["size"] == file.stat().st_size
    return files


def run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that the demonstration printed, as it was printed."""
    return subprocess.run(
        arguments, cwd=clone, env=clean_environment(**HOSTILE), capture_output=True, text=True, check=False
    )


def test_it_exports_five_new_records_each_time_and_is_quick(clone: Path) -> None:
    first = start(clone)
    shown, _ = first.communicate(timeout=SECONDS)
    assert first.returncode == 0, shown
    assert len(archived(clone)) == 5
    assert left_running(clone) == []

    began = time.monotonic()
    second = start(clone)
    shown, _ = second.communicate(timeout=SECONDS)
    seconds = time.monotonic() - began
    assert second.returncode == 0, shown
    assert len(archived(clone)) == 10
    assert left_running(clone) == []
    told = re.search(r"Broker ready after ([\d.]+) s, the 5 outcomes ([\d.]+) s later, ([\d.]+) s in all\.", shown)
    assert told, shown
    assert float(told[2]) < 3
    assert float(told[3]) <= seconds < 20

    assert shown.count("exported: session ") == 5
    for path in re.findall(r"^  (?:record|manifest) +(\S+)", shown, re.MULTILINE):
        assert (clone / path).is_file()
    commands = re.findall(r"^  (\.demo/nexus-export .*)$", shown, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["export", "destinations", "config"]
    for command in commands:
        done = run(clone, *command.split())
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(archived(clone)) == 11


def test_it_refuses_to_run_beside_a_file_that_its_consumer_would_read(clone: Path) -> None:
    forbidden = clone / ".demo" / ".env"
    forbidden.parent.mkdir(exist_ok=True)
    forbidden.write_text("NX_CDCS_URL=http://127.0.0.1:9/\n", encoding="utf-8")
    try:
        demo = start(clone)
        shown, _ = demo.communicate(timeout=SECONDS)
    finally:
        forbidden.unlink()
    assert demo.returncode == 1
    assert "move it away" in shown.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(signal.SIGINT, "private RabbitMQ node", id="Ctrl-C while the broker starts"),
        pytest.param(signal.SIGINT, "publishing", id="Ctrl-C while records move"),
        pytest.param(signal.SIGTERM, "publishing", id="SIGTERM while records move"),
    ],
)
def test_a_signal_stops_all_that_was_started(clone: Path, number: signal.Signals, moment: str) -> None:
    demo = start(clone)
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if moment in line:
            break
    wait_for(lambda: len(left_running(clone)) > 1, 5, "anything that was started")
    os.kill(demo.pid, number)
    shown, _ = demo.communicate(timeout=SECONDS)
    assert demo.returncode == 128 + number, "".join(lines) + shown
    assert left_running(clone) == []


def test_it_works_again_after_being_killed(clone: Path) -> None:
    demo = start(clone)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "publishing" in line:
            break
    demo.kill()
    demo.communicate(timeout=SECONDS)
    # what it started notices that it is gone
    wait_for(lambda: left_running(clone) == [], 15, "the end of what a killed demonstration had started")
    again = start(clone)
    shown, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, shown
    assert left_running(clone) == []
