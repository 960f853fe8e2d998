"""A repository server that misbehaves on purpose, and notes in ledgers what it really holds.

One process serves every destination. A POST makes one more copy, whatever is there already; a GET lists the copies
of a key. Which fault a request meets is drawn from the seed, the key and the number of its request, so it does not
depend on the order in which requests come.
"""

import argparse
import asyncio
import hashlib
import json
import random
import socket
import struct
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

from aiohttp import web

#: Seconds between the reset of an answer and the commit: below and above the settle time of the plugins.
LATE_SECONDS = 1.6
TOO_LATE_SECONDS = 3.0
STALL_SECONDS = 4.5
#: A stalled request commits within this time, or not at all.
STALL_COMMIT_SECONDS = 1.5
#: Per cent of the requests; the rest is answered well.
CREATE_FAULTS = {
    "reset_after_commit": 10.0,
    "late_commit": 3.0,
    "too_late_commit": 0.3,
    "too_many": 1.5,
    "unavailable": 4.0,
    "stall": 2.0,
    "cut_body": 4.0,
}
LIST_FAULTS = {"reset": 2.0, "too_many": 0.5, "unavailable": 2.0, "stall": 1.0, "cut_body": 1.0}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Ledger:
    """The copies of one destination; each is a flushed line of a file before anybody can see it."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")
        self.by_key: dict[str, list[str]] = {}

    def add(self, facts: dict[str, Any], received: float) -> str:
        """Add a copy under a new id; its delay is measured, not planned."""
        entry = {"id": uuid.uuid4().hex, **facts, "delay": round(time.monotonic() - received, 3)}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        self.by_key.setdefault(facts["key"], []).append(entry["id"])
        return str(entry["id"])


class Repository:
    """Answers requests of all destinations, most of them well."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._ledgers: dict[str, Ledger] = {}
        self._seen: Counter[str] = Counter()
        self._later: set[asyncio.Task[None]] = set()
        self.met: Counter[str] = Counter()

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application()
        application.router.add_post("/{destination}/copies", self.create)
        application.router.add_get("/{destination}/copies", self.list)
        application.router.add_get("/state", self.state)
        return application

    def _ledger(self, request: web.Request) -> Ledger:
        name = request.match_info["destination"]
        if name not in self._ledgers:
            self._ledgers[name] = Ledger(self._folder / f"{name}.jsonl")
        return self._ledgers[name]

    def _draw(self, request: web.Request, faults: dict[str, float]) -> tuple[str, random.Random]:
        """Choose what happens to a request."""
        place = f"{self._seed}:{request.method}:{request.match_info['destination']}:{request.query['key']}"
        self._seen[place] += 1
        rng = random.Random(f"{place}:{self._seen[place]}")  # noqa: S311 - has to be repeatable, not secret
        point = rng.uniform(0, 100)
        for fault, share in faults.items():
            point -= share
            if point < 0:
                self.met[f"{request.method} {fault}"] += 1
                return fault, rng
        return "", rng

    def _commit_later(self, ledger: Ledger, facts: dict[str, Any], received: float, seconds: float) -> None:
        async def commit() -> None:
            await asyncio.sleep(received + seconds - time.monotonic())
            ledger.add(facts, received)

        task = asyncio.create_task(commit())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def create(self, request: web.Request) -> web.StreamResponse:
        """Make a copy, or do something worse."""
        received = time.monotonic()
        content = await request.read()
        fault, rng = self._draw(request, CREATE_FAULTS)
        ledger = self._ledger(request)
        facts = {
            "key": request.query["key"],
            "session": request.query["session"],
            "sha256": hashlib.sha256(content).hexdigest(),
            "fault": fault,
        }
        if fault in {"too_many", "unavailable"}:
            return _refusal(fault)
        if fault in {"late_commit", "too_late_commit"}:
            seconds = LATE_SECONDS if fault == "late_commit" else TOO_LATE_SECONDS
            self._commit_later(ledger, facts, received, seconds)
            return _reset(request)
        if fault == "stall":
            if rng.random() < 0.5:
                self._commit_later(ledger, facts, received, rng.uniform(0, STALL_COMMIT_SECONDS))
            await asyncio.sleep(STALL_SECONDS)
            return _reset(request)
        answer = {"id": ledger.add(facts, received)}
        if fault == "reset_after_commit":
            return _reset(request)
        if fault == "cut_body":
            return await _cut(request, answer)
        return web.json_response(answer, status=201)

    async def list(self, request: web.Request) -> web.StreamResponse:
        """List the copies of a key, oldest first."""
        fault, _ = self._draw(request, LIST_FAULTS)
        answer = {"ids": self._ledger(request).by_key.get(request.query["key"], [])}
        if fault in {"too_many", "unavailable"}:
            return _refusal(fault)
        if fault == "stall":
            await asyncio.sleep(STALL_SECONDS)
        if fault in {"reset", "stall"}:
            return _reset(request)
        if fault == "cut_body":
            return await _cut(request, answer)
        return web.json_response(answer)

    async def state(self, _request: web.Request) -> web.StreamResponse:
        """Tell how many commits are still to come, and which faults were met."""
        return web.json_response({"pending": len(self._later), "met": dict(self.met)})


def _refusal(fault: str) -> web.Response:
    if fault == "too_many":
        return web.Response(status=429, headers={"Retry-After": "1"})
    return web.Response(status=503, text="try again later")


def _reset(request: web.Request) -> web.Response:
    """Reset the connection; the answer that is returned cannot reach anybody."""
    if request.transport is not None:
        # no lingering: the peer gets RST instead of an orderly end
        peer = request.transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response(status=500)


async def _cut(request: web.Request, answer: dict[str, Any]) -> web.StreamResponse:
    """Announce a whole body, send the half of it, hang up."""
    body = json.dumps(answer).encode()
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm.server", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    application = Repository(options.folder, options.seed).application()
    web.run_app(application, host="127.0.0.1", port=options.port, print=lambda *_: None, access_log=None)


if __name__ == "__main__":
    main()
