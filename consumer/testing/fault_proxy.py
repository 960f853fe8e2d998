"""A TCP proxy, in a process of its own, that does one named fault to one request and is honest before and after.

    python -m consumer.testing.fault_proxy

prints the port of its control connection, where each line is a JSON object and is answered by one:

``{"do": "open", "host": ..., "port": ..., "tls": false, "reads": [...], "creates": [...], "limit": s, "late": s}``
    a new wire to a server: ``{"id": 1, "port": 40001}``. The patterns are searched in ``METHOD path`` and say which
    requests only read although they are no GET, and which ones change something although they are one.
``{"do": "arm", "id": 1, "fault": name, "variant": "", "kind": "write|read|any", "number": k, "position": n}``
    strike the k-th request of that kind from now on. A fault on the connection needs to know beforehand, so it
    strikes the n-th request of all.
``{"do": "mend", "id": 1}``
    the wire is whole again.
``{"do": "ledger", "id": 1}``
    the requests since the last ``arm`` or ``mend``, and what reached the other host of a redirect.
``{"do": "close", "id": 1}``

It ends when its standard input does, so it never outlives the program that started it.
"""

import asyncio
import json
import re
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from consumer.testing.fault_strikes import STRIKES, Exchange
from consumer.testing.faults import BY_NAME, Fault
from consumer.testing.wire import HEAD_LIMIT, Answer, NotHttpError, Request, parse_answer, read_request

ANSWER_SECONDS = 120.0
#: Another address of this machine: to a client it is another host.
OTHER_HOST = "127.0.0.2"
_READING = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True, slots=True)
class Server:
    """The server behind a wire."""

    host: str
    port: int
    tls: bool = False

    async def __call__(self, request: Request) -> Answer:
        """Pass a request on, on a connection of its own, and wait for the end of its answer."""
        context = None
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # a server for tests
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
            try:
                writer.write(request.encode())
                raw = await reader.read(-1)
            finally:
                writer.close()
        return parse_answer(raw)


@dataclass
class Entry:
    """One request as the ledger tells it; ``status`` is the server's, None as long as it has not answered."""

    method: str
    path: str
    kind: str
    struck: str = ""
    status: int | None = None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Armed:
    """A fault that waits for its request."""

    fault: Fault
    variant: str
    kind: str
    number: int
    position: int


@dataclass
class Wire:
    """One way to a server: a port of its own, at most one fault armed, a ledger."""

    server: Server
    reads: Sequence[re.Pattern[str]]
    creates: Sequence[re.Pattern[str]]
    limit_seconds: float
    late_seconds: float
    port: int = 0
    armed: Armed | None = None
    entries: list[Entry] = field(default_factory=list)
    trapped: list[str] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)
    _answered: int = 0
    _listener: asyncio.Server | None = None
    _held: socket.socket | None = None
    _trap: asyncio.Server | None = None
    _closes_next: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def open(self) -> None:
        """Listen, on the same port as before if there was one."""
        if self._held is not None:
            self._held.close()
            self._held = None
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=HEAD_LIMIT)
        self.port = self._listener.sockets[0].getsockname()[1]
        if self._trap is None:
            self._trap = await asyncio.start_server(self._catch, OTHER_HOST, 0, limit=HEAD_LIMIT)

    def close(self) -> None:
        """Stop listening; what is under way goes on, a late commit above all."""
        for server in (self._listener, self._trap):
            if server is not None:
                server.close()
        if self._held is not None:
            self._held.close()
        self._listener = self._trap = self._held = None

    def arm(self, armed: Armed) -> None:
        """Let a fault wait for its request."""
        self._begin()
        self.armed = armed
        self._before_connection(1)

    async def mend(self) -> None:
        """Take the fault away."""
        self._begin()
        self._closes_next = False
        if self._listener is None:
            await self.open()

    def _begin(self) -> None:
        self.armed = None
        self.entries = []
        self._counts.clear()
        self._answered = 0

    def _before_connection(self, position: int) -> None:
        """Act on the connection that the request at this position will need."""
        armed = self.armed
        if armed is None or armed.fault.stage != "connection" or armed.position != position:
            return
        self.entries.append(Entry("", "", armed.kind, armed.fault.name))
        self.armed = None
        if armed.fault.name == "closed_at_accept":
            self._closes_next = True
        elif self._listener is not None:
            self._listener.close()
            self._listener = None
            self._held = socket.socket()  # bound and not listening: the port is refused, and kept for us
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._held.bind(("127.0.0.1", self.port))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if self._closes_next:
                self._closes_next = False
                return
            while await self._one(reader, writer):
                pass
        except (NotHttpError, ValueError, OSError):  # not HTTP, or the connection has ended
            return
        finally:
            with suppress(ConnectionError):
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; tell whether the connection stays."""
        request = await read_request(reader)
        if request is None:
            return False
        entry = Entry(request.method, request.path, self._kind_of(request))
        self.entries.append(entry)
        self._counts.update((entry.kind, "any"))

        async def forward(request: Request) -> Answer:
            try:
                answer = await self.server(request)
            except (OSError, NotHttpError, ValueError) as error:
                entry.failed = f"{type(error).__name__}: {error}"
                raise ConnectionError(entry.failed) from None
            entry.status = answer.status
            return answer

        armed = self._takes(entry)
        if armed is not None:
            entry.struck = armed.fault.name
            exchange = Exchange(
                request, reader, writer, forward, self.limit_seconds, self.late_seconds, self._trap_url()
            )
            await STRIKES[armed.fault.name](exchange, armed.variant)
            return exchange.keep
        answer = await forward(request)
        self._answered += 1
        # a fault on the connection needs each request to have one of its own
        ends = self.armed is not None and self.armed.fault.stage == "connection"
        self._before_connection(self._answered + 1)
        writer.write(answer.encode(close=ends))
        await writer.drain()
        return not ends

    def _takes(self, entry: Entry) -> Armed | None:
        """Return the armed fault if this is its request."""
        armed = self.armed
        if armed is None or armed.fault.stage == "connection":
            return None
        due = armed.kind in {"any", entry.kind} and self._counts[armed.kind] == armed.number
        # a fault that holds goes on with whatever comes after its request
        held = armed.fault.sticky and any(earlier.struck for earlier in self.entries)
        if not due and not held:
            return None
        if not armed.fault.sticky:
            self.armed = None
        return armed

    def _kind_of(self, request: Request) -> str:
        text = f"{request.method} {request.path}"
        if any(pattern.search(text) for pattern in self.creates):
            return "write"
        if request.method in _READING or any(pattern.search(text) for pattern in self.reads):
            return "read"
        return "write"

    def _trap_url(self) -> str:
        port = self._trap.sockets[0].getsockname()[1] if self._trap is not None else 0
        return f"http://{OTHER_HOST}:{port}"

    async def _catch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Be the other host: note all that came, and say yes."""
        with suppress(NotHttpError, ConnectionError):
            request = await read_request(reader)
            if request is not None:
                self.trapped.append((request.encode()).decode("latin-1"))
                writer.write(Answer(200, "OK", (("Content-Type", "application/json"),), b"{}").encode(close=True))
        writer.close()


class Control:
    """Does what the control connection asks for."""

    def __init__(self) -> None:
        self._wires: dict[int, Wire] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer each line until the connection ends."""
        while line := await reader.readline():
            try:
                answer = await self._do(json.loads(line))
            except (KeyError, ValueError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    async def _do(self, wish: dict[str, Any]) -> dict[str, Any]:
        if wish["do"] == "open":
            return await self._open(wish)
        number = wish["id"]
        wire = self._wires[number]
        if wish["do"] == "arm":
            fault = BY_NAME[wish["fault"]]
            wire.arm(Armed(fault, wish["variant"], wish["kind"], wish["number"], wish["position"]))
        elif wish["do"] == "mend":
            await wire.mend()
        elif wish["do"] == "ledger":
            return {"entries": [asdict(entry) for entry in wire.entries], "trapped": wire.trapped}
        elif wish["do"] == "close":
            self._wires.pop(number).close()
        return {}

    async def _open(self, wish: dict[str, Any]) -> dict[str, Any]:
        reads, creates = ([re.compile(text) for text in wish[name]] for name in ("reads", "creates"))
        server = Server(wish["host"], wish["port"], wish["tls"])
        wire = Wire(server, reads, creates, wish["limit"], wish["late"])
        await wire.open()
        number = max(self._wires, default=0) + 1
        self._wires[number] = wire
        return {"id": number, "port": wire.port}


async def main() -> None:
    """Serve until standard input ends."""
    server = await asyncio.start_server(Control().serve, "127.0.0.1", 0, limit=HEAD_LIMIT)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
