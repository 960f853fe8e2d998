"""SIGKILLs CDCS and lets it stay away for a while, again and again, so that notebooks have records before it has."""

import random
import threading
import time
from collections.abc import Callable
from typing import Self

from tools.servers.cdcs import CdcsServer

#: It is away when the first records come, until enough of them are elsewhere, but not longer.
FIRST_SECONDS = 90.0
LOOK_SECONDS = 0.2
AWAY_SECONDS = (1.0, 8.0)
THERE_SECONDS = (10.0, 25.0)


class Outages:
    """A thread that kills and starts a CDCS until ``stop``; then CDCS runs.

    The first outage lasts until ``enough`` says so.
    """

    def __init__(self, cdcs: CdcsServer, seed: int, enough: Callable[[], bool]) -> None:
        self._cdcs = cdcs
        self._enough = enough
        self._rng = random.Random(f"{seed}:outages")  # noqa: S311 - has to be repeatable, not secret
        self._over, self._hurry = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="outages")
        self.count = 0
        #: what ended it before its time
        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        self._away()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hurry.set()
        self.stop()

    def stop(self) -> None:
        """Return when CDCS is there to stay; the first outage has its time."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _away(self) -> None:
        self._cdcs.kill()
        self.count += 1

    def _run(self) -> None:
        try:
            until = time.monotonic() + FIRST_SECONDS
            while not self._enough() and time.monotonic() < until and not self._hurry.wait(LOOK_SECONDS):
                pass
            self._back()
            while not self._over.wait(self._rng.uniform(*THERE_SECONDS)):
                self._away()
                self._over.wait(self._rng.uniform(*AWAY_SECONDS))
                self._back()
        except Exception as error:  # noqa: BLE001 - told by the thread that waits for the end
            self.failure = error

    def _back(self) -> None:
        port = self._cdcs.port
        self._cdcs.start()
        if self._cdcs.port != port:  # records carry the address in their links
            raise RuntimeError("another program has taken the port of CDCS while it was away")
