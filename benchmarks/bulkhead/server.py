"""A repository server that behaves as it is told, and keeps a ledger of every request.

One process serves all destinations. Times are seconds of the machine's monotonic clock, which is the same for all
its processes. ``POST /control/<destination>`` takes the fields of ``Behaviour``; ``GET /ledger/<destination>`` gives
the requests so far.
"""

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from aiohttp import web

DRIP_SECONDS = 0.5
DRIP_LENGTH = 1000


@dataclass(slots=True)
class Behaviour:
    """How a destination answers: ``well``, ``hang``, ``unavailable``, ``drip``, ``closed`` or ``unauthorised``."""

    kind: str = "well"
    #: how long an answer takes
    seconds: float = 0.0
    #: more requests than that at once are refused; 0: any number is borne
    capacity: int = 0
    #: closed: what ``Retry-After`` asks for, as a date or in seconds; then the destination opens by itself
    retry_after: int = 0
    as_date: bool = False
    #: only these requests are concerned; the others are answered well
    methods: tuple[str, ...] = ("GET", "POST")


@dataclass(slots=True)
class Request:
    """A request as it was met; ``status`` is 0 until it is answered, and for one whose client left."""

    began: float
    method: str
    session: str
    ended: float | None = None
    status: int = 0


@dataclass(slots=True)
class Shelf:
    """One destination."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    requests: list[Request] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)
    in_flight: int = 0
    opens_at: float | None = None
    #: (answered at, opens at) of each closing
    closings: list[tuple[float, float]] = field(default_factory=list)


class Repository:
    """Answers the requests of all destinations."""

    def __init__(self) -> None:
        self._shelves: dict[str, Shelf] = {}

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application()
        application.router.add_get("/{destination}/check", self.check)
        application.router.add_post("/{destination}/copies", self.serve)
        application.router.add_get("/{destination}/copies", self.serve)
        application.router.add_post("/control/{destination}", self.control)
        application.router.add_get("/ledger/{destination}", self.ledger)
        application.router.add_get("/count/{destination}", self.count)
        return application

    def _shelf(self, request: web.Request) -> Shelf:
        return self._shelves.setdefault(request.match_info["destination"], Shelf())

    async def control(self, request: web.Request) -> web.Response:
        """Change how a destination behaves."""
        shelf = self._shelf(request)
        shelf.behaviour = Behaviour(**await request.json())
        shelf.opens_at = None
        return web.json_response(asdict(shelf.behaviour))

    async def ledger(self, request: web.Request) -> web.Response:
        """Tell all requests of a destination."""
        shelf = self._shelf(request)
        rows = [(r.began, r.ended, r.method, r.session, r.status) for r in shelf.requests]
        return web.json_response({"requests": rows, "closings": shelf.closings})

    async def count(self, request: web.Request) -> web.Response:
        """Tell how many sessions have a copy, and how many requests are in flight."""
        shelf = self._shelf(request)
        counts = {"copies": len(shelf.sessions), "in_flight": shelf.in_flight, "requests": len(shelf.requests)}
        return web.json_response(counts)

    async def check(self, request: web.Request) -> web.Response:
        """Tell whether the token is good; not in the ledger."""
        revoked = self._shelf(request).behaviour.kind == "unauthorised"
        return web.Response(status=401 if revoked else 200)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Make or list copies, in the way the destination behaves."""
        shelf = self._shelf(request)
        entry = Request(time.monotonic(), request.method, request.query["session"])
        shelf.requests.append(entry)
        shelf.in_flight += 1
        try:
            answer = await self._answer(request, shelf, entry)
            entry.status = answer.status
            return answer
        finally:
            shelf.in_flight -= 1
            entry.ended = time.monotonic()

    async def _answer(self, request: web.Request, shelf: Shelf, entry: Request) -> web.StreamResponse:
        behaviour = shelf.behaviour
        kind = behaviour.kind if request.method in behaviour.methods else "well"
        if kind == "hang":
            await asyncio.Event().wait()
        if kind == "drip":
            return await _drip(request)
        refusal = _refusal(kind, shelf)
        if refusal is not None:
            return refusal
        await request.read()
        if behaviour.seconds:
            await asyncio.sleep(behaviour.seconds)
        if request.method == "GET":
            return web.json_response({"there": entry.session in shelf.sessions})
        shelf.sessions.add(entry.session)
        return web.json_response({"id": entry.session}, status=201)


def _refusal(kind: str, shelf: Shelf) -> web.Response | None:
    """Refuse a request at once; None when it is to be answered well."""
    capacity = shelf.behaviour.capacity
    if capacity and shelf.in_flight > capacity:
        return web.Response(status=429)
    if kind == "closed":
        return _closed(shelf)
    status = {"unavailable": 503, "unauthorised": 401}.get(kind)
    return web.Response(status=status) if status else None


def _closed(shelf: Shelf) -> web.Response | None:
    """Refuse until the announced moment; None when that is over."""
    now, behaviour = time.monotonic(), shelf.behaviour
    if shelf.opens_at is None:
        shelf.opens_at = now + behaviour.retry_after
        shelf.closings.append((now, shelf.opens_at))
    left = shelf.opens_at - now
    if left <= 0:
        return None
    if not behaviour.as_date:
        return web.Response(status=429, headers={"Retry-After": f"{left:.3f}"})
    date = datetime.now(UTC).replace(microsecond=0)
    headers = {
        "Date": format_datetime(date, usegmt=True),
        "Retry-After": format_datetime(date + timedelta(seconds=int(left) + 1), usegmt=True),
    }
    return web.Response(status=429, headers=headers)


async def _drip(request: web.Request) -> web.StreamResponse:
    """Announce a body and send a byte of it now and then."""
    response = web.StreamResponse(status=201)
    response.content_length = DRIP_LENGTH
    await response.prepare(request)
    for _ in range(DRIP_LENGTH):
        await response.write(b" ")
        await asyncio.sleep(DRIP_SECONDS)
    return response


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulkhead.server", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    settings: dict[str, Any] = {"print": lambda *_: None, "access_log": None, "handler_cancellation": True}
    web.run_app(Repository().application(), host="127.0.0.1", port=options.port, shutdown_timeout=1, **settings)


if __name__ == "__main__":
    main()
