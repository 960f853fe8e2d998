"""The proof behind `make mutants`: each guarantee is taken out of the code once, and its test has to notice.

``tests/mutations/*.patch`` are unified diffs against ``consumer/``; the first line of each names the test that must
turn red (``# test: tests/...::name``). All happens in a copy of the project. In the copy this module is also a
pytest plugin: it tells how the test ended, and whether it ran the code that was changed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
MUTATIONS = PROJECT / "tests" / "mutations"
TEST_SECONDS = 120.0
ALL_TESTS_SECONDS = 900.0

_MARK = "# test: "
_REPORT = "NEXUS_MUTANTS_REPORT"
_CHANGED = "NEXUS_MUTANTS_CHANGED"


class MutantError(Exception):
    """A patch or its test is at fault; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One guarantee taken out: the diff, the test that must notice, and the files that the diff changes."""

    name: str
    diff: str
    test: str
    files: tuple[str, ...]


def read_mutant(path: Path) -> Mutant:
    """Read a patch; raises ``MutantError`` when it names no test or changes something else than ``consumer/``."""
    text = path.read_text(encoding="utf-8")
    first = text.partition("\n")[0]
    if not first.startswith(_MARK) or "::" not in first:
        raise MutantError(f"{path.name}: the first line must be `{_MARK}tests/...::name`")
    files = tuple(line.split()[1].removeprefix("b/") for line in text.splitlines() if line.startswith("+++ "))
    if not files or not all(name.startswith("consumer/") and name.endswith(".py") for name in files):
        raise MutantError(f"{path.name}: a mutant changes Python files of consumer/, this one {files or 'nothing'}")
    return Mutant(path.stem, text, first.removeprefix(_MARK).strip(), files)


def read_mutants(wanted: Sequence[str]) -> list[Mutant]:
    """Read all patches, or those whose name holds one of the given words."""
    found = [read_mutant(path) for path in sorted(MUTATIONS.glob("*.patch"))]
    chosen = [item for item in found if not wanted or any(word in item.name for word in wanted)]
    if not chosen:
        raise MutantError(f"no patch of {MUTATIONS.relative_to(PROJECT)} is meant by {' '.join(wanted) or 'that'}")
    return chosen


# --- the copy ------------------------------------------------------------------------------------------------------


@contextmanager
def copy_of_project() -> Iterator[Path]:
    """Give a copy of every file that git knows or would add, as it lies here now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, check=False)
    if done.returncode:
        raise MutantError(f"git cannot list the files of the project: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="nexus-mutants-") as name:
        copy = Path(name) / "project"
        for file in filter(None, done.stdout.decode().split("\0")):
            if (PROJECT / file).is_file():  # not one that is deleted and still in the index
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / file, copy / file)
        yield copy


@contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[None]:
    """Change the copy for a while. Raises ``MutantError`` when the code has moved away from under the patch."""
    before = {name: (copy / name).read_bytes() for name in mutant.files if (copy / name).is_file()}
    command = ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "--reject-file=-"]
    try:
        done = subprocess.run(command, cwd=copy, input=mutant.diff, capture_output=True, text=True, check=False)
        if done.returncode:
            said = "\n".join(line for line in done.stdout.splitlines() if line.strip())
            raise MutantError(f"does not apply any more, write the patch anew:\n{said}{done.stderr}")
        for name in mutant.files:
            check_python(copy / name)
        yield
    finally:
        for name, content in before.items():
            (copy / name).write_bytes(content)


def check_python(path: Path) -> None:
    """Refuse a mutant that only breaks the file: any test would notice that."""
    try:
        compile(path.read_bytes(), path.name, "exec")
    except SyntaxError as error:
        raise MutantError(f"leaves {path.name} that is no Python: {error}") from None


# --- running tests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ran:
    """How pytest ended, in which phases tests failed, and where each changed module came from."""

    code: int
    failed: tuple[str, ...]
    modules: dict[str, str | None]
    output: str


def run_tests(copy: Path, tests: Sequence[str], seconds: float, changed: Sequence[str] = ()) -> Ran:
    """Run tests in the copy with the project's own Python. Raises ``MutantError`` when they do not end."""
    report = copy.parent / "report.json"
    report.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NX_", "PYTEST_", "COVERAGE_"))}
    environment = {
        **kept,
        # before the path file of the virtual environment, which leads to the project itself
        "PYTHONPATH": str(copy),
        # two changes of one length within a second would look alike to the cache
        "PYTHONDONTWRITEBYTECODE": "1",
        _REPORT: str(report),
        _CHANGED: json.dumps(list(changed)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.mutants", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise MutantError(f"its test does not end within {seconds:g} s") from None
    output = done.stdout + done.stderr
    if not report.exists():
        raise MutantError(f"pytest ended with {done.returncode} before any test:\n{output}")
    found = json.loads(report.read_text(encoding="utf-8"))
    return Ran(done.returncode, tuple(found["failed"]), found["modules"], output)


def what_noticed(mutant: Mutant, copy: Path) -> str | None:
    """Return what the test of a mutant says when it turns red, None when it stays green.

    Raises ``MutantError`` where a red test would prove nothing.
    """
    with applied(mutant, copy):
        ran = run_tests(copy, [mutant.test], TEST_SECONDS, mutant.files)
    if ran.code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        raise MutantError(f"pytest ended with {ran.code}, which is no failed test:\n{ran.output}")
    for file, origin in ran.modules.items():
        # None: only a service that the test starts imports it, from the copy that PYTHONPATH names
        if origin not in {None, str(copy / file)}:
            raise MutantError(f"its test runs {origin} in place of the changed {file}")
    if set(ran.failed) - {"call"}:
        raise MutantError(f"its test fails outside of its own lines:\n{ran.output}")
    if ran.code == pytest.ExitCode.OK:
        return None
    said = [line.removeprefix("E ").strip() for line in ran.output.splitlines() if line.startswith("E ")]
    return next(filter(None, said), "a failure without a word")


def check_unchanged(mutants: Sequence[Mutant], copy: Path) -> None:
    """Demand that every test that is named is green before anything is changed."""
    tests = sorted({item.test for item in mutants})
    print(f"{len(tests)} tests without any change ...", flush=True)
    ran = run_tests(copy, tests, ALL_TESTS_SECONDS)
    if ran.code:
        raise MutantError(f"the tests are not green without a change:\n{ran.output}")


def try_mutants(mutants: Sequence[Mutant], copy: Path) -> int:
    """Try each mutant alone, print what became of it, and return how many were killed."""
    killed = 0
    for item in mutants:
        started = time.monotonic()
        try:
            said = what_noticed(item, copy)
            dead, word = said is not None, f"killed: {said[:60]}" if said else "SURVIVED"
        except MutantError as error:
            dead, word = False, f"ERROR: {error}"
        killed += dead
        print(f"  {item.name:<34} {time.monotonic() - started:4.1f} s  {word}", flush=True)
        if not dead:
            print(f"    {item.test}", flush=True)
    return killed


# --- inside of pytest ----------------------------------------------------------------------------------------------

_failed: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note in which phase a test failed."""
    if report.failed:
        _failed.append(report.when or "")


def pytest_sessionfinish() -> None:
    """Tell what failed, and which file each changed module was loaded from."""
    modules: dict[str, str | None] = {}
    for file in json.loads(os.environ[_CHANGED]):
        loaded = sys.modules.get(file.removesuffix(".py").replace("/", "."))
        modules[file] = loaded.__file__ if loaded else None
    Path(os.environ[_REPORT]).write_text(json.dumps({"failed": _failed, "modules": modules}), encoding="utf-8")


def main() -> int:
    """Run all mutants, or those that are named, to the exit code."""
    parser = argparse.ArgumentParser(prog="mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="*", help="only mutants whose name holds one of these words")
    wanted = parser.parse_args().name
    try:
        mutants = read_mutants(wanted)
        with copy_of_project() as copy:
            check_unchanged(mutants, copy)
            killed = try_mutants(mutants, copy)
    except MutantError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 1
    print(f"mutants: {killed}/{len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
