"""The server behind the test destination: ``python -m tests.crash.server PORT``.

Each run has its own part, ``/<run>/records``. A request is committed a moment after it came, whether its client
still waits or not, and each create makes a new record. ``/<run>/faults`` says how the next requests end.
"""

import asyncio
import hashlib
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

COMMIT_SECONDS = 0.25


@dataclass
class Part:
    """What one run has sent."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    #: how the next requests of a session end; ``forbid`` stays until it is taken away
    faults: dict[str, list[str]] = field(default_factory=dict)


parts: defaultdict[str, Part] = defaultdict(Part)


async def write(request: web.Request) -> web.Response:
    """Create or update a record, or fail in the way that was ordered."""
    part, body = parts[request.match_info["run"]], await request.json()
    faults = part.faults.get(body["session"], [])
    fault = faults[0] if faults else ""
    if fault and fault != "forbid":
        faults.pop(0)
    part.requests.append(f"{request.method} {fault}".strip())
    await asyncio.sleep(COMMIT_SECONDS)
    if fault.startswith("busy"):
        return web.json_response({"retry_after": float(fault.partition(":")[2] or 0)}, status=503)
    if fault == "forbid":
        return web.json_response({}, status=422)
    if fault != "drop":
        key = request.match_info.get("id") or f"r{len(part.records) + 1}"
        digest = hashlib.sha256(body["content"].encode()).hexdigest()
        part.records[key] = {"id": key, "session": body["session"], "sha256": digest, "link": body.get("link")}
        if fault != "cut":
            return web.json_response({"id": key})
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def find(request: web.Request) -> web.Response:
    """Return the records of a session."""
    records = parts[request.match_info["run"]].records.values()
    return web.json_response([record for record in records if record["session"] == request.query["session"]])


async def order(request: web.Request) -> web.Response:
    """Set how the next requests of some sessions end."""
    parts[request.match_info["run"]].faults.update(await request.json())
    return web.json_response({})


async def ledger(request: web.Request) -> web.Response:
    """Tell what was sent and what is there."""
    part = parts[request.match_info["run"]]
    return web.json_response({"records": list(part.records.values()), "requests": part.requests})


async def forget(request: web.Request) -> web.Response:
    """Forget a run."""
    parts.pop(request.match_info["run"], None)
    return web.json_response({})


def main() -> None:
    """Serve until killed."""
    app = web.Application()
    app.add_routes(
        [
            web.post("/{run}/records", write),
            web.put("/{run}/records/{id}", write),
            web.get("/{run}/records", find),
            web.put("/{run}/faults", order),
            web.get("/{run}", ledger),
            web.delete("/{run}", forget),
        ]
    )
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
