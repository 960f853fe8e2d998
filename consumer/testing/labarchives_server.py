"""A server that behaves like LabArchives' API, for tests of plugins only; nothing in it is safe to expose.

``python -m consumer.testing.labarchives_server --port 8090`` serves ``http://127.0.0.1:8090/api``. It checks
signatures (SHA-512) and their two minutes, keeps folders, pages and entries in memory, and notes every request with
its time. ``/control`` is not LabArchives': see ``Control``. The next page is made, and nobody hears of it::

    curl -d '{"method": "insert_node", "when": "after", "what": "cut"}' http://127.0.0.1:8090/control/faults

A client signs in with the constants below; ``--user`` adds people who see the same notebooks. Not known of the real
one, and so only chosen here: which HTTP status comes with which code (``errors_with_200``, ``old_errors`` and
``empty_is_404`` change that), and that an id of nothing is answered with 4529.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from consumer.testing.labarchives_api import KEY_ID, LARGEST_BYTES, PASSWORD, LabArchivesServer, Options
from consumer.testing.labarchives_faults import Fault, Ledger
from consumer.testing.labarchives_notebook import Notebooks, User

UID = "285489257Ho's^Beckman1"
LOGIN = "exporter@example.org"
TOKEN = "external-app-token"  # noqa: S105 - of a server for tests
NOTEBOOK = "MTMuMnwxMC8xMC9Ob3RlYm9vay8xMjM0fDI1LjI="


class Control:
    """What a test does to the server, as JSON under ``/control``.

    ``POST faults`` a ``Fault``, ``DELETE faults``; ``PATCH options`` fields of ``Options``; ``GET ledger`` the
    requests and those that came ``too_soon``, ``DELETE ledger``; ``GET state`` all nodes and entries; ``POST nodes``
    ``{notebook, parent, name, is_folder}`` makes one as another program would; ``DELETE nodes/<id>`` and ``DELETE
    entries/<id>`` what only people can do; ``POST reset`` goes back to how the server started.
    """

    def __init__(self, server: LabArchivesServer) -> None:
        self._server = server
        self._options = dict(vars(server.options))

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.post("/control/faults", self._add_fault),
            web.delete("/control/faults", self._clear_faults),
            web.patch("/control/options", self._set_options),
            web.get("/control/ledger", self._ledger),
            web.delete("/control/ledger", self._clear_ledger),
            web.get("/control/state", self._state),
            web.post("/control/reset", self._reset),
            web.post("/control/nodes", self._add_node),
            web.delete("/control/nodes/{id}", partial(self._delete, "nodes")),
            web.delete("/control/entries/{id}", partial(self._delete, "entries")),
        ]

    async def _add_fault(self, request: web.Request) -> web.Response:
        self._server.faults.add(Fault(**await request.json()))
        return web.json_response({})

    async def _clear_faults(self, _request: web.Request) -> web.Response:
        self._server.faults.clear()
        return web.json_response({})

    async def _set_options(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            if not hasattr(self._server.options, name):
                raise web.HTTPBadRequest(text=f"there is no option {name}")
            setattr(self._server.options, name, value)
        return web.json_response({})

    async def _ledger(self, _request: web.Request) -> web.Response:
        return web.json_response(self._server.ledger.described())

    async def _clear_ledger(self, _request: web.Request) -> web.Response:
        self._server.ledger.clear()
        return web.json_response({})

    async def _state(self, _request: web.Request) -> web.Response:
        return web.json_response(self._server.notebooks.described())

    async def _reset(self, _request: web.Request) -> web.Response:
        server = self._server
        server.end_late()
        server.faults.clear()
        server.ledger.clear()
        server.notebooks.nodes.clear()
        server.notebooks.entries.clear()
        vars(server.options).update(self._options)
        return web.json_response({})

    async def _add_node(self, request: web.Request) -> web.Response:
        asked = await request.json()
        made = self._server.notebooks.insert(
            asked["notebook"], asked.get("parent", "0"), asked["name"], is_folder=asked.get("is_folder", True)
        )
        return web.json_response(vars(made))

    async def _delete(self, kind: str, request: web.Request) -> web.Response:
        found: Mapping[str, Any] = getattr(self._server.notebooks, kind)
        removed = found.pop(request.match_info["id"], None) if isinstance(found, dict) else None
        return web.json_response({"removed": removed is not None})


def build_app(
    options: Options, users: list[User], names: dict[str, str], ledger: Path | None = None
) -> web.Application:
    """Build the web application with its control interface."""
    server = LabArchivesServer(options, Notebooks(names, users), Ledger(ledger, options.interval_seconds))
    app = web.Application(client_max_size=LARGEST_BYTES)
    app.add_routes([web.route("*", "/api/{path:.+}", server.handle), web.get("/storage/{id}", server.storage)])
    app.add_routes(Control(server).routes())
    return app


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A LabArchives for tests of plugins; it keeps nothing.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ledger", type=Path, help="file for one JSON line a request")
    parser.add_argument("--key-id", default=KEY_ID)
    parser.add_argument("--password", default=PASSWORD)
    parser.add_argument("--notebook", action="append", help="ID=NAME; may be given more than once")
    parser.add_argument("--user", action="append", help="a further uid; it sees all notebooks")
    parser.add_argument("--max-file-size", type=int, default=Options.max_file_size, help="bytes")
    parser.add_argument("--interval", type=float, default=Options.interval_seconds, help="seconds between requests")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM."""
    given = _arguments()
    names = dict(item.rsplit("=", 1) for item in given.notebook or [f"{NOTEBOOK}=Microscopy"])
    users = [User(UID, LOGIN, TOKEN, tuple(names))]
    users += [User(uid, f"{uid}@example.org", TOKEN, tuple(names)) for uid in given.user or ()]
    options = Options(
        key_id=given.key_id, password=given.password, max_file_size=given.max_file_size,
        interval_seconds=given.interval,
    )  # fmt: skip
    app = build_app(options, users, names, given.ledger)
    web.run_app(app, host="127.0.0.1", port=given.port, print=None, access_log=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
