"""The processes of a storm against real destinations: broker, consumer, CDCS, two notebooks; the archive's folder."""

import json
import sqlite3
import sys
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from consumer.testing.elabftw_accounts import SERVICE_KEY
from consumer.testing.labarchives_api import KEY_ID, PASSWORD
from consumer.testing.labarchives_server import NOTEBOOK, UID
from tests.storm.stage import PROJECT, START_SECONDS, Stage
from tests.storm_real import faults
from tests.storm_real.check import DESTINATIONS, NOTEBOOKS
from tools.servers.cdcs import CdcsServer
from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment

#: How late a server may commit, and how long it is waited for, in seconds. What CDCS does takes its time.
SETTLE_SECONDS = {"cdcs": 5, "elabftw": 2, "labarchives": 2}
TIMEOUT_SECONDS = {"cdcs": 10, "elabftw": 5, "labarchives": 6}
MAX_ATTEMPTS = "200"
#: Requests of one kind to one notebook for each record, among which faults are drawn.
REQUESTS_A_RECORD = 12


class RealWorld(Stage):
    """Everything that runs, below one folder."""

    def __init__(self, folder: Path, seed: int, records: int) -> None:
        super().__init__(folder)
        self.archive = folder / "archive"
        self.cdcs = CdcsServer(folder / "cdcs")
        self._seed = seed
        self._requests = records * REQUESTS_A_RECORD
        self._ports = {name: free_port() for name in NOTEBOOKS}
        self._notebooks: dict[str, Child] = {}

    def start(self) -> None:
        """Start the servers, all at once, and give the notebooks their faults."""
        starts: list[Callable[[], None]] = [self.rabbit.start, self.cdcs.start]
        starts += [partial(self._start_notebook, name) for name in NOTEBOOKS]
        with ThreadPoolExecutor(len(starts)) as pool:
            for started in [pool.submit(start) for start in starts]:
                started.result()
        self._call("elabftw", "PUT", "_control/faults", faults.of_elabftw(self._seed, self._requests))
        for fault in faults.of_labarchives(self._seed, self._requests):
            self._call("labarchives", "POST", "control/faults", fault)

    def _start_notebook(self, name: str) -> None:
        child = Child(
            [sys.executable, "-m", f"consumer.testing.{name}_server", "--port", str(self._ports[name])],
            env=clean_environment(PYTHONPATH=str(PROJECT)),
            log=self.folder / f"{name}.log",
            cwd=self.folder,
        )
        child.wait_until(lambda: self._answers(name), START_SECONDS, f"the server of {name}")
        self._notebooks[name] = child

    def _answers(self, name: str) -> bool:
        with suppress(OSError):
            self.held_by(name)
            return True
        return False

    def close(self) -> None:
        """Kill what still runs, CDCS too."""
        super().close()
        self.cdcs.kill()

    def servers(self) -> Mapping[str, Child | None]:
        """Return the two notebooks; CDCS comes and goes."""
        return {f"the server of {name}": child for name, child in self._notebooks.items()}

    def settings(self) -> Mapping[str, str]:
        """Let records go to CDCS, both notebooks and the archive, with little patience."""
        settings = {
            "NX_CDCS_URL": self.cdcs.url,
            "NX_CDCS_TOKEN": self.cdcs.admin_token,
            "NX_LOCAL_ARCHIVE_PATH": str(self.archive),
            "NX_ELABFTW_URL": self.address("elabftw"),
            "NX_ELABFTW_API_KEY": SERVICE_KEY,
            "NX_LABARCHIVES_URL": f"{self.address('labarchives')}api",
            "NX_LABARCHIVES_ACCESS_KEY_ID": KEY_ID,
            "NX_LABARCHIVES_ACCESS_PASSWORD": PASSWORD,
            "NX_LABARCHIVES_USER_ID": UID,
            "NX_LABARCHIVES_NOTEBOOK_ID": NOTEBOOK,
            "NX_LABARCHIVES_MIN_INTERVAL_SECONDS": "0",
        }
        settings |= {f"NX_{name.upper()}_SETTLE_SECONDS": str(value) for name, value in SETTLE_SECONDS.items()}
        settings |= {f"NX_{name.upper()}_TIMEOUT_SECONDS": str(value) for name, value in TIMEOUT_SECONDS.items()}
        return settings | {f"NX_{name.upper()}_MAX_ATTEMPTS": MAX_ATTEMPTS for name in DESTINATIONS}

    def done_at(self, name: str) -> int:
        """Count the steps that are done at a destination; before the first tables none is."""
        query = "SELECT count(*) FROM steps WHERE destination = ? AND state = 'done'"
        try:
            with closing(sqlite3.connect(f"{self.database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
                return int(connection.execute(query, (name,)).fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    # --- what the notebooks tell ------------------------------------------------------------------------------

    def address(self, name: str) -> str:
        """Return the address of a notebook."""
        return f"http://127.0.0.1:{self._ports[name]}/"

    def held_by(self, name: str) -> Any:
        """Return everything that a notebook holds."""
        return self._call(name, "GET", "_control/state" if name == "elabftw" else "control/state")

    def faults_met(self) -> dict[str, int]:
        """Count the faults that requests have met."""
        lines = self._call("labarchives", "GET", "control/ledger")["requests"]
        return faults.met(self._call("elabftw", "GET", "_control/ledger"), lines)

    def pending(self) -> int:
        """Ask which commits are still to come; LabArchives does not tell, and has none that is later than quiet."""
        return int(self.held_by("elabftw")["pending"])

    def _call(self, name: str, method: str, path: str, body: Any = None) -> Any:
        """Use the control interface of a notebook."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - our own server
            self.address(name) + path, content, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own server
            return json.load(answer)
