"""A server that behaves like eLabFTW in another process, records for it, and what a person does there."""

import hashlib
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from consumer.destinations.contract import ExportContext, ExportResult, LastExport
from consumer.destinations.elabftw import Elabftw
from consumer.testing.elabftw_accounts import PERSON_KEY, SERVICE_KEY
from tests.integration.harness import PROJECT, sha256
from tools.records import make_record
from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment

VERSIONS = ("5.3.6", "5.6.12", "6.0.0")
START_SECONDS = 15
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


class ElabftwServer(Child):
    """A running ``python -m consumer.testing.elabftw_server``."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.ledger_file = folder / "ledger.jsonl"
        command = [sys.executable, "-m", "consumer.testing.elabftw_server", "--port", str(self.port)]
        super().__init__(
            [*command, "--ledger", self.ledger_file],
            env=clean_environment(PYTHONPATH=str(PROJECT)),
            log=folder / "elabftw.log",
            cwd=folder,
        )
        self.control = httpx.Client(base_url=f"{self.url}_control/", timeout=30)
        self.wait_until(self._answers, START_SECONDS, "the eLabFTW test server")

    def _answers(self) -> bool:
        try:
            return self.control.get("state").is_success
        except httpx.TransportError:
            return False

    def shut_down(self) -> None:
        """End it in order."""
        self.control.close()
        self.stop(5)

    def reset(self, **settings: Any) -> None:
        """Forget everything and take these settings."""
        self.control.put("reset").raise_for_status()
        self.control.put("settings", json=settings).raise_for_status()

    def fault(self, kind: str, path: str, *, method: str = "POST", **more: Any) -> None:
        """Order one fault for the next requests to a path, given by its end."""
        fault = {"kind": kind, "path": path, "method": method, **more}
        self.control.put("faults", json=[fault]).raise_for_status()

    def state(self) -> dict[str, Any]:
        """Return all that the server holds."""
        value: dict[str, Any] = self.control.get("state").json()
        return value

    def experiments(self) -> list[dict[str, Any]]:
        """Return all experiments, deleted ones too."""
        found: list[dict[str, Any]] = self.state()["experiments"]
        return found

    def uploads(self, state: int | None = 1) -> list[dict[str, Any]]:
        """Return the attachments that are live, or all."""
        return [u for u in self.state()["uploads"] if state is None or u["state"] == state]

    def requests(self, method: str) -> list[str]:
        """Return the paths of all requests of a method below the API."""
        lines = self.control.get("ledger").json()
        return [line["path"].removeprefix("/api/v2/") for line in lines if line["method"] == method]

    def sent(self, method: str, path: str) -> list[Any]:
        """Return the JSON of all requests of a method whose path ends like that."""
        lines = self.control.get("ledger").json()
        return [line["json"] for line in lines if line["method"] == method and line["path"].endswith(path)]

    def client(self, key: str = PERSON_KEY) -> httpx.Client:
        """Return a client of the API that knows nothing of the code under test."""
        return httpx.Client(base_url=f"{self.url}api/v2/", headers={"Authorization": key}, timeout=30)

    def as_owner(self, record_id: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change an experiment as the one whose key the service has, at the screen."""
        with self.client(SERVICE_KEY) as client:
            answer = client.patch(f"experiments/{record_id}", json=dict(changes))
        assert answer.status_code == 200, answer.text
        value: dict[str, Any] = answer.json()
        return value

    def destination(self, **settings: Any) -> Elabftw:
        """Return a destination that writes here."""
        key = SecretStr(settings.pop("api_key", SERVICE_KEY))
        return Elabftw(Elabftw.Settings(api_key=key, **{"url": self.url, **settings}))


Make = Callable[..., Elabftw]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElabftwServer]:
    """Give the server of this module as the test before has left it."""
    server = ElabftwServer(tmp_path_factory.mktemp("elabftw"))
    yield server
    server.shut_down()


@pytest.fixture
def elab(running: ElabftwServer) -> ElabftwServer:
    """Give the server, empty, as version 6."""
    running.reset()
    return running


@pytest.fixture(params=VERSIONS)
def any_elab(running: ElabftwServer, request: pytest.FixtureRequest) -> ElabftwServer:
    """Give the server, empty, once as each version."""
    running.reset(version=request.param)
    return running


@pytest.fixture
async def make(running: ElabftwServer) -> AsyncIterator[Make]:
    """Give a function that makes destinations, with the service's key unless another is given."""
    made: list[Elabftw] = []

    def destination(**settings: Any) -> Elabftw:
        made.append(running.destination(**settings))
        return made[-1]

    yield destination
    for item in made:
        await item.aclose()


def context_in(folder: Path, index: int = 1, *, stem: str | None = None, **more: Any) -> ExportContext:
    """Return the context of a record's first export."""
    record = make_record(index, size=2_000)
    path = folder / f"{stem or uuid.uuid4().hex}.xml"
    path.write_bytes(record.content)
    digest = sha256(record.content)
    values = {"record_sha256": digest, "sent_hashes": frozenset({digest}), "record_key": str(uuid.uuid4())}
    return ExportContext(
        path, record.session, record.instrument_pid, record.dt_from, record.dt_to, **{**values, **more}
    )


def exported(context: ExportContext, result: ExportResult, **changes: Any) -> ExportContext:
    """Return the context of a later call, for the record that was exported with a result."""
    last = LastExport(result.record_id or "", result.record_url, context.record_sha256, result.stored_sha256)
    return replace(context, **{"last_export": last, "purpose": "update", **changes})


def rebuilt(context: ExportContext, result: ExportResult, index: int = 2, **changes: Any) -> ExportContext:
    """Return the context of a newer build of the record that was exported with a result."""
    context.xml_file_path.write_bytes(make_record(index, size=3_000).content)
    digest = hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest()
    hashes = frozenset({*context.sent_hashes, digest})
    return exported(context, result, **{"record_sha256": digest, "sent_hashes": hashes, **changes})
