"""The storm against test plugins: one misbehaving server behind four destinations."""

import json
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.storm.stage import PROJECT, START_SECONDS, Stage
from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment

DESTINATIONS = ("storm_a", "storm_b", "storm_c", "storm_d")
SETTLE_SECONDS = 2.0


class World(Stage):
    """Everything that runs, below one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self.ledgers = folder / "ledgers"
        self._seed = seed
        self._port = free_port()
        self._server: Child | None = None

    @property
    def server_url(self) -> str:
        """Return the address of the misbehaving server."""
        return f"http://127.0.0.1:{self._port}/"

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

    def servers(self) -> Mapping[str, Child | None]:
        """Return the misbehaving server."""
        return {"the server": self._server}

    def _answers(self) -> bool:
        with suppress(OSError):
            self.server_state()
            return True
        return False

    def pending(self) -> int:
        """Ask the server which commits are still to come."""
        return int(self.server_state()["pending"])

    def server_state(self) -> dict[str, Any]:
        """Ask the server which commits are still to come and what it did."""
        with urllib.request.urlopen(f"{self.server_url}state", timeout=10) as answer:  # noqa: S310 - our own server
            found: dict[str, Any] = json.load(answer)
        return found

    def settings(self) -> Mapping[str, str]:
        """Let records go to the four test plugins."""
        settings = {
            "NX_DESTINATIONS_PATH": str(Path(__file__).parent / "plugins"),
            "NX_STORM_URL": self.server_url,
        }
        for name in DESTINATIONS:
            prefix = f"NX_{name.upper()}_"
            limits = {"CONCURRENCY": "16", "MAX_ATTEMPTS": "100", "TIMEOUT_SECONDS": "3"}
            settings |= {prefix + limit: value for limit, value in limits.items()}
        return settings
