"""A server that behaves like eLabFTW's API v2: ``python -m consumer.testing.elabftw_server --port 8080``.

For tests of plugins only: it keeps nothing, and its keys are known to everybody. It knows experiments with tags and
attachments, users, categories and the search that an exporter needs, as versions 5.3.6, 5.6.12 and 6.0.0 answer
them, with their traps: bodies are purified, ``Location`` names another host, a change goes key by key without a
transaction, metadata is an object in one request and a text in the next.

Keys (``elabftw_accounts``): ``SERVICE_KEY`` (user 1), ``PERSON_KEY`` (user 2), ``ADMIN_KEY``, ``READ_ONLY_KEY``,
``STRANGER_KEY`` (another team). Beside the API there is a control interface, without a key:

* ``PUT /_control/faults``: a list of faults (``elabftw_faults.Fault``) for the next requests that match
* ``PUT /_control/settings``: change fields of ``elabftw_accounts.Settings`` (version, tags_forbidden, ...)
* ``GET /_control/ledger``: every request so far; ``GET /_control/state``: all experiments and attachments
* ``PUT /_control/reset``: forget everything
"""

import argparse
import asyncio
import json
import socket
import struct
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from consumer.testing.elabftw_accounts import Settings
from consumer.testing.elabftw_answers import Reply, Request, account_of, page, respond
from consumer.testing.elabftw_faults import Fault, Faults, Ledger
from consumer.testing.elabftw_store import Notebook

#: The server behind is a web server of its own, with limits that are above what the API takes.
MAX_REQUEST_BYTES = 1024**3


class Server:
    """Answers requests, well or with a fault."""

    def __init__(self, settings: Settings, ledger: Path | None = None) -> None:
        self._start = settings
        self._notebook = Notebook(replace(settings))
        self._faults = Faults()
        self._ledger = Ledger(ledger)
        self._later: set[asyncio.Task[None]] = set()

    def application(self) -> web.Application:
        """Return the routes."""
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_put("/_control/faults", self.order)
        application.router.add_put("/_control/settings", self.change)
        application.router.add_put("/_control/reset", self.reset)
        application.router.add_get("/_control/ledger", self.tell_ledger)
        application.router.add_get("/_control/state", self.tell_state)
        application.router.add_route("*", "/{path:.*}", self.serve)
        return application

    # --- control -----------------------------------------------------------------------------------------------

    async def order(self, request: web.Request) -> web.Response:
        """Put faults in stock, instead of those that are there."""
        try:
            self._faults.waiting = [Fault.of(value) for value in await request.json()]
        except (TypeError, ValueError) as error:
            return web.json_response({"message": str(error)}, status=400)
        return web.json_response({})

    async def change(self, request: web.Request) -> web.Response:
        """Change settings."""
        try:
            self._notebook.settings = replace(self._notebook.settings, **await request.json())
        except TypeError as error:
            return web.json_response({"message": str(error)}, status=400)
        return web.json_response(asdict(self._notebook.settings))

    async def reset(self, _request: web.Request) -> web.Response:
        """Forget everything; the ledger file keeps its lines."""
        self._notebook = Notebook(replace(self._start))
        self._faults = Faults()
        self._ledger.lines.clear()
        return web.json_response({})

    async def tell_ledger(self, _request: web.Request) -> web.Response:
        """Tell every request."""
        return web.json_response(self._ledger.entries())

    async def tell_state(self, _request: web.Request) -> web.Response:
        """Tell all that is there, whatever its state; ``pending`` are commits that are still to come."""
        notebook = self._notebook
        state = {
            "experiments": list(notebook.experiments.values()),
            "uploads": list(notebook.uploads.values()),
            "pending": len(self._later),
        }
        return web.json_response(state)

    # --- the API -----------------------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer a request of the API, in the way that was ordered."""
        asked = await _request(request)
        fault = self._faults.take(asked.method, asked.path)
        if fault is None:
            return _response(self._work(asked))
        return await self._fail(request, asked, fault)

    def _work(self, asked: Request, fault: Fault | None = None, *, silent: bool = False) -> Reply:
        reply = respond(self._notebook, asked)
        self._note(asked, None if silent else reply.status, fault)
        return reply

    def _note(self, asked: Request, status: int | None, fault: Fault | None) -> None:
        account = account_of(asked)
        self._ledger.add(
            user=account.userid if account else None,
            method=asked.method,
            path=asked.path,
            query=asked.query,
            json=_json(asked),
            status=status,
            fault=fault.kind if fault else None,
        )

    async def _fail(self, request: web.Request, asked: Request, fault: Fault) -> web.StreamResponse:
        match fault.kind:
            case "error" | "rate_limit":
                status = 429 if fault.kind == "rate_limit" else fault.status
                self._note(asked, status, fault)
                return _refusal(fault, status)
            case "error_after":
                self._work(asked, fault, silent=True)
                return _refusal(fault, fault.status)
            case "late":
                self._commit_later(asked, fault)
                return _reset(request)
            case "cut" | "stall":
                self._note(asked, None, fault)
                await asyncio.sleep(fault.seconds)
                return _reset(request)
            case "cut_after" | "stall_after":
                self._work(asked, fault, silent=True)
                await asyncio.sleep(fault.seconds)
                return _reset(request)
            case "truncate":
                return await _truncated(request, self._work(asked, fault))

    def _commit_later(self, asked: Request, fault: Fault) -> None:
        async def commit() -> None:
            await asyncio.sleep(fault.seconds)
            self._work(asked, fault, silent=True)

        task = asyncio.create_task(commit())
        self._later.add(task)
        task.add_done_callback(self._later.discard)


async def _request(request: web.Request) -> Request:
    return Request(
        method=request.method,
        path=request.path,
        query={name: value for name, value in request.query.items() if name != "tags[]"},
        tags=tuple(request.query.getall("tags[]", [])),
        headers={name.lower(): value for name, value in request.headers.items()},
        body=await request.read(),
    )


def _json(asked: Request) -> Any:
    if asked.headers.get("content-type") != "application/json":
        return None
    try:
        return json.loads(asked.body or b"null")
    except ValueError:
        return None


def _response(reply: Reply) -> web.Response:
    headers = {"Content-Type": reply.kind}
    if reply.location:
        headers["Location"] = reply.location
    return web.Response(status=reply.status, body=reply.body, headers=headers)


def _refusal(fault: Fault, status: int) -> web.Response:
    """Return an error as the servers before the application give it: in HTML."""
    response = _response(page(status, fault.body or "Something went wrong"))
    if fault.retry_after is not None:
        now = datetime.now(UTC)
        response.headers["Date"] = format_datetime(now, usegmt=True)
        until = format_datetime(now + timedelta(seconds=fault.retry_after), usegmt=True)
        response.headers["Retry-After"] = until if fault.date else f"{fault.retry_after:g}"
    return response


def _reset(request: web.Request) -> web.Response:
    """Reset the connection; what is returned cannot reach anybody."""
    if request.transport is not None:
        # no lingering: the peer gets a reset instead of an orderly end
        peer = request.transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response(status=500)


async def _truncated(request: web.Request, reply: Reply) -> web.StreamResponse:
    """Announce a whole body, send the half of it, hang up."""
    response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.kind})
    response.content_length = len(reply.body) + 100
    await response.prepare(request)
    await response.write(reply.body[: len(reply.body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m consumer.testing.elabftw_server", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--version", default="6.0.0", help="5.3.6, 5.6.12 or 6.0.0")
    parser.add_argument("--site-url", default="https://elab.example.org", help="what Location is built from")
    parser.add_argument("--ledger", type=Path, help="file that gets a line for each request")
    options = parser.parse_args()
    server = Server(Settings(version=options.version, site_url=options.site_url), options.ledger)
    web.run_app(server.application(), host=options.host, port=options.port, print=lambda *_: None, access_log=None)


if __name__ == "__main__":
    main()
