"""RabbitMQ 4 beside the RabbitMQ 3.10 of Debian 12: Debian 13 in a folder, and the integration tests against it.

`python -m tools.servers.debian13` makes the folder when it is not there, and runs the tests. Nothing of it is
installed on the machine; the folder is `.services/debian13`, and removing it undoes everything. Only root can make
and enter it. Other servers of the tests stay those of the machine.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tools.servers.process import ServerError, clean_environment

PROJECT = Path(__file__).resolve().parents[2]
HOME = PROJECT / ".services" / "debian13"
RELEASE = "trixie"
MAKE_SECONDS = 900
#: Most tests wait for servers; each process starts its own.
PROCESSES = "3"
ENVIRONMENT = "NEXUS_TEST_RABBITMQ_ROOT"


def make_root(folder: Path = HOME) -> Path:
    """Return a root folder with Debian 13 and its rabbitmq-server; it is made whole or not at all."""
    if os.geteuid() != 0:
        raise ServerError("RabbitMQ 4 runs in a root folder of its own here, which only root can make and enter")
    if not folder.is_dir():
        if shutil.which("debootstrap") is None:
            raise ServerError("debootstrap is not installed; run `sh tools/packages.sh debootstrap`")
        fresh = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        _bootstrap(fresh)
        (fresh / "etc" / "hosts").write_text("127.0.0.1 localhost\n", encoding="ascii")
        fresh.rename(folder)
    return folder


def _bootstrap(fresh: Path) -> None:
    log = fresh.with_name(f"{fresh.name}.log")
    print(f"Making Debian 13 with RabbitMQ in {fresh.parent}, about a minute and 400 MB ...", flush=True)
    # what it mounts on the way is seen by itself alone
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", "--include=rabbitmq-server"]
    command += [RELEASE, str(fresh), mirror()]
    with log.open("wb") as output:
        done = subprocess.run(
            command,
            env=clean_environment(DEBIAN_FRONTEND="noninteractive"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=MAKE_SECONDS,
            check=False,
        )
    if done.returncode:
        raise ServerError(f"debootstrap ended with {done.returncode}; all that it said is in {log}")
    log.unlink()


def mirror() -> str:
    """Return the mirror that this machine takes its own Debian packages from."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    command = ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        release, component, address = line.split(" ", 2)
        if (release, component) == (codename, "main"):
            return address
    raise ServerError(f"apt names no mirror of Debian {codename or '(this is no Debian)'}: {done.stderr.strip()}")


def version(root: Path) -> str:
    """Return the version of the rabbitmq-server in a root folder."""
    command = ["chroot", str(root), "dpkg-query", "--show", "--showformat", "${Version}", "rabbitmq-server"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"there is no rabbitmq-server in {root} ({done.stderr.strip()}); remove it and try again")
    return done.stdout


def main() -> int:
    """Run the integration tests, or those that are named, against the node of Debian 13."""
    try:
        root = make_root()
        print(f"RabbitMQ {version(root)} of {root.relative_to(PROJECT)}", flush=True)
    except (ServerError, OSError, subprocess.SubprocessError) as error:
        print(f"debian13: {error}", file=sys.stderr)
        return 2
    tests = sys.argv[1:] or ["tests/integration"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", PROCESSES, "--dist", "loadfile", *tests]
    return subprocess.run(command, cwd=PROJECT, env={**os.environ, ENVIRONMENT: str(root)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
