"""What every storm has: a broker, a consumer and its database, below one folder; all are ended by their id."""

import signal
import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tools.servers.process import Child, clean_environment, is_alive, tail
from tools.servers.rabbitmq import RabbitServer

PROJECT = Path(__file__).resolve().parents[2]
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
    def busy(self) -> bool:
        """Tell whether a kill now meets a step that runs, or a message on its way."""
        return bool(self.steps.get("running") or self.unsent)

    @property
    def in_flight(self) -> bool:
        """Tell whether a kill now meets something half done."""
        return self.busy or bool(self.steps.get("unsettled"))

    @property
    def idle(self) -> bool:
        """Tell whether nothing more will happen."""
        waiting = ("blocked", "due", "running", "unsettled")
        return not (any(map(self.steps.get, waiting)) or self.unsent or self.rechecks)


class Stage(ABC):
    """Broker, consumer and database; a subclass adds the servers that records go to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "storm.db"
        self.rabbit = RabbitServer(folder / "rabbitmq")
        self._consumer: Child | None = None
        self._log_start = 0

    @property
    def log(self) -> Path:
        """Return the log of all consumers, one after the other."""
        return self.folder / "consumer.log"

    @abstractmethod
    def start(self) -> None:
        """Start everything but the consumer."""

    @abstractmethod
    def settings(self) -> Mapping[str, str]:
        """Return the consumer's settings beside those that every storm has."""

    @abstractmethod
    def servers(self) -> Mapping[str, Child | None]:
        """Return the servers that have to be alive, by what they are called."""

    @abstractmethod
    def pending(self) -> int:
        """Ask the servers how many commits are still to come."""

    def close(self) -> None:
        """Kill what still runs; what it holds is thrown away."""
        for child in (self._consumer, *self.servers().values()):
            if child is not None:
                child.kill()
        self._consumer = None
        self.rabbit.kill()

    # --- the consumer ------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        settings = {
            "NX_AMQP_URL": self.rabbit.url,
            "NX_DATABASE_URL": f"sqlite:///{self.database}",
            "NX_RECORDS_PATH": str(self.folder / "records"),
            "NX_SPOOL_PATH": str(self.folder / "spool"),
            "NX_EXPORT_STRATEGY": "all",
            "NX_RETRY_BASE_SECONDS": "0.2",
            "NX_RETRY_MAX_SECONDS": "2",
            "NX_LOG_FORMAT": "json",
            **self.settings(),
        }
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
        for what, child in {"the consumer": self._consumer, **self.servers()}.items():
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
