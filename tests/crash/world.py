"""One run: an installation, the world around it, and the service, started again whenever it was killed."""

import http.client
import json
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg

from tests.crash import points
from tests.crash.doors import LEASE_MARGIN
from tests.crash.nursery import Nursery, Service
from tests.integration.harness import Bus, Heard, Site, built, job_of, outcome_id
from tools.records import Record
from tools.servers.process import tail

T = TypeVar("T")

PAUSE_SECONDS = 0.05
#: How long a run may take: far more than it needs, and it fails loudly after it.
RUN_SECONDS = 60.0
#: A point that only time brings about is waited for so long at the end.
IDLE_SECONDS = 2.0
STOP_SECONDS = 10.0


_LEFT = (
    "SELECT seq FROM outbox WHERE sent_at IS NULL",
    "SELECT state FROM steps WHERE state IN ('due', 'running', 'unsettled')",
    "SELECT session FROM copies WHERE recheck_at IS NOT NULL AND record_id IS NOT NULL",
)


class RunError(Exception):
    """The run did not come to its end; the text says why."""


@dataclass(frozen=True)
class Expected:
    """What must become of an event."""

    event_id: str
    revision: int = 1
    states: tuple[str, ...] = ("exported",)
    status: str = "COMPLETED"


class Remote:
    """One run's part of the server behind the test destination."""

    def __init__(self, port: int, run: str) -> None:
        self._port = port
        self._run = run

    @property
    def url(self) -> str:
        """The address that the destination writes below."""
        return f"http://127.0.0.1:{self._port}/{self._run}"

    def fail(self, session: str, *faults: str) -> None:
        """Let the next requests of a session end like that."""
        self._call("PUT", "/faults", {session: list(faults)})

    def requests(self) -> list[str]:
        """Return every write that came, in order."""
        return list(self._call("GET", "")["requests"])

    def records(self, session: str) -> list[dict[str, Any]]:
        """Return the records of a session that are there."""
        return [record for record in self._call("GET", "")["records"] if record["session"] == session]

    def forget(self) -> None:
        """Let the server forget this run."""
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request(method, f"/{self._run}{path}", json.dumps(body).encode())
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


class World:
    """What scenarios act on and checks look at."""

    def __init__(  # noqa: PLR0917 - what a run is made of
        self, site: Site, bus: Bus, remote: Remote, nursery: Nursery, point: str | None, linked: Remote | None = None
    ) -> None:
        self.site = site
        self.bus = bus
        self.remote = remote
        #: the part of the destination that links to the first one, in a scenario that has it
        self.linked = linked
        self._nursery = nursery
        self.point = point
        self.services: list[Service] = []
        self.expected: list[Expected] = []
        #: for each session what its copies must be in the end, newest first; what was before lies in the archive
        self.contents: dict[str, list[Record]] = {}
        #: sessions that the test destination must have no copy of
        self.refused: set[str] = set()
        self.letters = 0
        self.trace = site.folder / "trace"
        self._reached = site.folder / "reached"
        self._crashed = False
        self._ends_at = time.monotonic() + RUN_SECONDS
        self._service = self._start({points.POINT: point, points.REACHED: str(self._reached)} if point else {})

    @property
    def reached(self) -> bool:
        """Tell whether the service came to the point and was killed there."""
        return self._reached.exists() and self._crashed

    def log(self) -> str:
        """Return the ends of all logs."""
        return "".join(tail(service.log) for service in self.services)

    # --- what scenarios do -----------------------------------------------------------------------------------

    def publish(
        self, record: Record, *, hour: int = 12, name: str = "one", expect: Mapping[str, Any] | None = None
    ) -> str:
        """Publish a build of a record as a file; returns the event's id."""
        data = self.site.write(record, name)
        event = built(record.session, data, event_id=f"event-{name}", time=f"2025-11-24T{hour:02}:00:00Z")
        self.bus.publish(event)
        self.expected.append(Expected(event["id"], **(expect or {})))
        return str(event["id"])

    def replayed(self, event_id: str) -> None:
        """Expect the outcome of a replay from now on."""
        self.expected = [item for item in self.expected if item.event_id != event_id]
        self.expected.append(Expected(event_id, revision=2))

    def outcome(self, event_id: str, revision: int = 1) -> Heard:
        """Wait for an outcome."""

        def found() -> list[Heard]:
            return [item for item in self.bus.outcomes(event_id) if item.data["revision"] == revision]

        return self.wait(found, f"the outcome of {event_id}, revision {revision}")[0]

    def letter(self) -> Heard:
        """Wait for a dead letter."""

        def found() -> list[Heard]:
            self.bus.fetch_letters()
            return self.bus.letters

        return self.wait(found, "a dead letter")[0]

    def wait(self, found: Callable[[], T], what: str) -> T:
        """Wait for something, and start the service again when it was killed."""
        while not (value := found()):
            self._keep_alive()
            if time.monotonic() > self._ends_at:
                raise RunError(f"{what}: not within {RUN_SECONDS:g} s of the run's start")
            time.sleep(PAUSE_SECONDS)
        return value

    # --- the service -----------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Wait until messages find the work queue."""
        self.wait(lambda: any('"broker_connected"' in item.logged() for item in self.services), "the service")

    def finish(self) -> None:
        """Wait until everything is over, give a late point its chance, and stop the service in order."""
        self.wait(self._is_over, "the end of all work")
        if self.point:
            until = time.monotonic() + IDLE_SECONDS
            self.wait(lambda: self._crashed or time.monotonic() > until, "the point")
            self.wait(self._is_over, "the end of all work")
        if self._stop() != 0:  # the point lay in the stop
            self._start_again()
            self.wait(self._is_over, "the end of all work")
            if (code := self._stop()) != 0:
                raise RunError(f"the service ended with {code} at its stop")

    def kill(self) -> None:
        """End the service by force, if it still runs."""
        self._service.end(signal.SIGKILL, STOP_SECONDS)

    def _start(self, settings: Mapping[str, str | None]) -> Service:
        found = {name: value for name, value in settings.items() if value is not None}
        if not self.point:
            found[points.TRACE] = str(self.trace)
        if not self.site.database_url.startswith("sqlite"):
            found[LEASE_MARGIN] = "1"
        log = self.site.folder / f"service-{len(self.services) + 1}.log"
        service = self._nursery.start(log, self.site.folder, self.site.environment(**found))
        self.services.append(service)
        return service

    def _keep_alive(self) -> None:
        if self._service.exit_code is not None:
            self._start_again()

    def _start_again(self) -> None:
        code = self._service.exit_code
        if code != -signal.SIGKILL or self._crashed or not self._reached.exists():
            raise RunError(f"the service ended with {code}")
        self._crashed = True
        self._service = self._start({})

    def _stop(self) -> int | None:
        """Stop the service in order once it is up; returns how it ended."""
        self.wait(lambda: '"broker_connected"' in self._service.logged(), "the last start")
        self._service.end(signal.SIGTERM, STOP_SECONDS)
        return self._service.exit_code

    def _is_over(self) -> bool:
        for item in self.expected:
            wanted = outcome_id(item.event_id, item.revision)
            if not any(heard.event["id"] == wanted for heard in self.bus.outcomes(item.event_id)):
                return False
        left = [self._sql(query) for query in _LEFT]
        return (
            left == [[]] * len(left)
            and self.bus.depth() == 0
            and all(self._is_finished(item) for item in self.expected)
        )

    def _is_finished(self, item: Expected) -> bool:
        query = "SELECT finished_at FROM jobs WHERE id = ? AND revision >= ?"
        rows = self._sql(query, str(job_of(item.event_id)), item.revision)
        return bool(rows and rows[0]["finished_at"])

    def _sql(self, query: str, *values: Any) -> list[dict[str, Any]] | None:
        """Read the database; None while it has no tables yet."""
        with suppress(sqlite3.OperationalError, asyncpg.UndefinedTableError, asyncpg.CannotConnectNowError):
            return self.site.sql(query, *values)
        return None
