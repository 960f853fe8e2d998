"""The conformance kit: the documented way ends in a proof, and bad destinations are caught by a fault's name."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from consumer.commands.new_destination import files_of
from consumer.config import Environment, Value
from consumer.destinations.cdcs import Cdcs
from consumer.destinations.local_archive import LocalArchive
from consumer.testing.conformance import Report, prove
from consumer.testing.conformance_disk import prove_on_disk
from consumer.testing.conformance_subject import Options, Subject, count_by_url, resolve
from tools.servers.cdcs import CdcsServer
from tools.servers.ports import free_port, is_free
from tools.servers.process import Child, clean_environment, wait_for

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "write-a-destination.md"
TOKEN = "a-secret-token"
QUICK = Options(limit_seconds=1.5, settle_seconds=0.6, parallel=16, moments=2)

#: Sends again what got no answer, has nothing to be asked with, and follows redirects with its token.
BLIND = f"""
import httpx
from pydantic import BaseModel, SecretStr
from nexus_export import ExportResult, Transient

class Blind:
    name, priority, enabled = "blind", 50, True

    class Settings(BaseModel):
        url: str
        token: SecretStr = SecretStr("{TOKEN}")

    def __init__(self, settings):
        self.url, self.token = settings.url, settings.token.get_secret_value()

    def validate_config(self):
        return True, None

    async def export(self, context):
        headers = {{"Authorization": f"Token {{self.token}}", "X-Token": self.token}}
        body = {{"key": context.record_key, "title": "t", "content": context.xml_file_path.read_text()}}
        async with httpx.AsyncClient(headers=headers, follow_redirects=True, timeout=1) as client:
            for _ in range(3):
                try:
                    answer = await client.post(f"{{self.url}}items", json=body)
                    if answer.is_success:
                        return ExportResult(True, self.name, str(answer.json().get("id")))
                except httpx.HTTPError:
                    pass
        raise Transient(f"no answer for {{self.token}}")
"""


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Give a folder with the example, and the address of its server."""
    for name, text in files_of("shelf").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    port = free_port()
    command = [sys.executable, "shelf_server.py", str(port)]
    server = Child(command, env=clean_environment(), log=tmp_path / "log", cwd=tmp_path)
    wait_for(lambda: not is_free(port), 10, "the shelf's server", tmp_path / "log")
    yield tmp_path, f"http://127.0.0.1:{port}/"
    server.kill()


def subject_of(folder: Path, url: str, source: str, name: str, *faults: str) -> Subject:
    """Return a destination of this source, in front of the example's server."""
    path = folder / f"{name.lower()}_plugin.py"
    path.write_text(source, encoding="utf-8")
    values = {f"NX_{name.upper()}_URL": url, f"NX_{name.upper()}_TOKEN": TOKEN}
    environment = Environment({key: Value(text, "test") for key, text in values.items()})
    options = replace(QUICK, only=faults)
    count = count_by_url(f"{url}count?key={{key}}")
    return Subject(resolve(f"{path}:{name}", environment), environment, options, count=count)


def kinds(report: Report, fault: str) -> set[str]:
    """Return the kinds of problems that a fault brought to light."""
    return {problem.kind for case in report.cases if case.fault == fault for problem in case.problems}


def changed(old: str, new: str) -> str:
    """Return the example with one thing done wrongly."""
    source = files_of("shelf")["shelf.py"]
    assert source.count(old) == 1
    return source.replace(old, new)


def test_the_page_leads_from_an_empty_folder_to_a_passing_kit(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    begin, prove_it = (block.strip() for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    (source,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len((begin + "\n" + prove_it + "\n" + source).splitlines()) <= 60
    script = f"set -e\n{begin}\n{prove_it} --fault lost_after_commit\npython -m pytest -q test_shelf.py\n"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**clean_environment(PYTHONPATH=str(PROJECT), HOME=str(tmp_path)), "PATH": path}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conformance: shelf 1/1, 0 duplicates, 0 losses" in done.stdout
    assert "1 passed" in done.stdout


async def test_a_blind_repetition_a_followed_redirect_and_a_told_token_are_caught(shelf: tuple[Path, str]) -> None:
    faults = (
        "lost_after_commit",
        "error_500_after_commit",
        "redirect_other_host",
        "connection_refused",
        "late_commit",
    )
    report = await prove(subject_of(*shelf, BLIND, "Blind", *faults))
    assert not report.good
    assert report.passed == ()
    assert "duplicate" in kinds(report, "lost_after_commit")
    assert "duplicate" in kinds(report, "error_500_after_commit")
    assert "duplicate" in kinds(report, "late_commit")
    assert "secret" in kinds(report, "redirect_other_host")
    assert "secret" in kinds(report, "connection_refused")
    assert {name for name, earned in report.grades.items() if not earned} >= {
        "idempotent",
        "verifiable",
        "secret-clean",
    }


async def test_a_look_up_that_takes_any_answer_for_nothing_there_is_caught(shelf: tuple[Path, str]) -> None:
    source = changed(
        "        items = await self.find(context.record_key)\n        ours",
        "        try:\n            items = await self.find(context.record_key)\n"
        "        except nx.NexusExportError:\n            items = []\n        ours",
    )
    report = await prove(subject_of(*shelf, source, "Shelf", "empty_body", "forbidden_403", "connection_refused"))
    assert report.passed == ()
    assert {case.ending for case in report.cases if "look-up" in case.name} == {"Absent"}
    assert all(kinds(report, fault) == {"class"} for fault in report.faults)


async def test_a_create_that_says_later_after_the_server_may_have_done_it_is_caught(shelf: tuple[Path, str]) -> None:
    source = changed("self.http.request(method, path, creates=creates,", "self.http.request(method, path,")
    source = source.replace(
        "        for number, digest in (await self.find(context.record_key))[:1]:",
        "        for number, digest in ():",
    )
    report = await prove(subject_of(*shelf, source, "Shelf", "cut_in_body", "error_500_after_commit", "rate_limited"))
    assert report.passed == ()
    assert kinds(report, "rate_limited") == {"duplicate"}  # only where the answer before it was lost
    assert kinds(report, "error_500_after_commit") == {"class", "duplicate"}


async def test_an_attempt_that_nothing_can_end_is_caught(shelf: tuple[Path, str]) -> None:
    source = changed(
        "        answer = await self.ask(method, path, json=body, creates=True)\n",
        "        try:\n            answer = await self.ask(method, path, json=body, creates=True)\n"
        "        except BaseException:\n"
        "            __import__('time').sleep(2 * (method == 'POST'))\n"
        "            raise\n",
    )
    subject = subject_of(*shelf, source, "Shelf", "black_hole")
    subject.options = replace(QUICK, limit_seconds=0.8, moments=0, only=("black_hole",))
    report = await prove(subject)
    assert "time" in kinds(report, "black_hole")
    assert not report.grades["bounded"]


async def test_cdcs_makes_one_copy_though_the_server_commits_late(cdcs: CdcsServer) -> None:
    values = {"NX_CDCS_URL": cdcs.url, "NX_CDCS_TOKEN": cdcs.admin_token}
    environment = Environment({key: Value(text, "test") for key, text in values.items()})
    report = await prove(Subject(Cdcs, environment, Options(4, 2, parallel=16, moments=2, only=("late_commit",))))
    assert not report.problems
    assert report.good
    assert any(request.startswith("write POST ") for request in report.requests)


async def test_the_archive_survives_every_disk_fault() -> None:
    environment = Environment({"NX_LOCAL_ARCHIVE_PATH": Value("/nowhere", "test")})
    report = await prove_on_disk(Subject(LocalArchive, environment, Options(), url_setting="NX_LOCAL_ARCHIVE_PATH"))
    assert not report.problems
    assert report.score == "12/12"


#: Writes in place and asks nobody.
CARELESS = """
from pathlib import Path
import os
from nexus_export import Absent, ExportResult, Present
from pydantic import BaseModel

class Careless:
    name, priority, enabled, settle_seconds = "careless", 50, True, 0

    class Settings(BaseModel):
        path: Path

    def __init__(self, settings):
        self.path = settings.path

    def validate_config(self):
        return True, None

    def export(self, context):
        self.path.mkdir(exist_ok=True)
        with (self.path / context.xml_file_path.name).open("wb", buffering=0) as file:
            content = context.xml_file_path.read_bytes()
            while content:
                content = content[os.write(file.fileno(), content):]
        return ExportResult(True, self.name, context.xml_file_path.name)

    def verify(self, context):
        return Present("x") if (self.path / context.xml_file_path.name).exists() else Absent()
"""


async def test_a_careless_archive_is_caught(tmp_path: Path) -> None:
    environment = Environment({"NX_CARELESS_PATH": Value("/nowhere", "test")})
    path = tmp_path / "careless.py"
    path.write_text(CARELESS, encoding="utf-8")
    faults = ("killed_in_write", "target_is_link", "other_bytes", "folder_missing", "killed_before_rename")
    subject = Subject(
        resolve(f"{path}:Careless", environment), environment, Options(only=faults), url_setting="NX_CARELESS_PATH"
    )
    report = await prove_on_disk(subject)
    assert report.passed == ()
    assert "loss" in kinds(report, "killed_in_write")
    assert "loss" in kinds(report, "target_is_link")
    assert {"class", "loss"} <= kinds(report, "other_bytes")
    assert {"class", "loss"} <= kinds(report, "folder_missing")
    assert "kit" in kinds(report, "killed_before_rename")  # it makes no such call, so nothing was proven
