"""What the integration tests share."""

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.virtual import World, make_template

PROJECT = Path(__file__).parents[2]
REQUIREMENTS = PROJECT / "tests" / "nexuslims-requirements.txt"


@pytest.fixture(scope="session")
def nexus_schema() -> Path:
    """Give the XSD of experiment records, out of the pinned NexusLIMS package.

    The package lies in a folder of its own and is kept between runs. Its schema is read, nothing imports it.
    """
    package = PROJECT / ".services" / "nexuslims"
    if not is_installed(package):
        install(package)
    return package / "nexusLIMS" / "schemas" / "nexus-experiment.xsd"


def is_installed(package: Path) -> bool:
    """Tell whether the folder holds what the requirements file pins now."""
    installed_from = package / REQUIREMENTS.name
    return installed_from.exists() and installed_from.read_bytes() == REQUIREMENTS.read_bytes()


def install(package: Path) -> None:
    """Install what the requirements file pins, whole or not at all: a test run may be cut at any moment."""
    package.parent.mkdir(exist_ok=True)
    lock = package.with_suffix(".lock").open("w")
    with lock, tempfile.TemporaryDirectory(dir=package.parent, prefix="nexuslims-") as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs side by side
        if is_installed(package):
            return
        fresh = Path(temporary) / "package"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-compile", "--require-hashes", "--only-binary", ":all:"]
        command += ["--target", str(fresh), "--requirement", str(REQUIREMENTS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"pip could not install {REQUIREMENTS.name}:\n{done.stderr}", pytrace=False)
        shutil.copy(REQUIREMENTS, fresh)
        shutil.rmtree(package, ignore_errors=True)
        fresh.rename(package)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an SQLite file with all tables."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    make_template(path)
    return path


@pytest.fixture
def world(template: Path, tmp_path: Path) -> Iterator[World]:
    """Give a consumer and its servers."""
    found = World(tmp_path, template)
    yield found
    found.close()
