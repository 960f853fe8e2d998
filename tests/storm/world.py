"""The processes of a storm: broker, misbehaving server and consumer; all of them are ended by their id."""

import json
import signal
import sqlite3
import sys
import urllib.request
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment, is_alive, tail
from tools.servers.rabbitmq import RabbitServer

PROJECT = Path(__file__).resolve().parents[2]
DESTINATIONS = ("storm_a", "storm_b", "storm_c", "storm_d")
SETTLE_SECONDS = 2.0
START_SECONDS = 30.0
STOP_SECONDS = 12.0
#: Copies of finished steps that the consumer wants to look at once more.
RECHECKS = (
    "SELECT count(*) FROM copies c WHERE recheck_at IS NOT NULL AND EXISTS (SELECT 1 FROM steps s"
    " WHERE s.session = c.session AND s.destination = c.destination AND s.state = 'done')"
)
READY = b'"broker_connected"'


class StormError(Exception):
    """The storm could not be brought to its end; the text says why and what is still open."""


@dataclass(frozen=True, slots=True)
class Open:
    """What the database holds that is not over."""

    steps: dict[str, int]
    unsent: int
    rechecks: int

    @property
    def in_flight(self) -> bool:
        """Tell whether a kill now meets something half done."""
        return bool(self.steps.get("running") or self.steps.get("unsettled") or self.unsent)

    @property
    def idle(self) -> bool:
        """Tell whether nothing more will happen."""
        waiting = ("blocked", "due", "running", "unsettled")
        return not (any(map(self.steps.get, waiting)) or self.unsent or self.rechecks)


class World:
    """Everything that runs, below one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.ledgers = folder / "ledgers"
        self.database = folder / "storm.db"
        self.rabbit = RabbitServer(folder / "rabbitmq")
        self._seed = seed
        self._port = free_port()
        self._server: Child | None = None
        self._consumer: Child | None = None
        self._log_start = 0

    @property
    def server_url(self) -> str:
        """Return the address of the misbehaving server."""
        return f"http://127.0.0.1:{self._port}/"

    @property
    def log(self) -> Path:
        """Return the log of all consumers, one after the other."""
        return self.folder / "consumer.log"

    def start(self) -> None:
        """Start broker and server."""
        self.ledgers.mkdir()
        self.rabbit.start()
        self._server = Child(
            [sys.executable, "-m", "tests.storm.server", self.ledgers, "--port", str(self._port),
             "--seed", str(self._seed)],
            env=clean_environment(PYTHONPATH=str(PROJECT)),
            log=self.folder / "server.log",
            cwd=self.folder,
        )  # fmt: skip
        self._server.wait_until(self._answers, START_SECONDS, "the misbehaving server")

    def close(self) -> None:
        """Kill what still runs; what it holds is thrown away."""
        for child in (self._consumer, self._server):
            if child is not None:
                child.kill()
        self._consumer = self._server = None
        self.rabbit.kill()

    def _answers(self) -> bool:
        with suppress(OSError):
            self.server_state()
            return True
        return False

    def server_state(self) -> dict[str, Any]:
        """Ask the server which commits are still to come and what it did."""
        with urllib.request.urlopen(f"{self.server_url}state", timeout=10) as answer:  # noqa: S310 - our own server
            found: dict[str, Any] = json.load(answer)
        return found

    # --- the consumer ------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        settings = {
            "NX_AMQP_URL": self.rabbit.url,
            "NX_DATABASE_URL": f"sqlite:///{self.database}",
            "NX_RECORDS_PATH": str(self.folder / "records"),
            "NX_SPOOL_PATH": str(self.folder / "spool"),
            "NX_DESTINATIONS_PATH": str(Path(__file__).parent / "plugins"),
            "NX_STORM_URL": self.server_url,
            "NX_EXPORT_STRATEGY": "all",
            "NX_RETRY_BASE_SECONDS": "0.2",
            "NX_RETRY_MAX_SECONDS": "2",
            "NX_LOG_FORMAT": "json",
        }
        for name in DESTINATIONS:
            prefix = f"NX_{name.upper()}_"
            limits = {"CONCURRENCY": "16", "MAX_ATTEMPTS": "100", "TIMEOUT_SECONDS": "3"}
            settings |= {prefix + limit: value for limit, value in limits.items()}
        return clean_environment(**settings, PYTHONPATH=str(PROJECT))

    def start_consumer(self) -> None:
        """Start a consumer and return at once."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._consumer = Child(
            [sys.executable, "-m", "consumer", "run"], env=self._environment(), log=self.log, cwd=self.folder
        )

    def consumer_ready(self) -> bool:
        """Tell whether this consumer has reached the broker."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return READY in log.read()

    def check_alive(self) -> None:
        """Raise ``StormError`` when something ended that nobody killed."""
        for what, child in (("the consumer", self._consumer), ("the server", self._server)):
            if child is not None and not is_alive(child.pid):
                raise StormError(f"{what} ended by itself{tail(child.log)}")

    def kill_consumer(self) -> None:
        """SIGKILL the consumer and start the next one."""
        if self._consumer is not None:
            self._consumer.kill()
        self.start_consumer()

    def kill_broker(self) -> None:
        """SIGKILL the broker and start it again with its data."""
        url = self.rabbit.url
        self.rabbit.kill()
        self.rabbit.start()
        if self.rabbit.url != url:
            raise StormError("another program has taken the port of the broker while it was dead")

    def stop_consumer(self) -> None:
        """Stop the consumer in order."""
        if self._consumer is not None:
            self._consumer.stop(STOP_SECONDS, signal.SIGTERM)
            self._consumer = None

    # --- the database ------------------------------------------------------------------------------------------

    def open_work(self) -> Open:
        """Read what is not over; before the first tables nothing is."""
        try:
            with closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
                steps = dict(connection.execute("SELECT state, count(*) FROM steps GROUP BY state").fetchall())
                unsent = connection.execute("SELECT count(*) FROM outbox WHERE sent_at IS NULL").fetchone()[0]
                return Open(steps, unsent, connection.execute(RECHECKS).fetchone()[0])
        except sqlite3.OperationalError:
            return Open({}, 0, 0)

    def waiting_steps(self, limit: int = 10) -> list[str]:
        """Describe steps that are not over, for an error message."""
        query = (
            "SELECT session, destination, state, attempts, lookups, next_attempt_at, reason FROM steps"
            " WHERE state NOT IN ('done', 'failed', 'skipped', 'superseded') LIMIT ?"
        )
        with closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True)) as connection:
            return [" ".join(map(str, row)) for row in connection.execute(query, (limit,))]
