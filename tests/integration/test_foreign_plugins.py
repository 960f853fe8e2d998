"""Destinations that other people wrote, as pip installs them; a single file in a folder is in test_strategies.

The classes of NexusLIMS run unmodified: their wheel is pinned by hash, and the plugin file only renames them.
"""

import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from consumer.testing.elabftw_accounts import SERVICE_KEY
from tests.integration.elabftw_kit import ElabftwServer
from tests.integration.harness import PROJECT, Bus, Service, Site, built, by_path, site, small
from tools.records import Record
from tools.servers.cdcs import CdcsServer
from tools.servers.rabbitmq import RabbitServer

PACKAGE = PROJECT / "tests" / "plugin_package"
REQUIREMENTS = PROJECT / "tests" / "nexuslims-plugins-requirements.txt"
SERVICES = PROJECT / ".services"

#: The names `cdcs` and `elabftw` belong to the built-in destinations.
NEXUSLIMS = """
from nexusLIMS.exporters.destinations.cdcs import CDCSDestination
from nexusLIMS.exporters.destinations.elabftw import ELabFTWDestination


class RenamedCDCS(CDCSDestination):
    name = "nexuslims_cdcs"


class RenamedELabFTW(ELabFTWDestination):
    name = "nexuslims_elabftw"
"""
BOTH = ["nexuslims_cdcs", "nexuslims_elabftw"]


def pip_install(target: Path, *arguments: str | Path) -> None:
    """Install without resolving anything, into a folder instead of the environment of the tests."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", target, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Laboratory(Site):
    """An installation where pip has put further packages."""

    def __init__(self, like: Site, packages: Path, **settings: str) -> None:
        super().__init__(like.folder, like.amqp_url, **settings)
        self.running = like.running  # so that they are stopped at its end
        self._packages = packages

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment of a process that finds the packages."""
        found = super().environment(**changes)
        return {**found, "PYTHONPATH": os.pathsep.join([found["PYTHONPATH"], str(self._packages)])}

    def destinations(self, **changes: str) -> tuple[dict[str, dict[str, Any]], list[Any]]:
        """Return what the command `destinations` says: rows by name, and problems."""
        answer = json.loads(self.run("destinations", "--json", seconds=60, **changes).stdout)
        return {row["name"]: row for row in answer["destinations"]}, answer["problems"]


@contextmanager
def laboratory(folder: Path, amqp_url: str, packages: Path, **settings: str) -> Iterator[tuple[Laboratory, Bus]]:
    """Give an installation with such packages, and a bus beside it."""
    with site(folder, amqp_url) as (plain, bus):
        yield Laboratory(plain, packages, **settings), bus


# --- a package with an entry point -------------------------------------------------------------------------------


def test_an_installed_package_is_found_by_its_entry_point_and_used(tmp_path: Path, amqp_url: str) -> None:
    packages, log = tmp_path / "packages", tmp_path / "records.csv"
    pip_install(packages, "--no-index", "--no-build-isolation", PACKAGE)
    with laboratory(tmp_path, amqp_url, packages) as (here, bus):
        rows, problems = here.destinations()
        assert problems == []
        assert (rows["csv_log"]["enabled"], rows["csv_log"]["why_not"]) == (False, "NX_CSV_LOG_PATH is not set")
        here.settings["NX_CSV_LOG_PATH"] = str(log)
        rows, _ = here.destinations()
        assert (rows["csv_log"]["checked"], rows["csv_log"]["can_verify"]) == (True, True)
        assert rows["csv_log"]["origin"] == "entry point csv_log (nexus_export_csv_log:CsvLog)"

        service, record = here.start(), small(1)
        for event_id in ("first", "again"):
            bus.publish(built("session", here.write(record), event_id=event_id))
            outcome = bus.outcome(event_id, log=service.log)
            assert outcome.data["status"] == "COMPLETED"
        with log.open(encoding="utf-8", newline="") as file:
            (line,) = list(csv.reader(file))
        result = outcome.result("csv_log")
        described = by_path("", record.content)
        assert line == [result["record_id"], described["sha256"], "session", record.instrument_pid]
        assert outcome.result("local_archive")["success"] is True


# --- the classes of NexusLIMS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nexuslims() -> Path:
    """Give a folder with NexusLIMS and what its destinations import; it is kept between runs."""
    package = SERVICES / "nexuslims-plugins"
    made_from = package / REQUIREMENTS.name
    SERVICES.mkdir(exist_ok=True)
    with (SERVICES / f"{package.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made_from.exists() and made_from.read_bytes() == REQUIREMENTS.read_bytes():
            return package
        with tempfile.TemporaryDirectory(dir=SERVICES) as temporary:  # a test run may be cut at any moment
            fresh = Path(temporary) / "package"
            pip_install(fresh, "--require-hashes", "--only-binary", ":all:", "--requirement", REQUIREMENTS)
            shutil.copy(REQUIREMENTS, fresh)
            shutil.rmtree(package, ignore_errors=True)
            fresh.rename(package)
    return package


@pytest.fixture(scope="module")
def nexus_cdcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CdcsServer]:
    """Give a CDCS of this module, as NexusLIMS needs it: the record schema is the first in the list of templates."""
    with CdcsServer(tmp_path_factory.mktemp("nexus-cdcs")) as server:
        with administrator(server) as client:
            templates = client.get("rest/template-version-manager/global/").json()
            order = [item["id"] for item in sorted(templates, key=lambda item: item["title"], reverse=True)]
            answer = client.patch("rest/template-version-manager/global/ordering/", json={"template_list": order})
            assert answer.is_success, answer.text
            assert templates[0]["title"] == "Another Schema"
        yield server


@pytest.fixture(scope="module")
def elab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElabftwServer]:
    """Give a server that behaves like eLabFTW."""
    server = ElabftwServer(tmp_path_factory.mktemp("elabftw"))
    yield server
    server.shut_down()


@dataclass
class Running:
    """A consumer with the classes of NexusLIMS, and where they export to."""

    site: Laboratory
    bus: Bus
    service: Service
    cdcs: CdcsServer
    elab: ElabftwServer

    def publish(self, event_id: str, record: Record, destinations: list[str]) -> None:
        """Write a record and tell that it was built."""
        event = built(event_id, self.site.write(record), event_id=event_id, destinations=destinations)
        self.bus.publish(event)

    def results(self, event_id: str, destinations: list[str]) -> list[dict[str, Any]]:
        """Wait for a success at all these destinations."""
        outcome = self.bus.outcome(event_id, seconds=30, log=self.service.log)
        assert outcome.data["status"] == "COMPLETED", outcome.data
        assert [result["destination"] for result in outcome.data["results"]] == destinations
        return [outcome.result(name) for name in destinations]

    def experiment(self, record_id: str) -> dict[str, Any]:
        """Return an experiment as the server holds it."""
        return next(item for item in self.elab.experiments() if str(item["id"]) == record_id)


@pytest.fixture(scope="module")
def running(
    rabbitmq: RabbitServer,
    nexuslims: Path,
    nexus_cdcs: CdcsServer,
    elab: ElabftwServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """Give a consumer beside a NexusLIMS: both read the same `.env`."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("foreign-plugins")
    folder = tmp_path_factory.mktemp("laboratory")
    write_settings(folder, nexus_cdcs, elab)
    with laboratory(folder, url, nexuslims) as (here, bus):
        (here.plugins / "nexuslims.py").write_text(NEXUSLIMS, encoding="utf-8")
        yield Running(here, bus, here.start(), nexus_cdcs, elab)
    rabbitmq.start()
    rabbitmq.delete_vhost("foreign-plugins")


def write_settings(folder: Path, cdcs: CdcsServer, elab: ElabftwServer) -> None:
    """Write what NexusLIMS insists on: folders and a database that are there, though no export needs them."""
    for name in ("instruments", "data"):
        (folder / name).mkdir()
    (folder / "data" / "nexuslims.db").touch()
    settings = {
        "NX_INSTRUMENT_DATA_PATH": folder / "instruments",
        "NX_DATA_PATH": folder / "data",
        "NX_DB_PATH": folder / "data" / "nexuslims.db",
        "NX_CDCS_URL": cdcs.url,
        "NX_CDCS_TOKEN": cdcs.admin_token,
        "NX_ELABFTW_URL": elab.url,
        "NX_ELABFTW_API_KEY": SERVICE_KEY,
    }
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    (folder / ".env").write_text("".join(lines), encoding="utf-8")


@contextmanager
def administrator(cdcs: CdcsServer) -> Iterator[httpx.Client]:
    """Give a client of CDCS that knows nothing of the code under test."""
    headers = {"Authorization": f"Token {cdcs.admin_token}"}
    with httpx.Client(base_url=cdcs.url, headers=headers, timeout=30) as client:
        yield client


def in_cdcs(cdcs: CdcsServer, record_id: str) -> dict[str, Any]:
    """Return a record as CDCS holds it."""
    with administrator(cdcs) as client:
        found: dict[str, Any] = client.get(f"rest/data/{record_id}/").raise_for_status().json()
    return found


def test_the_classes_of_nexuslims_are_listed_and_checked_beside_the_built_in_ones(running: Running) -> None:
    rows, problems = running.site.destinations()
    assert problems == []
    for name, priority in (("nexuslims_cdcs", 100), ("nexuslims_elabftw", 85)):
        row = rows[name]
        assert (row["enabled"], row["checked"], row["why_not"]) == (True, True, "")
        assert (row["priority"], row["can_verify"]) == (priority, False)
        assert row["origin"] == str(running.site.plugins / "nexuslims.py")
    assert (rows["cdcs"]["checked"], rows["elabftw"]["checked"]) == (True, True)


def test_a_setting_that_only_nexuslims_needs_takes_nobody_else_down(running: Running) -> None:
    rows, problems = running.site.destinations(NX_DB_PATH=str(running.site.folder / "nowhere.db"))
    assert problems == []
    for name in BOTH:
        assert rows[name]["enabled"] is False
        assert "NX_DB_PATH" in rows[name]["why_not"]
    assert rows["cdcs"]["checked"] is True


def test_a_record_is_exported_by_both(running: Running) -> None:
    before, record = datetime.now(UTC), small(1)
    running.publish("both", record, BOTH)
    cdcs, elab = running.results("both", BOTH)

    assert cdcs["record_url"] == f"{running.cdcs.url}data?id={cdcs['record_id']}"
    there = in_cdcs(running.cdcs, cdcs["record_id"])
    assert (there["title"], there["xml_content"].encode()) == (Path(record.name).stem, record.content)
    assert there["workspace"] == 1

    # two slashes: NexusLIMS adds one to an address that ends with one
    assert elab["record_url"] == f"{running.elab.url}/experiments.php?mode=view&id={elab['record_id']}"
    experiment = running.experiment(elab["record_id"])
    assert experiment["title"] == f"NexusLIMS Experiment - {Path(record.name).stem}"
    assert record.instrument_pid in experiment["body"]
    (upload,) = [item for item in running.elab.uploads() if str(item["item_id"]) == elab["record_id"]]
    assert upload["hash"] == by_path("", record.content)["sha256"]

    rows = running.site.log_rows("both")
    assert sorted((row["destination_name"], row["record_id"], row["record_url"]) for row in rows) == [
        ("nexuslims_cdcs", cdcs["record_id"], cdcs["record_url"]),
        ("nexuslims_elabftw", elab["record_id"], elab["record_url"]),
    ]
    assert all(row["success"] and row["attempt"] == 1 for row in rows)
    # NexusLIMS gives times without a zone
    assert all(before <= datetime.fromisoformat(item["timestamp"]) <= datetime.now(UTC) for item in (cdcs, elab))


def test_records_that_come_together_run_in_threads_and_do_not_meet(running: Running) -> None:
    running.elab.fault("stall", "/experiments", seconds=3)  # the first one hangs, and is then cut
    records = {f"together-{number}": small(number) for number in range(10, 18)}
    for event_id, record in records.items():
        running.publish(event_id, record, BOTH)
    found, rows = set(), []
    for event_id, record in records.items():
        cdcs, elab = running.results(event_id, BOTH)
        assert in_cdcs(running.cdcs, cdcs["record_id"])["xml_content"].encode() == record.content
        assert running.experiment(elab["record_id"])["title"].endswith(Path(record.name).stem)
        found |= {("cdcs", cdcs["record_id"]), ("elabftw", elab["record_id"])}
        rows += [row for row in running.site.log_rows(event_id) if row["destination_name"] == BOTH[1]]
    assert len(found) == 2 * len(records)
    (hung,) = [row for row in rows if not row["success"]]
    assert any(row["id"] < hung["id"] for row in rows), "nothing else was done while one call hung"


def test_a_class_of_nexuslims_sees_the_result_of_a_built_in_destination(running: Running) -> None:
    destinations = ["cdcs", "nexuslims_elabftw"]
    running.publish("linked", small(2), destinations)
    cdcs, elab = running.results("linked", destinations)
    experiment = running.experiment(elab["record_id"])
    assert f'<a href="{cdcs["record_url"]}"' in experiment["body"]
    assert cdcs["record_url"] in json.dumps(experiment["metadata"]).replace("\\", "")


def test_a_failure_that_nexuslims_returns_is_tried_again(running: Running) -> None:
    running.elab.fault("error", "/experiments", status=500)
    running.publish("again", small(3), BOTH)
    cdcs, elab = running.results("again", BOTH)
    assert (cdcs["attempts"], elab["attempts"]) == (1, 2)
    (failed, done) = [row for row in running.site.log_rows("again") if row["destination_name"] == BOTH[1]]
    assert (bool(failed["success"]), failed["error_code"], bool(done["success"])) == (False, "refused", True)
    assert "status 500" in failed["error_message"]
