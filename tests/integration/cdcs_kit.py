"""What the tests with a real CDCS share: destinations, records, and a proxy that loses answers or makes them up."""

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
import struct
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from consumer.destinations.cdcs import Cdcs
from consumer.destinations.contract import ExportContext, ExportResult, LastExport
from tools.records import make_record
from tools.servers.cdcs import CdcsServer

JSON = "application/json"
NEXUS = "Nexus Experiment Schema"
TEMPLATES = "/rest/template-version-manager/global/"
WORKSPACES = "/rest/workspace/read_access/"


class Between:
    """A proxy that counts requests, answers some of them itself, and can reset instead of passing an answer on.

    Every request goes to the server whole, on a connection of its own, and its answer is awaited to the end.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.requests: list[str] = []
        self.reset_after: set[str] = set()
        self.canned: dict[str, deque[bytes]] = {}
        self._tasks: list[asyncio.Task[Any]] = []

    @contextlib.asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve until the end of the block, and give the address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24, ssl=tls)
        async with server:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            async with asyncio.timeout(5):
                await asyncio.gather(*self._tasks)

    def answer(self, request: str, status: str, body: object, *headers: str) -> None:
        """Answer the next such request ("POST /rest/data/") from here, with JSON or with HTML."""
        text, kind = (body, "text/html") if isinstance(body, str) else (json.dumps(body), JSON)
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *headers]
        raw = "\r\n".join([*lines, f"Content-Length: {len(text.encode())}", "", text]).encode()
        self.canned.setdefault(request, deque()).append(raw)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks += filter(None, [asyncio.current_task()])
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
            body = await reader.readexactly(length)
            request = first.partition("?")[0].removesuffix(" HTTP/1.1")
            self.requests.append(request)
            waiting = self.canned.get(request)
            answer = waiting.popleft() if waiting else await self._pass_on(head, body)
            if request in self.reset_after:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.write(answer)
            writer.close()
            await writer.wait_closed()

    async def _pass_on(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        answer = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return answer


@dataclass
class Reservation:
    """The part of a reservation that CDCS cares for."""

    username: str | None
    user_email: str | None = None
    user_first_name: str | None = "Ada"
    user_last_name: str | None = "Lovelace"


MakeDestination = Callable[..., Cdcs]
MakeContext = Callable[..., ExportContext]


@pytest.fixture
async def rest(cdcs: CdcsServer) -> AsyncIterator[httpx.AsyncClient]:
    """Give an administrator's client that knows nothing of the code under test."""
    headers = {"Authorization": f"Token {cdcs.admin_token}"}
    async with httpx.AsyncClient(base_url=cdcs.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
async def make(cdcs: CdcsServer) -> AsyncIterator[MakeDestination]:
    """Give a function that makes destinations, with an administrator's token unless another is given."""
    made: list[Cdcs] = []

    def destination(**settings: Any) -> Cdcs:
        token = SecretStr(settings.pop("token", cdcs.admin_token))
        made.append(Cdcs(Cdcs.Settings(token=token, **{"url": cdcs.url, **settings})))
        return made[-1]

    yield destination
    for item in made:
        await item.aclose()


@pytest.fixture
async def between(cdcs: CdcsServer) -> AsyncIterator[tuple[Between, str]]:
    """Give a proxy before the server, and its address."""
    proxy = Between(cdcs.port)
    async with proxy.running() as url:
        yield proxy, url


@pytest.fixture
def context_of(tmp_path: Path) -> MakeContext:
    """Give a function that makes the context of a record; its file name is new unless one is given."""

    def context(
        index: int = 1, *, stem: str | None = None, content: bytes | None = None, **more: Any
    ) -> ExportContext:
        record = make_record(index, size=2_000)
        path = tmp_path / f"{stem or uuid.uuid4().hex}.xml"
        path.write_bytes(content or record.content)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        more = {"sent_hashes": frozenset({sha256}), **more}
        return ExportContext(
            path, record.session, record.instrument_pid, record.dt_from, record.dt_to, record_sha256=sha256, **more
        )

    return context


def rebuilt(context: ExportContext, result: ExportResult, index: int = 2, **changes: Any) -> ExportContext:
    """Return the context of a newer build of the record that was exported with a result."""
    sha256 = context.record_sha256
    context.xml_file_path.write_bytes(make_record(index, size=3_000).content)
    new = hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest()
    last = LastExport(result.record_id or "", result.record_url, sha256, sha256)
    values = {"record_sha256": new, "last_export": last, "sent_hashes": frozenset({sha256, new}), **changes}
    return replace(context, **values)


async def stored(rest: httpx.AsyncClient, record_id: str | None) -> dict[str, Any]:
    answer = await rest.get(f"rest/data/{record_id}/")
    assert answer.status_code == 200
    value: dict[str, Any] = answer.json()
    return value


async def titled(rest: httpx.AsyncClient, title: str) -> list[dict[str, Any]]:
    """List all records with a title, whoever owns them."""
    value: list[dict[str, Any]] = (await rest.get("rest/admin/data/", params={"title": title})).json()
    return value


async def upload(rest: httpx.AsyncClient, title: str, content: str, **more: Any) -> str:
    """Upload a record by other means than those under test, into the public workspace unless told otherwise."""
    template = (await rest.get(TEMPLATES[1:], params={"title": NEXUS})).json()[0]["current"]
    record = {"title": title, "template": template, "xml_content": content, "workspace": 1, **more}
    answer = await rest.post("rest/data/", json=record)
    assert answer.status_code == 201
    return str(answer.json()["id"])


async def new_schema(rest: httpx.AsyncClient, title: str, xsd: str) -> dict[str, Any]:
    """Upload a schema and return its entry in the list of schemas."""
    answer = await rest.post("rest/template/global/", json={"title": title, "filename": "x.xsd", "content": xsd})
    assert answer.status_code == 201, answer.text
    entries: list[dict[str, Any]] = (await rest.get(TEMPLATES[1:], params={"title": title})).json()
    return entries[0]


async def new_version(rest: httpx.AsyncClient, schema: dict[str, Any], xsd: str) -> str:
    """Upload a new version of a schema, make it the current one, and return its number."""
    path = f"rest/template-version-manager/{schema['id']}/version/"
    answer = await rest.post(path, json={"filename": "x.xsd", "content": xsd})
    assert answer.status_code == 201, answer.text
    version = str(answer.json()["id"])
    assert (await rest.patch(f"rest/template/version/{version}/current/")).status_code == 200
    return version
